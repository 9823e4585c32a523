r"""Compare our model's answers with a reference's, on the same weights and images.

Compares the kept queries one by one: mask IoU, score error, box error, and queries that only one side kept.

    python -m benchmarks.parity --reference transformers                     # demo checkpoint, any machine
    python -m benchmarks.parity --reference official --weights random        # full size; needs a GPU and sam3
    python -m benchmarks.parity --reference official --weights weights/sam3.pt \
        --images a.jpg b.jpg --prompts "person" "red car"                     # if you have the weights

--record appends the rows to benchmarks/parity.csv. The exit status is 1 when a target is missed. Targets for
fp32 against fp32: mask IoU >= 0.999 on every kept mask, score error <= 1e-3, and the same kept set. Targets
for half precision against fp32: mean IoU >= 0.99 and mean score error <= 1e-2. The scores of random weights
have no meaning, so 0.5 is no useful threshold for them. For each pair it is then the middle of the widest gap
in the middle half of the reference's scores.
"""

from __future__ import annotations

import argparse
import io
import platform
import sys
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm

from benchmarks.pictures import EVERY_PROMPT, FIRST_SEED, Scene
from benchmarks.references import Official, Ours, Transformers, exact_float32
from benchmarks.table import processor, record
from sam3_runner import SAM3Error, WeightsError
from sam3_runner.instances import SCORE_THRESHOLD
from sam3_runner.prompts import ConceptPrompt
from sam3_runner.weights.checkpoint import CLIP_TOKENIZER_FILE, find_checkpoint

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

    from benchmarks.references import Kept, Model

RESULTS = Path(__file__).parent / "parity.csv"
RANDOM_SEED = 0


@dataclass(frozen=True, slots=True)
class Question:
    """One image and its prompts."""

    image: Image.Image
    prompts: list[ConceptPrompt]


EXEMPLARS = (((0.1, 0.2, 0.35, 0.5), True), ((0.5, 0.4, 0.9, 1.0), True), ((0.6, 0.0, 0.7, 0.2), False))
"""Boxes of --boxes in shares of the image, and their labels; a prompt gets the first, then all, in turn."""


@dataclass(slots=True)
class Parity:
    """Sums over (image, prompt) pairs of one comparison."""

    pairs: int = 0
    only_ours: int = 0
    only_reference: int = 0
    mask_ious: list[float] = field(default_factory=list)
    score_errors: list[float] = field(default_factory=list)
    box_errors_px: list[float] = field(default_factory=list)

    def add(self, reference: dict[int, Kept], ours: dict[int, Kept]) -> None:
        """Compare the kept queries of one pair, matched by their number."""
        self.pairs += 1
        self.only_reference += len(reference.keys() - ours.keys())
        self.only_ours += len(ours.keys() - reference.keys())
        for query in reference.keys() & ours.keys():
            left, right = reference[query], ours[query]
            self.mask_ious.append(_iou(left.mask, right.mask))
            self.score_errors.append(abs(left.score - right.score))
            self.box_errors_px.append(max(abs(a - b) for a, b in zip(left.box, right.box, strict=True)))

    def figures(self) -> dict[str, object]:
        """The columns of the table."""
        return {
            "pairs": self.pairs,
            "kept_by_both": len(self.mask_ious),
            "only_reference": self.only_reference,
            "only_ours": self.only_ours,
            "mask_iou_mean": round(float(np.mean(self.mask_ious)), 6) if self.mask_ious else "",
            "mask_iou_min": round(min(self.mask_ious), 6) if self.mask_ious else "",
            "score_error_mean": float(f"{np.mean(self.score_errors or [0.0]):.3g}"),
            "score_error_max": float(f"{max(self.score_errors, default=0.0):.3g}"),
            "box_error_max_px": float(f"{max(self.box_errors_px, default=0.0):.3g}"),
        }

    def missed(self, *, exact: bool) -> list[str]:
        """List the missed targets; `exact` uses those of fp32 against fp32."""
        if not self.mask_ious:
            return ["no query was kept: choose other images or prompts, or another --threshold"]
        mask_iou = min(self.mask_ious) if exact else np.mean(self.mask_ious)
        score_error = max(self.score_errors) if exact else np.mean(self.score_errors)
        min_iou, max_error = (0.999, 1e-3) if exact else (0.99, 1e-2)
        missed = []
        if mask_iou < min_iou:
            missed.append(f"mask IoU {mask_iou:.4f} < {min_iou}")
        if score_error > max_error:
            missed.append(f"score error {score_error:.2g} > {max_error}")
        if exact and self.only_reference + self.only_ours:
            missed.append(f"{self.only_reference + self.only_ours} queries kept by one side only")
        return missed


