"""The scheduler, with a real engine: which requests share a pass, in which order, and that each ends."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sam3_runner import (
    DeadlineExceeded,
    FeaturesNotHeld,
    InferenceFailed,
    ModelNotLoaded,
    PromptTooLong,
    RunnerStopped,
    SAM3Predictor,
)
from sam3_runner.images.decoded import DecodedImage, LocalImage, SentPixels
from sam3_runner.images.pixel_file import SHARES_MEMORY, HeldFile, PixelFile
from sam3_runner.serving.engine import Engine, EngineConfig, SegmentOutcome, SegmentRequest
from sam3_runner.serving.scheduler import MAX_PAIRS, Scheduler
from tests.breaking import BREAKING_PROMPT, BreakingPredictor
from tests.concepts import concepts
from tests.edge import wait_for

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Future
    from pathlib import Path

    from sam3_runner.weights.checkpoint import Checkpoint

SIDE_PX = 112
MAX_BATCH = 4
WAIT_S = 60.0


class HeldEngine(Engine):
    """An engine that notes the prompts of its batches, and runs one only while it is not held."""

    def __init__(self, config: EngineConfig, predictor: type[SAM3Predictor] | None = None) -> None:
        super().__init__(config, predictor)
        self.batches: list[list[list[str]]] = []
        self.is_free = threading.Event()
        self.is_free.set()

    def segment(self, requests: list[SegmentRequest]) -> list[SegmentOutcome]:
        self.batches.append([texts_of(request) for request in requests])
        assert self.is_free.wait(WAIT_S)
        return super().segment(requests)


def texts_of(request: SegmentRequest) -> list[str]:
    return [prompt.model_text for prompt in request.prompts]


def engine_of(checkpoint: Checkpoint, predictor: type[SAM3Predictor] | None = None) -> HeldEngine:
    folder: Path = checkpoint.weights_file.parent
    engine = HeldEngine(EngineConfig(str(folder), "cpu", cpu_threads=1, max_batch=MAX_BATCH), predictor)
    engine.start()
    wait_for(engine.status, lambda status: status.state != "loading")
    return engine


@pytest.fixture(scope="module")
def shared_engine(tiny_checkpoint: Checkpoint) -> HeldEngine:
    return engine_of(tiny_checkpoint)


@pytest.fixture
def engine(shared_engine: HeldEngine) -> HeldEngine:
    shared_engine.batches.clear()
    return shared_engine


def request(*prompts: str, level: int = 0, seconds: float = 600.0) -> SegmentRequest:
    image = LocalImage(np.full((SIDE_PX, SIDE_PX, 3), level, np.uint8), width=30, height=20)
    return SegmentRequest(image, concepts(*prompts), deadline_s=time.monotonic() + seconds)


def submitted_together(
    scheduler: Scheduler, engine: HeldEngine, requests: Sequence[SegmentRequest]
) -> list[SegmentOutcome]:
    """The outcomes of requests that are all staged while a lone request, with prompt "first", runs."""
    engine.is_free.clear()
    first = scheduler.submit(request("first"))
    wait_for(lambda: engine.batches, bool)
    futures = [scheduler.submit(each) for each in requests]
    wait_for(lambda: len(scheduler._staged), lambda count: count == len(requests))
    engine.is_free.set()
    assert first.result(WAIT_S).results
    return [future.result(WAIT_S) for future in futures]


def test_lone_request_runs_at_once(engine: HeldEngine) -> None:
    """A request that comes while nothing runs waits for no other."""
    scheduler = Scheduler(engine, MAX_BATCH)
    for prompts in (["cat"], ["dog", "ring"]):
        outcome = scheduler.submit(request(*prompts)).result(WAIT_S)
        assert [result.prompt for result in outcome.results or []] == prompts
    assert engine.batches == [[["cat"]], [["dog", "ring"]]]


def test_earliest_deadline_first(engine: HeldEngine) -> None:
    """Of the requests that wait the one with the earliest deadline runs first; equal ones as they came."""
    scheduler = Scheduler(engine, max_batch=1, max_slack_s=math.inf)
    waits_s = {"late": 400, "early": 100, "middle": 200}
    requests = [request(name, seconds=wait_s) for name, wait_s in waits_s.items()]
    submitted_together(scheduler, engine, requests)
    assert engine.batches == [[["first"]], [["early"]], [["middle"]], [["late"]]]


def test_later_requests_of_an_earlier_deadline_do_not_pass(engine: HeldEngine) -> None:
    """Deadlines that are far off do not count: what was sent first runs first."""
    requests = [
        request("waits", seconds=500),
        *(request(f"later {number}", seconds=100) for number in range(3)),
    ]
    submitted_together(Scheduler(engine, max_batch=1), engine, requests)
    assert engine.batches[1:3] == [[["waits"]], [["later 0"]]]


def test_requests_share_a_pass(engine: HeldEngine) -> None:
    """Requests that came during a pass share the next ones: so many images each, and their own results."""
    scheduler = Scheduler(engine, MAX_BATCH)
    requests = [request(f"thing {number}", level=20 * number) for number in range(MAX_BATCH + 1)]
    outcomes = submitted_together(scheduler, engine, requests)
    assert [len(batch) for batch in engine.batches] == [1, MAX_BATCH, 1]
    for asked, outcome in zip(requests, outcomes, strict=True):
        assert [result.prompt for result in outcome.results or []] == texts_of(asked)


def test_many_prompts_run_alone(engine: HeldEngine) -> None:
    """A request with more prompts than a pass decodes at once is run, and holds nobody else in its pass."""
    scheduler = Scheduler(engine, MAX_BATCH)
    many = [f"thing {number}" for number in range(MAX_PAIRS + 1)]
    requests = [request(*many, seconds=100), request("cat", seconds=200), request("dog", seconds=300)]
    outcomes = submitted_together(scheduler, engine, requests)
    assert engine.batches == [[["first"]], [many], [["cat"], ["dog"]]]
    assert [len(outcome.results or []) for outcome in outcomes] == [len(many), 1, 1]


def test_prompts_of_a_pass_are_bounded(engine: HeldEngine) -> None:
    """Prompts of one pass are at most so many; a pass is full at exactly this number."""
    scheduler = Scheduler(engine, MAX_BATCH)
    half = [f"thing {number}" for number in range(MAX_PAIRS // 2)]
    requests = [request(*half, seconds=100 + number) for number in range(3)]
    submitted_together(scheduler, engine, requests)
    assert [len(batch) for batch in engine.batches] == [1, 2, 1]


def test_pictures_with_many_prompts_share_a_pass(engine: HeldEngine) -> None:
    """Where no caller waits for others, a pass has as many images as it may, whatever their prompts."""
    many = [f"thing {number}" for number in range(MAX_PAIRS)]
    scheduler = Scheduler(engine, MAX_BATCH, max_pairs=MAX_BATCH * len(many))
    submitted_together(scheduler, engine, [request(*many) for _ in range(MAX_BATCH)])
    assert [len(batch) for batch in engine.batches] == [1, MAX_BATCH]


def test_two_streams_run_at_once(engine: HeldEngine) -> None:
    """Two passes begin before one has ended, and each request gets its own results."""
    scheduler = Scheduler(engine, max_batch=1, streams=2)
    engine.is_free.clear()
    names = [f"thing {number}" for number in range(6)]
    futures = [scheduler.submit(request(name)) for name in names]
    wait_for(lambda: len(engine.batches), lambda count: count == 2)
    engine.is_free.set()
    outcomes = [future.result(WAIT_S) for future in futures]
    assert [result.prompt for outcome in outcomes for result in outcome.results or []] == names


class Asked(NamedTuple):
    """A drawn request: its number of prompts, and its deadline in steps of a minute from now."""

    prompts: int
    minutes: int


ASKED = st.builds(
    Asked, st.integers(1, 5) | st.sampled_from([MAX_PAIRS - 1, MAX_PAIRS, MAX_PAIRS + 3]), st.integers(2, 5)
)


@given(st.lists(ASKED, min_size=1, max_size=7), st.integers(1, MAX_BATCH))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_any_requests(shared_engine: HeldEngine, drawn: list[Asked], max_batch: int) -> None:
    """Whatever comes: each request runs once, in the order of deadlines, in passes within both limits."""
    shared_engine.batches.clear()
    requests = [
        request(*(f"thing {number} {index}" for index in range(asked.prompts)), seconds=60 * asked.minutes)
        for number, asked in enumerate(drawn)
    ]
    outcomes = submitted_together(
        Scheduler(shared_engine, max_batch, max_slack_s=math.inf), shared_engine, requests
    )
    for asked, outcome in zip(requests, outcomes, strict=True):
        assert [result.prompt for result in outcome.results or []] == texts_of(asked)
    ran = [prompts for batch in shared_engine.batches[1:] for prompts in batch]
    in_order = sorted(range(len(drawn)), key=lambda number: (drawn[number].minutes, number))
    assert ran == [texts_of(requests[number]) for number in in_order]
    for batch in shared_engine.batches:
        assert len(batch) <= max_batch
        assert len(batch) == 1 or sum(map(len, batch)) <= MAX_PAIRS


def gone_pixels() -> DecodedImage:
    """An image whose process holds its pixels no more."""
    held = HeldFile()
    file: PixelFile = held.file
    held.close()
    return DecodedImage(SentPixels(file, (SIDE_PX, SIDE_PX, 3)), width=30, height=20)


def dead_pixels() -> DecodedImage:
    """An image whose process has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    file = PixelFile(process.pid, 5, "sam3-pixels-0")
    return DecodedImage(SentPixels(file, (SIDE_PX, SIDE_PX, 3)), width=30, height=20)


