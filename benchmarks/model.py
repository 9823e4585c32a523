r"""Measure the network on a GPU, one technique after the other, with its fidelity beside every speed.

    python -m benchmarks.model                       # the table, on random weights of the full size
    python -m benchmarks.model --record              # append to benchmarks/model.csv

Each row adds one technique to those before it, from the eager fp32 form up. Times are medians of CUDA events
over --runs passes (a quarter for eager rows) after warm-up, without transfers; p99 stands beside the whole
pass. "whole" is one image and one prompt (or eight of each): encode, decode, and the masks of 20 queries.
"prompt" is one of eight further prompts on the same image. The text is encoded before.

Fidelity is measured against the first row, eager fp32, over eight (image, prompt) pairs: IoU of the masks of
the 20 best queries, error of all scores, and queries on another side of a threshold in the widest gap between
scores (random weights have no useful threshold). TFLOP/s counts 5.613 TFLOP an image and 0.440 a pair (the
official model's, by torch's FlopCounter), against the rate of an 8192^3 product on the same card.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's usual alias
from transformers import Sam3Config, Sam3Model

from benchmarks.parity import randomise, widest_gap
from benchmarks.references import exact_float32
from benchmarks.table import record
from sam3_runner.inference.passes import Passes
from sam3_runner.network import operations
from sam3_runner.network.masks import mask_logits
from sam3_runner.network.model import SAM3Network
from sam3_runner.network.precision import set_precision
from sam3_runner.weights.load import to_network

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from sam3_runner.inference.passes import Decoded
    from sam3_runner.network.model import ImageFeatures

RESULTS = Path(__file__).parent / "model.csv"
IMAGES = 8
QUERIES = 20
WEIGHTS_SEED = 20261122
IMAGE_TFLOP, PAIR_TFLOP = 5.613, 0.440
STEPS = (
    *("relu", "patches", "gelu", "rotary", "residual", "norm", "attention", "grid_attention"),
    *("box_bias", "boxes", "group_norm"),
)
"""In the order in which the table adds them."""


@dataclass(frozen=True, slots=True)
class Technique:
    """One row: its name, what it adds, and the configuration with it.

    Attributes:
        name: of the row.
        dtype: of the large products.
        recorded: CUDA graphs.
        steps: those that run as kernels.
    """

    name: str
    dtype: torch.dtype
    recorded: bool
    steps: tuple[str, ...] = ()


def techniques() -> list[Technique]:
    """All rows."""
    rows = [
        Technique("eager float32", torch.float32, recorded=False),
        Technique("float16", torch.float16, recorded=False),
        Technique("CUDA graphs", torch.float16, recorded=True),
    ]
    rows += [
        Technique(f"kernel: {step}", torch.float16, recorded=True, steps=STEPS[: number + 1])
        for number, step in enumerate(STEPS)
    ]
    return [*rows, Technique("all of it in bfloat16", torch.bfloat16, recorded=True, steps=STEPS)]


@dataclass(frozen=True, slots=True)
class Inputs:
    """Eight images and prompts on the device: pixels (8, S, S, 3) uint8, ids and valid (8, 32)."""

    pixels: Tensor
    ids: Tensor
    valid: Tensor


@dataclass(frozen=True, slots=True)
class Outputs:
    """Of eight pairs: scores (8, Q), and mask logits (8, 20, h, w) of the queries in `queries` (8, 20)."""

    scores: Tensor
    queries: Tensor
    masks: Tensor


def draw_inputs(device: torch.device, side_px: int = 1008) -> Inputs:
    """Smooth coloured noise, and random tokens of usual lengths, by a fixed seed."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(IMAGES, 3, 24, 24, generator=generator)
    pixels = F.interpolate(coarse, (side_px, side_px), mode="bicubic").clamp(0, 1).mul(255).to(torch.uint8)
    ids = torch.randint(1000, 40000, (IMAGES, 32), generator=generator)
    ids[:, 0] = 49406
    valid = torch.arange(32)[None] < torch.tensor([4, 5, 6, 4, 7, 4, 5, 9])[:, None]
    return Inputs(pixels.permute(0, 2, 3, 1).contiguous().to(device), ids.to(device), valid.to(device))


