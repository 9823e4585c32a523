r"""Measure what a caller gets on a GPU: a picture and a prompt in, kept masks out; beside its peers.

    python -m benchmarks.segment --record
    python -m benchmarks.segment --peers transformers meta --record    # Meta's code: pip install sam3

Random weights of the full size, one 1920 x 1080 picture, one prompt, and a threshold between the fifth and
the sixth score, so that five masks are kept; they cover most of the picture, which is the worst case. Times
are by the wall clock, medians of --runs calls after warm-up. "predict" takes the picture, as the peers do: it
includes the resize on the CPU. "segment" takes the model's square, as the server's runner does. "compiled"
means torch.compile. The peak is the most GPU memory that PyTorch has reserved since the model began to load,
graphs included; CUDA's own context, 0.6 GiB on an H100, comes on top. "start" is a new process with an empty
and with a filled cache of kernels, until it can answer.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from benchmarks.parity import random_official_file, random_transformers_folder
from benchmarks.pictures import FIRST_SEED, Scene
from benchmarks.references import Official, Transformers
from benchmarks.table import record
from sam3_runner import SAM3Predictor
from sam3_runner.images.square import to_square
from sam3_runner.prompts import ConceptPrompt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.references import Model

RESULTS = Path(__file__).parent / "segment.csv"
PROMPT = "red circle"
KEPT = 5
IMAGES = 8
START = """
import sys, time
begin = time.monotonic()
from sam3_runner import SAM3Predictor
from PIL import Image
predictor = SAM3Predictor(sys.argv[1], "cuda")
predictor.load()
predictor.warm_up(1)
print(time.monotonic() - begin)
"""


def threshold_for(scores: list[float]) -> float:
    """Between the fifth and the sixth score."""
    best = sorted(scores, reverse=True)
    return (best[KEPT - 1] + best[KEPT]) / 2


def median_ms(call: Callable[[], object], runs: int) -> float:
    """Median time of a call by the wall clock."""
    for _ in range(3):
        call()
    times_ms = []
    for _ in range(runs):
        torch.cuda.synchronize()
        begin_s = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times_ms.append((time.perf_counter() - begin_s) * 1000)
    return round(statistics.median(times_ms), 2)


def measure_ours(folder: Path, picture: Image.Image, runs: int) -> list[dict[str, object]]:
    """Our rows."""
    torch.cuda.reset_peak_memory_stats()
    predictor = SAM3Predictor(str(folder), "cuda", score_threshold=0.0)
    predictor.load()
    predictor.warm_up(IMAGES)
    assert predictor.checkpoint is not None
    square = to_square(picture, predictor.checkpoint.input_side_px)
    begin_s = time.perf_counter()
    [[result]] = predictor.segment([(square, [ConceptPrompt(PROMPT)])])
    first_ms = round((time.perf_counter() - begin_s) * 1000, 2)
    predictor.score_threshold = threshold_for([instance.score for instance in result.instances])
    calls: dict[str, Callable[[], Any]] = {
        "segment, 1 image, 1 prompt": lambda: predictor.segment([(square, [ConceptPrompt(PROMPT)])]),
        "segment, 1 image, the prompt 10 times": lambda: predictor.segment(
            [(square, [ConceptPrompt(PROMPT)] * 10)]
        ),
        "segment, 8 images, 1 prompt each": lambda: predictor.segment(
            [(square, [ConceptPrompt(PROMPT)])] * IMAGES
        ),
        "predict": lambda: predictor.predict(picture, PROMPT),
    }
    rows = [_row("ours", predictor.dtype, "first, all masks kept", first_ms)]
    rows += [_row("ours", predictor.dtype, name, median_ms(call, runs)) for name, call in calls.items()]
    return rows


def _row(model: str, dtype: str, call: str, ms: float) -> dict[str, object]:
    """A row of the table, with the peak of the memory so far."""
    peak_gib = round(torch.cuda.max_memory_reserved() / 2**30, 2)
    return {"model": model, "dtype": dtype, "call": call, "ms": ms, "peak_gib": peak_gib}


def measure_starts(folder: Path) -> list[dict[str, object]]:
    """Time from a new process until it can answer: with an empty cache of kernels, then with a filled one."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache}
        return [
            {
                "model": "ours",
                "dtype": "float16",
                "call": f"start, {kind} cache",
                "ms": round(1000 * float(_output([sys.executable, "-c", START, str(folder)], environment))),
                "peak_gib": None,
            }
            for kind in ("empty", "filled")
        ]


def measure_peer(model: Model, picture: Image.Image, call: str, runs: int) -> dict[str, object]:
    """A row of a peer."""
    threshold = threshold_for(model.segment(picture, ConceptPrompt(PROMPT), 1.0).scores)
    ms = median_ms(lambda: model.segment(picture, ConceptPrompt(PROMPT), threshold), runs)
    return _row(model.name, model.dtype, call, ms)


def main() -> None:
    """Measure, print, and append to the CSV file if --record is given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--peers", nargs="+", choices=("transformers", "meta"), default=[])
    parser.add_argument("--record", action="store_true", help=f"append to {RESULTS.name}")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA GPU here: this table is about one")
    common: dict[str, object] = {
        "measured": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
    jpeg = io.BytesIO(Scene(FIRST_SEED).jpeg)
    picture = Image.open(jpeg).convert("RGB").resize((1920, 1080))
    with tempfile.TemporaryDirectory() as name:
        for row in _measure_all(Path(name), picture, arguments):
            sys.stdout.write("  ".join(f"{value}" for value in row.values()) + "\n")
            sys.stdout.flush()
            if arguments.record:
                record(RESULTS, [common | row])


def _measure_all(
    folder: Path, picture: Image.Image, arguments: argparse.Namespace
) -> Iterator[dict[str, object]]:
    random_transformers_folder(folder)
    yield from measure_ours(folder, picture, arguments.runs)
    torch.cuda.empty_cache()
    yield from measure_starts(folder)
    if "transformers" in arguments.peers:
        torch.cuda.reset_peak_memory_stats()
        transformers = Transformers(folder, "cuda", "bfloat16")
        yield measure_peer(transformers, picture, "predict", arguments.runs)
        transformers.model.compile()
        yield measure_peer(transformers, picture, "predict, compiled", arguments.runs)
        del transformers
        torch.compiler.reset()
    if "meta" in arguments.peers:
        file = random_official_file(folder)
        for call, compiled in (("predict", False), ("predict, compiled", True)):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            official = Official(file, "cuda", compile=compiled)
            model = official.variant(dtype="bfloat16", own_resize=True)
            yield measure_peer(model, picture, call, arguments.runs)
            del official, model


def _output(command: list[str], environment: dict[str, str]) -> str:
    return subprocess.run(  # noqa: S603 - our own command
        command, env=environment, check=True, capture_output=True, text=True
    ).stdout


if __name__ == "__main__":
    main()