@pytest.mark.skipif(not SHARES_MEMORY, reason="this system has no memfd")
def test_pixels_that_cannot_be_read(engine: HeldEngine) -> None:
    """A request whose pixels are gone fails alone, without a pass; the next one is answered."""
    scheduler = Scheduler(engine, MAX_BATCH)
    for image in (gone_pixels(), dead_pixels()):
        lost = SegmentRequest(image, concepts("cat"), deadline_s=time.monotonic() + 600)
        error = scheduler.submit(lost).result(WAIT_S).error
        assert isinstance(error, InferenceFailed)
        assert str(error) == "the pixels of the image cannot be read"
    assert engine.batches == []
    assert scheduler.submit(request("cat")).result(WAIT_S).results


def test_errors_are_outcomes(engine: HeldEngine) -> None:
    """Whatever is wrong with a request is its own outcome; those beside it are answered."""
    scheduler = Scheduler(engine, max_batch=8)
    unknown = DecodedImage(None, 30, 20, key="unknown")
    wrong_shape = LocalImage(np.zeros((SIDE_PX, SIDE_PX, 2), np.uint8), 30, 20)
    deadline_s = time.monotonic() + 600
    requests = [
        request("cat"),
        SegmentRequest(unknown, concepts("cat"), deadline_s),
        request("cat " * 40),
        request("cat", seconds=-1),
        request("dog"),
    ]
    good, not_held, too_long, late, other = submitted_together(scheduler, engine, requests)
    assert isinstance(not_held.error, FeaturesNotHeld)
    assert isinstance(too_long.error, PromptTooLong)
    assert isinstance(late.error, DeadlineExceeded)
    assert good.results
    assert other.results
    bad = scheduler.submit(SegmentRequest(wrong_shape, concepts("cat"), deadline_s)).result(WAIT_S)
    assert isinstance(bad.error, InferenceFailed)
    assert scheduler.submit(request("cat")).result(WAIT_S).results