def random_state() -> dict[str, Tensor]:
    """Random weights of the full size, by a fixed seed and in the order of transformers' model."""
    with torch.device("meta"):
        model: Any = Sam3Model(Sam3Config())
    return to_network(randomise(model.state_dict(), WEIGHTS_SEED))


def new_network(state: dict[str, Tensor], dtype: torch.dtype, device: torch.device) -> SAM3Network:
    """A network of the full size with copies of the weights; the peak of the memory counts from then on."""
    with torch.device("meta"):
        network = SAM3Network(Sam3Config())
    network.load_state_dict({name: each.to(device) for name, each in state.items()}, assign=True)
    network = network.to(device).eval().requires_grad_(requires_grad=False)
    set_precision(network, dtype)
    # The fp32 copies of a moment ago, which the server does not make, do not count.
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return network


class Measured:
    """The passes of one technique, and the calls that are timed."""

    def __init__(self, technique: Technique, state: dict[str, Tensor], inputs: Inputs) -> None:
        operations.plain_steps.clear()
        operations.plain_steps.update(operations.STEPS - set(technique.steps))
        self.inputs = inputs
        self.network = new_network(state, technique.dtype, inputs.pixels.device)
        self.passes = Passes(self.network, IMAGES, recorded=technique.recorded)
        texts = self.passes.encode_texts(inputs.ids, inputs.valid)
        self.tokens, self.valid = texts.tokens.clone(), texts.valid.clone()

    def encode(self, rows: slice) -> ImageFeatures:
        """Encode the images in `rows`."""
        return self.passes.encode_images(self.inputs.pixels[rows])

    def decode(self, images: ImageFeatures, rows: slice) -> Decoded:
        """Decode the texts in `rows`, each with its image, or all with the only image."""
        count = len(self.tokens[rows])
        attended, geometry = images.attended, images.geometry_token
        if len(attended) < count:
            attended, geometry = attended.expand(count, -1, -1), geometry.expand(count, -1, -1)
        return self.passes.decode(attended, geometry, self.tokens[rows], self.valid[rows])

    def masks(self, images: ImageFeatures, decoded: Decoded, queries: Tensor) -> list[Tensor]:
        """Mask logits of the queries (P, 20) of each pair, as many pairs at once as the passes take."""
        pairs, most = len(decoded.fused), self.passes.max_mask_pairs
        masks = []
        for start in range(0, pairs, most):
            part = slice(start, min(start + most, pairs))
            count = part.stop - part.start
            finer = tuple(
                level[part] if len(level) == pairs else level.expand(count, -1, -1, -1)
                for level in images.finer
            )
            features = self.passes.pixel_features(
                decoded.fused[part], decoded.prompt[part], decoded.prompt_valid[part], *finer
            )
            factors = decoded.mask_factors[part].gather(1, _as_index(queries[part], decoded.mask_factors))
            masks.append(mask_logits(factors, decoded.mask_offsets[part].gather(1, queries[part]), features))
        return masks

    def outputs(self, queries: Tensor | None = None) -> Outputs:
        """Scores of all queries, and masks of `queries`; None: of the 20 with the best scores."""
        scores, chosen, masks = [], [], []
        for row in range(IMAGES):
            rows = slice(row, row + 1)
            images = self.encode(rows)
            decoded = self.decode(images, rows)
            scores.append(decoded.summary[:, 1 : 1 + decoded.mask_offsets.shape[1]].clone())
            best = scores[-1].topk(QUERIES, dim=1).indices if queries is None else queries[rows]
            chosen.append(best)
            masks += [each.clone() for each in self.masks(images, decoded, best)]
        return Outputs(torch.cat(scores), torch.cat(chosen), torch.cat(masks))