def widest_gap(scores: list[float]) -> float:
    """A threshold near the middle of `scores`, as far from its neighbours as possible."""
    middle = sorted(scores)[len(scores) // 4 : -(len(scores) // 4)]
    gap = int(np.diff(middle).argmax())
    return (middle[gap] + middle[gap + 1]) / 2


def compare(
    reference: Model, ours: Model, questions: list[Question], threshold: float | None
) -> tuple[Parity, list[float]]:
    """Compare all pairs; returns the sums and each pair's threshold. `threshold` None: see `widest_gap`."""
    parity, thresholds = Parity(), []
    title = f"{reference.name} {reference.dtype} / {ours.name} {ours.dtype}"
    pairs = [(question.image, prompt) for question in questions for prompt in question.prompts]
    for image, prompt in tqdm(pairs, desc=title, disable=None):
        # At 1 no query is kept, so no mask is computed; only the scores are needed.
        limit = widest_gap(reference.segment(image, prompt, 1.0).scores) if threshold is None else threshold
        answers = [model.segment(image, prompt, limit).kept for model in (reference, ours)]
        parity.add(*answers)
        thresholds.append(round(limit, 6))
    return parity, thresholds


def _iou(one: npt.NDArray[np.bool_], other: npt.NDArray[np.bool_]) -> float:
    union = int((one | other).sum())
    return int((one & other).sum()) / union if union else 1.0


def main() -> int:
    """Compare, print, and append to the CSV file if --record is given."""
    arguments = _parse()
    try:
        questions = _questions(arguments)
        with tempfile.TemporaryDirectory() as folder:
            rows = _compare_all(arguments, questions, Path(folder))
    except (SAM3Error, OSError) as error:
        sys.exit(f"cannot compare: {error}")
    except ModuleNotFoundError as error:
        sys.exit(f"cannot compare: {error.name} is not installed (docs/weights.md says what to install)")
    _print(rows)
    if arguments.record:
        record(RESULTS, rows)
    return int(any(row["missed"] for row in rows))


def _compare_all(
    arguments: argparse.Namespace, questions: list[Question], folder: Path
) -> list[dict[str, object]]:
    exact_float32()
    weights = arguments.weights
    if weights == "random":
        weights = str(_random_weights(arguments.reference, arguments.device, folder))
    threshold = arguments.threshold
    if threshold is None and arguments.weights != "random":
        threshold = SCORE_THRESHOLD
    common = {
        "measured": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else processor(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "weights": arguments.weights if arguments.weights in {"random", "demo"} else Path(weights).name,
    }
    rows = []
    loaded: dict[str, Model] = {dtype: Ours(weights, arguments.device, dtype) for dtype in arguments.dtypes}
    for reference in _references(arguments, weights):
        for dtype, ours in loaded.items():
            parity, thresholds = compare(reference, ours, questions, threshold)
            missed = parity.missed(exact=reference.dtype == dtype == "float32")
            rows.append(
                common
                | {
                    "reference": f"{reference.name} {reference.dtype}",
                    "ours": dtype,
                    "resize": "its own" if getattr(reference, "own_resize", False) else "ours",
                    "boxes": arguments.boxes,
                    "images": len(questions),
                    "threshold": f"{min(thresholds)}..{max(thresholds)}",
                }
                | parity.figures()
                | {"missed": "; ".join(missed)}
            )
    return rows


def _references(arguments: argparse.Namespace, weights: str) -> list[Model]:
    """The references in fp32; Meta's also with its own resize, and in bf16 as Meta runs it."""
    if arguments.reference == "transformers":
        folder = find_checkpoint(weights).weights_file.parent
        return [Transformers(folder, arguments.device, "float32")]
    path = Path(weights)
    if weights == "demo" or path.suffix != ".pt":
        raise WeightsError("Meta's code reads sam3.pt: pass its path as --weights, or use --weights random")
    exact = Official(path, arguments.device)
    resizing, mixed = (exact.variant(own_resize=True), exact.variant(dtype="bfloat16"))
    return [exact, resizing, mixed]


def _random_weights(reference: str, device: str, folder: Path) -> Path:
    """Write random weights at full size, in the format of the reference's checkpoints."""
    return (
        random_transformers_folder(folder)
        if reference == "transformers"
        else random_official_file(folder, device)
    )


def random_official_file(folder: Path, device: str = "cuda") -> Path:
    """Write a `sam3.pt` with random weights to `folder`."""
    state = randomise(Official(None, device).model.state_dict())
    path = folder / "sam3.pt"
    torch.save({"model": {f"detector.{name}": tensor for name, tensor in state.items()}}, path)
    return path


def random_transformers_folder(folder: Path) -> Path:
    """Write a `Sam3Model` of the official size with random weights to `folder`."""
    from transformers.models.sam3.configuration_sam3 import Sam3Config  # noqa: PLC0415 - slow to import
    from transformers.models.sam3.modeling_sam3 import Sam3Model  # noqa: PLC0415

    with torch.device("meta"):
        model: Any = Sam3Model(Sam3Config())
    model.config.save_pretrained(folder)
    save_file(randomise(model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.json").write_bytes(CLIP_TOKENIZER_FILE.read_bytes())
    return folder


def randomise(state: dict[str, Tensor], seed: int = RANDOM_SEED) -> dict[str, Tensor]:
    """Draw random values for every tensor, on the CPU, at scales that keep activations in range.

    The official model does not initialise some of its tensors (`torch.empty`).
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name, tensor in state.items():
        if tensor.is_complex():  # a computed table, not a weight
            continue
        normal = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim > 1:
            drawn[name] = normal / (tensor.numel() / len(tensor)) ** 0.5
        else:
            drawn[name] = normal * 0.1 + (1.0 if name.endswith("weight") else 0.0)
    return drawn


def _questions(arguments: argparse.Namespace) -> list[Question]:
    if arguments.images:
        pictures = [Image.open(path).convert("RGB") for path in arguments.images]
        texts = [arguments.prompts or EVERY_PROMPT[:4]] * len(pictures)
    else:
        scenes = [Scene(seed) for seed in range(FIRST_SEED, FIRST_SEED + arguments.scenes)]
        pictures = [Image.open(io.BytesIO(scene.jpeg)).convert("RGB") for scene in scenes]
        texts = [arguments.prompts or scene.ten_prompts[:4] for scene in scenes]
    return [
        Question(picture, _prompts(picture, of_picture, arguments.boxes))
        for picture, of_picture in zip(pictures, texts, strict=True)
    ]


def _prompts(picture: Image.Image, texts: list[str], boxes: str) -> list[ConceptPrompt]:
    """Prompts of text, of text and boxes, or of boxes alone."""
    if boxes == "none":
        return [ConceptPrompt(text) for text in texts]
    prompts = []
    for number, text in enumerate(texts):
        used = EXEMPLARS[: 1 if number % 2 == 0 else None]
        sides = [
            (x0 * picture.width, y0 * picture.height, x1 * picture.width, y1 * picture.height)
            for (x0, y0, x1, y1), _ in used
        ]
        labels = tuple(label for _, label in used)
        prompts.append(ConceptPrompt(None if boxes == "alone" else text, tuple(sides), labels))
    return prompts if boxes == "with text" else prompts[:2]


def _print(rows: list[dict[str, object]]) -> None:
    for row in rows:
        sys.stdout.write(
            f"ours {row['ours']} / {row['reference']}, resize {row['resize']}: "
            f"{row['kept_by_both']} kept by both, {row['only_reference']} + {row['only_ours']} by one; "
            f"mask IoU mean {row['mask_iou_mean']} min {row['mask_iou_min']}, "
            f"score error mean {row['score_error_mean']} max {row['score_error_max']}, "
            f"box error {row['box_error_max_px']} px: "
            f"{'MISSED ' + str(row['missed']) if row['missed'] else 'met'}\n"
        )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference", choices=("official", "transformers"), required=True)
    parser.add_argument("--weights", default="demo", help="demo, random, or as SAM3_WEIGHTS_PATH")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=("float32", "float16", "bfloat16"),
        default=["float32", "float16", "bfloat16"],
    )
    parser.add_argument("--images", nargs="+", type=Path, help="files; default: drawn scenes")
    parser.add_argument("--scenes", type=int, default=4, help="drawn scenes of 1280 x 720")
    parser.add_argument("--prompts", nargs="+", help="default: what the drawn scenes show")
    parser.add_argument(
        "--boxes",
        choices=("none", "with text", "alone"),
        default="none",
        help="exemplars beside each text, or in its place",
    )
    parser.add_argument("--threshold", type=float, help="default: 0.5; random weights: see above")
    parser.add_argument("--record", action="store_true", help=f"append to {RESULTS.name}")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