def test_engine_that_is_not_ready(tiny_checkpoint: Checkpoint) -> None:
    """Before the model is loaded every request is answered, with ModelNotLoaded."""
    unstarted = HeldEngine(EngineConfig(str(tiny_checkpoint.weights_file.parent), "cpu"))
    scheduler = Scheduler(unstarted, MAX_BATCH)
    futures = [scheduler.submit(request("cat")) for _ in range(2 * MAX_BATCH)]
    assert {type(future.result(WAIT_S).error) for future in futures} == {ModelNotLoaded}


def test_device_that_is_lost(tiny_checkpoint: Checkpoint) -> None:
    """After the device has failed every request is answered: those of its pass, and all that wait."""
    engine = engine_of(tiny_checkpoint, BreakingPredictor)
    scheduler = Scheduler(engine, MAX_BATCH)
    requests = [request(BREAKING_PROMPT, seconds=100), request("cat", seconds=101)]
    waiting = [request("dog", seconds=200 + number) for number in range(MAX_BATCH)]
    outcomes = submitted_together(scheduler, engine, [*requests, *waiting])
    failed, later = outcomes[:MAX_BATCH], outcomes[MAX_BATCH:]
    assert {type(outcome.error) for outcome in failed} == {RunnerStopped}
    assert {type(outcome.error) for outcome in later} == {ModelNotLoaded}
    after: Future[SegmentOutcome] = scheduler.submit(request("cat"))
    assert isinstance(after.result(WAIT_S).error, ModelNotLoaded)