def measure(technique: Technique, measured: Measured, reference: Outputs, runs: int) -> dict[str, object]:
    """One row of the table."""
    row: dict[str, object] = {"technique": technique.name}
    queries = reference.queries
    for count in (1, IMAGES):
        row |= _measure_batch(measured, slice(0, count), queries, runs)
    image = measured.encode(slice(0, 1))

    def prompts() -> None:
        measured.masks(image, measured.decode(image, slice(0, IMAGES)), queries)

    row["prompt_ms"] = round(float(_median(prompts, runs)) / IMAGES, 2)
    whole_8_ms = float(str(row[f"whole_{IMAGES}_ms"]))
    row["images_per_s"] = round(IMAGES * 1000 / whole_8_ms, 1)
    row["tflops"] = round(IMAGES * (IMAGE_TFLOP + PAIR_TFLOP) * 1000 / whole_8_ms, 0)
    row["peak_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
    return row | fidelity(measured.outputs(queries), reference)


def _measure_batch(measured: Measured, rows: slice, queries: Tensor, runs: int) -> dict[str, object]:
    """Times of the steps and of the whole pass for the images and prompts in `rows`."""
    images = measured.encode(rows)
    decoded = measured.decode(images, rows)

    def whole() -> None:
        images = measured.encode(rows)
        measured.masks(images, measured.decode(images, rows), queries[rows])

    times_ms = sorted(_times_ms(whole, runs))
    return {
        f"encode_{rows.stop}_ms": _median(lambda: measured.encode(rows), runs),
        f"decode_{rows.stop}_ms": _median(lambda: measured.decode(images, rows), runs),
        f"masks_{rows.stop}_ms": _median(lambda: measured.masks(images, decoded, queries[rows]), runs),
        f"whole_{rows.stop}_ms": round(statistics.median(times_ms), 2),
        f"whole_{rows.stop}_p99_ms": round(times_ms[int(0.99 * (len(times_ms) - 1))], 2),
    }


def fidelity(outputs: Outputs, reference: Outputs) -> dict[str, object]:
    """Mask IoU, score error and the kept set against the reference."""
    ours, theirs = outputs.masks > 0, reference.masks > 0
    union = (ours | theirs).sum((-1, -2)).clamp(min=1)
    ious = (ours & theirs).sum((-1, -2)) / union
    error = (outputs.scores - reference.scores).abs()
    moved = 0
    for mine, other in zip(outputs.scores, reference.scores, strict=True):
        threshold = widest_gap(other.tolist())
        moved += int(((mine > threshold) != (other > threshold)).sum())
    return {
        "iou_mean": round(ious.mean().item(), 5),
        "iou_least": round(ious.min().item(), 4),
        "score_error_mean": float(f"{error.mean().item():.2g}"),
        "kept_by_one": moved,
    }


def ceiling_tflops(runs: int, dtype: torch.dtype = torch.float16, side: int = 8192) -> float:
    """Rate of a large product on this card."""
    square = torch.randn(side, side, dtype=dtype, device="cuda")
    return round(2 * side**3 / (float(_median(lambda: square @ square, runs)) * 1e9), 0)


def _as_index(queries: Tensor, factors: Tensor) -> Tensor:
    return queries[..., None].expand(-1, -1, factors.shape[-1])


def _median(call: Callable[[], Any], runs: int) -> float:
    return round(statistics.median(_times_ms(call, runs)), 2)


def _times_ms(call: Callable[[], Any], runs: int) -> list[float]:
    """Times of single calls on the device, each after the one before has ended."""
    for _ in range(3):
        call()
    times_ms = []
    for _ in range(runs):
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        call()
        end.record()
        end.synchronize()
        times_ms.append(begin.elapsed_time(end))
    return times_ms


@torch.inference_mode()
def measure_all(rows: Sequence[Technique], runs: int) -> list[dict[str, object]]:
    """The table."""
    exact_float32()
    device = torch.device("cuda")
    inputs, state = draw_inputs(device), random_state()
    plain = Measured(techniques()[0], state, inputs)
    reference = plain.outputs()
    del plain
    common = {
        "measured": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "ceiling_tflops": ceiling_tflops(runs),
    }
    table = []
    for technique in rows:
        measured = Measured(technique, state, inputs)
        # Eager rows take seconds a run.
        row_runs = runs if technique.recorded else max(5, runs // 4)
        row = common | measure(technique, measured, reference, row_runs)
        table.append(row)
        sys.stdout.write(
            "  ".join(f"{name} {value}" for name, value in row.items() if name not in common) + "\n"
        )
        sys.stdout.flush()
        del measured
    return table


def main() -> None:
    """Measure, print, and append to the CSV file if --record is given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--only", nargs="+", help="names of rows")
    parser.add_argument("--record", action="store_true", help=f"append to {RESULTS.name}")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA GPU here: this table is about one")
    rows = [row for row in techniques() if not arguments.only or row.name in arguments.only]
    table = measure_all(rows, arguments.runs)
    if arguments.record:
        record(RESULTS, table)


if __name__ == "__main__":
    main()
