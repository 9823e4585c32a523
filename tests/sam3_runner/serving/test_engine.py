"""The engine: exactly one outcome per request."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from prometheus_client import REGISTRY

from sam3_runner import (
    DeadlineExceeded,
    FeaturesNotHeld,
    InferenceFailed,
    ModelNotLoaded,
    PromptTooLong,
    RunnerStopped,
    SAM3Predictor,
)
from sam3_runner.images.decoded import DecodedImage, LocalImage
from sam3_runner.serving.engine import (
    DEVICE_LOST,
    Engine,
    EngineConfig,
    EngineStatus,
    SegmentOutcome,
    SegmentRequest,
)
from tests.breaking import BREAKING_PROMPT, TOO_LARGE_PROMPT, BreakingPredictor
from tests.cgroups import cpu_quota
from tests.concepts import concepts
from tests.edge import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from sam3_runner.weights.checkpoint import Checkpoint

ROOT = Path(__file__).parents[3]
SIDE_PX = 112


def loaded(
    folder: Path,
    make_predictor: type[SAM3Predictor] | None = None,
    on_device_lost: Callable[[], None] | None = None,
) -> Engine:
    """An engine that has finished loading, with or without success."""
    engine = Engine(EngineConfig(str(folder), "cpu", cpu_threads=1, max_batch=4), make_predictor)
    engine.start(on_device_lost=on_device_lost)
    wait_for(engine.status, lambda status: status.state != "loading")
    return engine


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Checkpoint) -> Engine:
    return loaded(tiny_checkpoint.weights_file.parent)


def request(*prompts: str, level: int = 0, seconds: float = 60.0) -> SegmentRequest:
    pixels = np.full((SIDE_PX, SIDE_PX, 3), level, dtype=np.uint8)
    image = LocalImage(pixels, width=30, height=20)
    return SegmentRequest(image, concepts(*prompts), deadline_s=time.monotonic() + seconds)


def faulty() -> SegmentRequest:
    """A request that fails its pass: its prompt has too many tokens."""
    return request("cat " * 40)


def without_pixels(key: str) -> SegmentRequest:
    image = DecodedImage(None, width=30, height=20, key=key)
    return SegmentRequest(image, concepts("cat"), deadline_s=time.monotonic() + 60)


def passes() -> float:
    """Number of model passes in the metrics."""
    return REGISTRY.get_sample_value("sam3_batch_seconds_count") or 0.0


def fallbacks() -> float:
    """Number of batches that failed and were run again in parts."""
    return REGISTRY.get_sample_value("sam3_batch_fallbacks_total") or 0.0


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
    assert {name for outcome in outcomes for name, seconds in outcome.stages_s.items() if seconds > 0} == {
        *("queue", "encode_image", "encode_text", "decode_prompts", "draw_masks"),
    }
    assert passes() == before + 1


def test_only_the_faulty_request_fails(engine: Engine) -> None:
    """A prompt of too many tokens gives PromptTooLong; the others succeed; the fallback is counted."""
    before = fallbacks()
    good, bad, other = engine.segment([request("cat"), faulty(), request("dog")])
    assert isinstance(bad.error, PromptTooLong)
    assert bad.results is None
    for outcome in (good, other):
        assert outcome.error is None
        assert outcome.results
    assert fallbacks() == before + 1


def test_features_that_are_not_held_do_not_break_the_batch(engine: Engine) -> None:
    """A request without pixels gets FeaturesNotHeld; the others still share one pass."""
    before = fallbacks(), passes()
    good, missing, other = engine.segment([request("cat"), without_pixels("unknown"), request("dog")])
    assert isinstance(missing.error, FeaturesNotHeld)
    assert good.results
    assert other.results
    assert (fallbacks(), passes()) == (before[0], before[1] + 1)


def test_all_requests_faulty(engine: Engine) -> None:
    """A batch of faulty requests gives an error for each, and the engine still works."""
    outcomes = engine.segment([faulty(), faulty()])
    assert [type(outcome.error) for outcome in outcomes] == [PromptTooLong] * 2
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


class Paused(SAM3Predictor):
    """Its load reports a step, as it does on a GPU, and waits there."""

    go_on = threading.Event()

    def load(self, report: Callable[[str], None] = lambda _: None) -> None:
        report("the model's passes are being recorded")
        assert self.go_on.wait(60)
        super().load(report)


def test_progress_is_reported(tiny_checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture) -> None:
    """While the model loads, the status has the step that it is at; the log has each step and the end."""
    config = EngineConfig(str(tiny_checkpoint.weights_file.parent), "cpu", cpu_threads=1, max_batch=4)
    engine = Engine(config, Paused)
    with caplog.at_level(logging.INFO, "sam3_runner"):
        engine.start()
        step = EngineStatus(state="loading", detail="the model's passes are being recorded")
        wait_for(engine.status, lambda status: status.detail != "the model is loading")
        assert engine.status() == step
        [outcome] = engine.segment([request("cat")])
        assert str(outcome.error) == step.detail
        Paused.go_on.set()
        wait_for(engine.status, lambda status: status.state == "ok")
        wait_for(lambda: caplog.messages[-1], lambda message: "is ready" in message)
    *steps, ready = caplog.messages
    assert steps == ["the model is loading", step.detail, "the model is warming up"]
    assert re.fullmatch(
        rf"checkpoint {tiny_checkpoint.name} \(transformers layout, sha256 [0-9a-f]{{64}}\) is ready on cpu "
        r"in float32 after \d+\.\d s",
        ready,
    )


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


# Out of memory.


class RoomForTwo(BreakingPredictor):
    room = 2


@pytest.fixture
def narrow(tiny_checkpoint: Checkpoint) -> Engine:
    """An engine for batches of 4 whose memory has room for 2 images."""
    return loaded(tiny_checkpoint.weights_file.parent, RoomForTwo)


def prompts_of(outcomes: list[SegmentOutcome]) -> list[str]:
    """The prompts of the results, in their order; every request must have succeeded."""
    return [result.prompt for outcome in outcomes for result in outcome.results or [] if not outcome.error]


def test_batch_that_does_not_fit_is_halved(narrow: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """All requests succeed, in halves; from then on batches are cut before they fail; it is logged once."""
    texts = ["cat", "dog", "ring", "star"]
    passes_before, fallbacks_before = passes(), fallbacks()
    with caplog.at_level(logging.WARNING, "sam3_runner"):
        assert prompts_of(narrow.segment([request(text) for text in texts])) == texts
        assert (passes(), fallbacks()) == (passes_before + 2, fallbacks_before + 1)
        assert prompts_of(narrow.segment([request(text) for text in reversed(texts)])) == texts[::-1]
    assert (passes(), fallbacks()) == (passes_before + 4, fallbacks_before + 1)
    [advice] = [record.getMessage() for record in caplog.records if "SAM3_MAX_BATCH" in record.getMessage()]
    assert advice == (
        "a batch of 4 does not fit in the memory of cpu: batches of 2 for 300 s; set SAM3_MAX_BATCH=2, or "
        "free the memory"
    )


def test_request_that_does_not_fit_fails_alone(narrow: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """The other requests succeed; it is logged with the request's ids; the engine stays ready."""
    large = SegmentRequest(
        request().image,
        concepts(TOO_LARGE_PROMPT),
        time.monotonic() + 60,
        log_ids={"request_id": "request-17"},
    )
    with caplog.at_level(logging.ERROR, "sam3_runner"):
        *others, failed = narrow.segment([request("cat"), request("dog"), request("ring"), large])
    assert prompts_of(others) == ["cat", "dog", "ring"]
    assert isinstance(failed.error, InferenceFailed)
    assert "does not fit in the memory" in str(failed.error)
    [record] = caplog.records
    assert vars(record)["request_id"] == "request-17"
    assert narrow.ready


