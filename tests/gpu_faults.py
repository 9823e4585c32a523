"""Provokes faults of a real GPU in the engine, and checks what it does; `python -m tests.gpu_faults`.

Needs a GPU that no other process uses. Each scenario runs in a process of its own and prints what it saw:

- precision: the demo runs in float16; rescaled so that it overflows, it answers as in float32.
- memory: CUDA refuses a batch of 8 for lack of memory. It is run in halves, the safe size is remembered, and
  a request that does not fit fails alone.
- assert, address: a device-side assert and an illegal address during a batch. The engine is not ready at
  once, the requests' tasks can be kept, and the process ends with status 1.
- idle: the same while no batch runs; the next look at the status notices it.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from prometheus_client import REGISTRY

from benchmarks.parity import random_transformers_folder
from processes.lifecycle import end_process_soon
from sam3_runner import InferenceFailed, ModelNotLoaded, RunnerStopped, SAM3Predictor
from sam3_runner.images.decoded import LocalImage
from sam3_runner.images.square import to_square
from sam3_runner.instances import packed_union
from sam3_runner.serving.engine import Engine, EngineConfig, SegmentOutcome, SegmentRequest
from tests.breaking import BREAKING_PROMPT, TOO_LARGE_PROMPT, BreakingPredictor, fail_assert
from tests.concepts import concepts
from tests.overflowing import MASK_CONVOLUTION, VISION_VALUES, overflowing_folder

if TYPE_CHECKING:
    from collections.abc import Callable

BATCH = 8
LOAD_TIMEOUT_S = 300.0
END_TIMEOUT_S = 30.0
MAX_ERROR = 0.01
"""Of presence, between passes of different sizes: other kernels round differently."""
MIN_IOU = 0.97
SAMPLE = Path(__file__).parent.parent / "examples" / "sample.jpg"
SAMPLE_PROMPT = "triangles"
SEEN = "all of it was seen"
ILLEGAL_WRITE = 'extern "C" __global__ void write_far(float* data) { data[1ull << 40] = 1.0f; }'


def report(line: str) -> None:
    """Print a line at once: the process may end without a flush."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def write_far() -> None:
    """A write to an address that is not mapped: cudaErrorIllegalAddress."""
    kernel = torch.cuda._compile_kernel(ILLEGAL_WRITE, "write_far")
    kernel((1, 1, 1), (1, 1, 1), (torch.zeros(1, device="cuda"),))


def load(weights: str, make_predictor: Callable[..., SAM3Predictor] = SAM3Predictor) -> Engine:
    """An engine that is ready."""
    engine = Engine(EngineConfig(weights, "cuda", max_batch=BATCH), make_predictor)
    engine.start(on_device_lost=end_process_soon)
    limit_s = time.monotonic() + LOAD_TIMEOUT_S
    while engine.status().state == "loading":
        assert time.monotonic() < limit_s, engine.status().detail
        time.sleep(0.1)
    assert engine.ready, engine.status().detail
    return engine


def request(*prompts: str, side_px: int, seed: int = 0) -> SegmentRequest:
    """A request with a noisy picture."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)
    return SegmentRequest(LocalImage(pixels, 640, 480), concepts(*prompts), time.monotonic() + 600)


def batch_of(size: int, side_px: int) -> list[SegmentRequest]:
    """Requests with different pictures and prompts."""
    return [request(f"thing {seed}", side_px=side_px, seed=seed) for seed in range(size)]


def side_px_of(engine: Engine) -> int:
    """The side of the model's square."""
    side_px = engine.status().input_side_px
    assert side_px is not None
    return side_px


def presences(outcomes: list[SegmentOutcome]) -> list[float]:
    """Of every prompt; all requests must have succeeded."""
    assert not any(outcome.error for outcome in outcomes), outcomes
    return [result.presence for outcome in outcomes for result in outcome.results or []]


def count(name: str) -> int:
    return int(REGISTRY.get_sample_value(name) or 0)


def check_memory(weights: str) -> None:
    """CUDA has no memory for more than half a batch, and none for one request."""
    BreakingPredictor.room = BATCH // 2
    engine = load(weights, BreakingPredictor)
    side_px = side_px_of(engine)
    batch = batch_of(BATCH, side_px)
    expected = [presences(engine.segment([each]))[0] for each in batch]
    for failing in (1, 0):  # the safe size is remembered
        passes, fallbacks = count("sam3_batch_seconds_count"), count("sam3_batch_fallbacks_total")
        error = largest_difference(presences(engine.segment(batch)), expected)
        made = count("sam3_batch_seconds_count") - passes
        failed = count("sam3_batch_fallbacks_total") - fallbacks
        report(f"{BATCH} requests: {failed} passes fail, {made} succeed; presence differs by {error:.1e}")
        assert (failed, made) == (failing, 2)
        assert error < MAX_ERROR
    good, large, other = engine.segment([batch[0], request(TOO_LARGE_PROMPT, side_px=side_px), batch[1]])
    presences([good, other])
    report(f"a request that does not fit: {large.error!r}; the two beside it succeed")
    assert isinstance(large.error, InferenceFailed)
    assert engine.ready
    report(SEEN)


