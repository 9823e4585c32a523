"""The engine: exactly one outcome per request."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from prometheus_client import REGISTRY

from sam3_runner import DeadlineExceeded, InferenceFailed, ModelNotLoaded, PromptTooLong
from sam3_runner.images.square import SquareImage
from sam3_runner.serving.engine import Engine, EngineConfig, EngineStatus, SegmentRequest
from tests.cgroups import cpu_quota
from tests.edge import wait_for

if TYPE_CHECKING:
    from sam3_runner.weights.checkpoint import Checkpoint

ROOT = Path(__file__).parents[3]
SIDE_PX = 112


def loaded(folder: Path) -> Engine:
    """An engine that has finished loading, with or without success."""
    engine = Engine(EngineConfig(str(folder), "cpu", cpu_threads=1, max_batch=4))
    engine.start()
    wait_for(engine.status, lambda status: status.state != "loading")
    return engine


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Checkpoint) -> Engine:
    return loaded(tiny_checkpoint.weights_file.parent)


def request(*prompts: str, level: int = 0, side_px: int = SIDE_PX, seconds: float = 60.0) -> SegmentRequest:
    pixels = np.full((side_px, side_px, 3), level, dtype=np.uint8)
    image = SquareImage(pixels, width=30, height=20)
    return SegmentRequest(image, list(prompts), deadline_s=time.monotonic() + seconds)


def passes() -> float:
    """Number of model passes in the metrics."""
    return REGISTRY.get_sample_value("sam3_batch_seconds_count") or 0.0


def test_outcomes_are_in_order(engine: Engine) -> None:
    """Each request gets the results of its own prompts, from one shared pass."""
    before = passes()
    outcomes = engine.segment([request("cat"), request("dog", "ring", level=200), request("cat")])
    assert [[result.prompt for result in outcome.results or []] for outcome in outcomes] == [
        ["cat"],
        ["dog", "ring"],
        ["cat"],
    ]
    assert all(outcome.error is None and outcome.inference_ms > 0 for outcome in outcomes)
    assert len({outcome.inference_ms for outcome in outcomes}) == 1
    assert passes() == before + 1


def test_only_the_faulty_request_fails(engine: Engine) -> None:
    """An image of a wrong size gives InferenceFailed; the other requests succeed; the fallback is counted."""
    before = REGISTRY.get_sample_value("sam3_batch_fallbacks_total") or 0
    good, bad, other = engine.segment([request("cat"), request("cat", side_px=70), request("dog")])
    assert isinstance(bad.error, InferenceFailed)
    assert bad.results is None
    for outcome in (good, other):
        assert outcome.error is None
        assert outcome.results
    assert REGISTRY.get_sample_value("sam3_batch_fallbacks_total") == before + 1


def test_prompt_too_long_is_reported(engine: Engine) -> None:
    """A prompt of too many tokens gives PromptTooLong for its own request only."""
    long, good = engine.segment([request("cat " * 40), request("cat")])
    assert isinstance(long.error, PromptTooLong)
    assert good.results


def test_all_requests_faulty(engine: Engine) -> None:
    """A batch of faulty requests gives an error for each, and the engine still works."""
    outcomes = engine.segment([request("cat", side_px=50), request("cat", side_px=60)])
    assert [type(outcome.error) for outcome in outcomes] == [InferenceFailed] * 2
    assert engine.segment([request("cat")])[0].results


def test_expired_requests_are_not_run(engine: Engine) -> None:
    """A request whose deadline passed before the batch is not run."""
    before = passes()
    [expired] = engine.segment([request("cat", seconds=-1)])
    assert isinstance(expired.error, DeadlineExceeded)
    assert passes() == before
    expired, good = engine.segment([request("cat", seconds=-1), request("dog")])
    assert isinstance(expired.error, DeadlineExceeded)
    assert good.results
    assert good.results[0].prompt == "dog"


def test_no_requests(engine: Engine) -> None:
    """No requests give no outcomes."""
    assert engine.segment([]) == []


def test_not_started(tiny_checkpoint: Checkpoint) -> None:
    """Before its weights are loaded, an engine answers every request with ModelNotLoaded."""
    unstarted = Engine(EngineConfig(str(tiny_checkpoint.weights_file.parent), "cpu"))
    assert not unstarted.ready
    assert unstarted.status() == EngineStatus(state="loading", detail="the model is loading")
    outcomes = unstarted.segment([request("cat"), request("dog")])
    assert [type(outcome.error) for outcome in outcomes] == [ModelNotLoaded] * 2


def test_broken_weights(broken_checkpoint: Path) -> None:
    """An engine that failed to load reports why in its status and in every outcome, and is not ready."""
    (broken_checkpoint / "model.safetensors").write_bytes(b"truncated")
    broken = loaded(broken_checkpoint)
    status = broken.status()
    assert status.state == "error"
    assert status.detail is not None
    assert "model.safetensors" in status.detail
    assert not broken.ready
    [outcome] = broken.segment([request("cat")])
    assert isinstance(outcome.error, ModelNotLoaded)
    assert str(outcome.error) == status.detail


def test_status_describes_the_model(engine: Engine, tiny_checkpoint: Checkpoint) -> None:
    """A ready engine reports its checkpoint and number of parameters, and no GPU memory on a CPU."""
    assert engine.ready
    status = engine.status()
    assert (status.state, status.detail, status.demo) == ("ok", None, False)
    assert status.checkpoint == tiny_checkpoint.name
    assert status.weights_bytes == tiny_checkpoint.weights_file.stat().st_size
    assert status.parameters is not None
    assert 2 * status.parameters == pytest.approx(status.weights_bytes, rel=0.02)
    assert (status.input_side_px, status.device, status.dtype) == (SIDE_PX, "cpu", "float32")
    assert (status.gpu_name, status.vram_used_bytes, status.vram_total_bytes) == (None, None, None)


THREADS = """
import sys, time, torch
from sam3_runner.serving.engine import Engine, EngineConfig
engine = Engine(EngineConfig("demo", "cpu"))
engine.start()
while engine.status().state == "loading":
    time.sleep(0.1)
print(engine.status().state, torch.get_num_threads())
"""


def test_threads_follow_the_quota() -> None:
    """The number of torch's threads follows the CPU quota, which torch itself does not read."""
    with cpu_quota(0.75):
        ended = subprocess.run(
            [sys.executable, "-c", THREADS], cwd=ROOT, check=True, capture_output=True, text=True
        )
    assert ended.stdout.split() == ["ok", "1"]