def test_large_request_does_not_reduce_the_batches(tiny_checkpoint: Checkpoint) -> None:
    """That one request does not fit says nothing of others: later batches are not cut."""
    engine = loaded(tiny_checkpoint.weights_file.parent, BreakingPredictor)
    texts = ["cat", "dog", "ring"]
    engine.segment([request(texts[0]), request(TOO_LARGE_PROMPT), request(texts[1])])
    before = passes()
    assert prompts_of(engine.segment([request(text) for text in texts])) == texts
    assert passes() == before + 1


# A device that no longer works.


def test_lost_device(tiny_checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture) -> None:
    """The batch's requests get RunnerStopped, all later ones ModelNotLoaded; the engine is not ready."""
    ends: list[str] = []
    engine = loaded(tiny_checkpoint.weights_file.parent, BreakingPredictor, lambda: ends.append("end"))
    caplog.clear()
    with caplog.at_level(logging.CRITICAL, "sam3_runner"):
        outcomes = engine.segment([request("cat"), request(BREAKING_PROMPT)])
    assert [type(outcome.error) for outcome in outcomes] == [RunnerStopped] * 2
    assert not engine.ready
    assert engine.status() == EngineStatus(state="error", detail=DEVICE_LOST)
    [later] = engine.segment([request("cat")])
    assert isinstance(later.error, ModelNotLoaded)
    assert ends == ["end"]
    [record] = [record for record in caplog.records if record.levelno == logging.CRITICAL]
    assert record.getMessage() == (
        "cpu has failed in this process: CUDA error: an illegal memory access was encountered"
    )


def test_requests_after_the_loss_are_not_suspects(tiny_checkpoint: Checkpoint) -> None:
    """Of a batch that runs in parts, those after the loss are not run: they cannot be its cause."""
    engine = loaded(tiny_checkpoint.weights_file.parent, RoomForTwo)
    outcomes = engine.segment([request("cat"), request(BREAKING_PROMPT), request("dog"), request("ring")])
    assert [type(outcome.error) for outcome in outcomes] == [RunnerStopped] * 2 + [ModelNotLoaded] * 2


def test_threads_follow_the_quota() -> None:
    """The number of torch's threads follows the CPU quota, which torch itself does not read."""
    with cpu_quota(0.75):
        ended = subprocess.run(
            [sys.executable, "-c", THREADS], cwd=ROOT, check=True, capture_output=True, text=True
        )
    assert ended.stdout.split() == ["ok", "1"]