def check_precision(_weights: str) -> None:
    """The demo's weights as they are, and rescaled: what overflows is answered in bfloat16."""
    image = to_square(Image.open(SAMPLE), 336)
    exact = SAM3Predictor("demo", "cuda", dtype="float32")
    exact.load()
    [[expected]] = exact.segment([(image, concepts(SAMPLE_PROMPT))])
    with tempfile.TemporaryDirectory() as folder:
        always, sometimes = Path(folder) / "always", Path(folder) / "sometimes"
        overflowing_folder(always, VISION_VALUES, 20)
        overflowing_folder(sometimes, MASK_CONVOLUTION, 10.5)
        for weights, dtype, fallbacks in (
            ("demo", "float16", 0),
            (always, "bfloat16", 0),
            (sometimes, "float16", 1),
        ):
            engine = load(str(weights))
            before = count("sam3_precision_fallbacks_total")
            [outcome] = engine.segment(
                [SegmentRequest(image, concepts(SAMPLE_PROMPT), time.monotonic() + 600)]
            )
            [found] = outcome.results or []
            made = count("sam3_precision_fallbacks_total") - before
            mask = np.unpackbits(packed_union([found]), axis=1, count=found.image_width)
            expected_mask = expected.mask_array()
            iou = (mask & expected_mask).sum() / (mask | expected_mask).sum()
            served = engine.status().dtype
            report(f"{Path(weights).name}: {served}, {made} requests run again, IoU with float32 {iou:.4f}")
            assert (served, made) == (dtype, fallbacks)
            assert iou > MIN_IOU
    report(SEEN)


def check_lost(weights: str, break_device: Callable[[], None]) -> None:
    """A pass that breaks the device. Does not return, since the process ends."""
    BreakingPredictor.break_device = staticmethod(break_device)
    engine = load(weights, BreakingPredictor)
    side_px = side_px_of(engine)
    presences(engine.segment(batch_of(2, side_px)))
    outcomes = engine.segment([request("cat", side_px=side_px), request(BREAKING_PROMPT, side_px=side_px)])
    report(f"the requests of the batch: {[outcome.error for outcome in outcomes]}")
    assert [type(outcome.error) for outcome in outcomes] == [RunnerStopped] * 2
    check_ends(engine, side_px)


def check_idle(weights: str) -> None:
    """A device that breaks between two batches. Does not return, since the process ends."""
    engine = load(weights)
    side_px = side_px_of(engine)
    fail_assert()
    limit_s = time.monotonic() + END_TIMEOUT_S
    while engine.status().state == "ok":
        assert time.monotonic() < limit_s, "the status stays ok"
    check_ends(engine, side_px)


def check_ends(engine: Engine, side_px: int) -> None:
    """The engine is not ready, refuses requests so that their tasks are kept, and its process ends."""
    status = engine.status()
    report(f"ready: {engine.ready}, status: {status.state}, {status.detail}")
    assert not engine.ready
    assert status.state == "error"
    [later] = engine.segment([request("cat", side_px=side_px)])
    report(f"the next request: {later.error!r}")
    assert isinstance(later.error, ModelNotLoaded)
    report(SEEN)
    time.sleep(END_TIMEOUT_S)


def largest_difference(ones: list[float], others: list[float]) -> float:
    """Between the values at the same places."""
    return max(abs(one - other) for one, other in zip(ones, others, strict=True))


SCENARIOS: dict[str, tuple[Callable[[str], None], int]] = {
    "precision": (check_precision, 0),
    "memory": (check_memory, 0),
    "assert": (lambda weights: check_lost(weights, fail_assert), 1),
    "address": (lambda weights: check_lost(weights, write_far), 1),
    "idle": (check_idle, 1),
}
"""Each with the exit status of its process."""


def main() -> int:
    """Run all scenarios, or one in this process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", default="demo", help="demo, random (full size), or as SAM3_WEIGHTS_PATH")
    parser.add_argument("--scenario", choices=SCENARIOS, help="run this one in this process; default: all")
    arguments = parser.parse_args()
    if arguments.scenario:
        logging.basicConfig(
            level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stdout
        )
        SCENARIOS[arguments.scenario][0](arguments.weights)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        weights = arguments.weights
        if weights == "random":
            weights = str(random_transformers_folder(Path(folder)))
        report(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
        failed = [name for name in SCENARIOS if not passes(name, weights)]
    report(f"failed: {failed or 'none'}")
    return 1 if failed else 0


def passes(scenario: str, weights: str) -> bool:
    """Whether a process of the scenario saw all, and ended with the right status."""
    report(f"\n== {scenario}")
    command = [sys.executable, "-u", "-m", "tests.gpu_faults", "--scenario", scenario, "--weights", weights]
    ended = subprocess.run(command, text=True, stdout=subprocess.PIPE, check=False)
    report(f"{ended.stdout}-> exit status {ended.returncode}")
    return SEEN in ended.stdout and ended.returncode == SCENARIOS[scenario][1]


if __name__ == "__main__":
    sys.exit(main())