def test_requests_are_staged_beside_a_pass(engine: HeldEngine) -> None:
    """While a pass runs, the pixels of later requests are read: their sender may let go of them."""
    if not SHARES_MEMORY:
        pytest.skip("this system has no memfd")
    scheduler = Scheduler(engine, MAX_BATCH)
    engine.is_free.clear()
    first = scheduler.submit(request("first"))
    wait_for(lambda: engine.batches, bool)
    held = HeldFile()
    held.file.write(np.full((SIDE_PX, SIDE_PX, 3), 90, np.uint8))
    shared = DecodedImage(SentPixels(held.file, (SIDE_PX, SIDE_PX, 3)), width=30, height=20)
    later = scheduler.submit(SegmentRequest(shared, concepts("cat"), deadline_s=time.monotonic() + 600))
    wait_for(lambda: scheduler._staged, bool)
    held.close()
    engine.is_free.set()
    assert first.result(WAIT_S).results
    assert later.result(WAIT_S).results


def test_caller_that_no_longer_waits(engine: HeldEngine) -> None:
    """A call that is cancelled leaves the model's thread alive: the next request is answered."""
    scheduler = Scheduler(engine, MAX_BATCH)

    async def cancel_one() -> None:
        engine.is_free.clear()
        waiting = asyncio.wrap_future(scheduler.submit(request("first")))
        await asyncio.to_thread(wait_for, lambda: engine.batches, bool)
        waiting.cancel()
        engine.is_free.set()

    asyncio.run(cancel_one())
    assert scheduler.submit(request("cat")).result(WAIT_S).results


class FaultyOnce(Engine):
    """An engine with a bug: its first batch ends with an exception."""

    is_faulty = True

    def segment(self, requests: list[SegmentRequest]) -> list[SegmentOutcome]:
        if self.is_faulty:
            self.is_faulty = False
            raise RuntimeError("a bug")
        return super().segment(requests)


def test_engine_with_a_bug(tiny_checkpoint: Checkpoint) -> None:
    """A batch that raises fails alone: its request ends, and the next one is answered."""
    engine = FaultyOnce(EngineConfig(str(tiny_checkpoint.weights_file.parent), "cpu", cpu_threads=1))
    engine.start()
    wait_for(engine.status, lambda status: status.state != "loading")
    scheduler = Scheduler(engine, MAX_BATCH)
    assert isinstance(scheduler.submit(request("cat")).result(WAIT_S).error, InferenceFailed)
    assert scheduler.submit(request("cat")).result(WAIT_S).results
