"""What an API worker makes of a runner that answers, is busy, cannot be reached, or dies."""

from __future__ import annotations

import asyncio
import pickle
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import aiohttp
import numpy as np
import pytest

from sam3_runner import DeadlineExceeded, InferenceFailed, ModelNotLoaded, RunnerStopped, client
from sam3_runner.client import RunnerClient
from sam3_runner.engine import EngineStatus, SegmentOutcome
from sam3_runner.images.square import SquareImage

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

IMAGE = SquareImage(np.zeros((2, 2, 3), dtype=np.uint8), width=2, height=2)
OK = EngineStatus(state="ok")
STOPPED = "the model's process has stopped and is being restarted"


@dataclass
class FakeLiveness:
    """A runner that the test ends and starts."""

    identity: str | None = "first"
    reason_absent: str = STOPPED
    cut: list[str] = field(default_factory=list)

    def find(self) -> str | None:
        return self.identity

    def mark_dying(self, identity: str) -> None:
        self.cut.append(identity)
        self.identity = None


class FakeRunner:
    """BentoML's proxy; each call does the next thing of the method's list, the last one again and again."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.segments: list[Callable[[], Awaitable[Any]]] = []
        self.statuses: list[Callable[[], Awaitable[Any]]] = [answering(OK)]
        self.to_async = self

    async def segment(self, _packed: list[bytes]) -> Any:
        return await self._next("segment", self.segments)

    async def status(self) -> Any:
        return await self._next("status", self.statuses)

    async def _next(self, name: str, behaviours: list[Callable[[], Awaitable[Any]]]) -> Any:
        self.calls.append(name)
        return await (behaviours.pop(0) if len(behaviours) > 1 else behaviours[0])()


def answering(answer: object) -> Callable[[], Awaitable[Any]]:
    """It answers."""

    async def behave() -> Any:
        return answer

    return behave


def raising(error: Exception) -> Callable[[], Awaitable[Any]]:
    """The call fails."""

    async def behave() -> Any:
        raise error

    return behave


async def silent() -> None:
    """It never answers."""
    await asyncio.Event().wait()


def refused_connection() -> aiohttp.ClientConnectorError:
    """Nobody listens: nothing was sent."""
    key: Any = SimpleNamespace(host="runner", port=1, ssl=False, is_ssl=False)
    return aiohttp.ClientConnectorError(key, OSError(111, "refused"))


FOUND = answering([pickle.dumps(SegmentOutcome(results=[], inference_ms=5.0))])


@pytest.fixture
def life() -> FakeLiveness:
    """The runner's life."""
    return FakeLiveness()


@pytest.fixture
def runner() -> FakeRunner:
    """The runner."""
    return FakeRunner()


@pytest.fixture
def calls(runner: FakeRunner, life: Any) -> RunnerClient:
    """Who calls it."""
    return RunnerClient(runner, life)


async def segment(calls: RunnerClient) -> float:
    return (await calls.segment(IMAGE, ["circle"], time.monotonic() + 60))[1]


def test_answer(runner: FakeRunner, calls: RunnerClient) -> None:
    """An answer is handed on."""
    runner.segments = [FOUND]
    assert asyncio.run(segment(calls)) == 5.0


@pytest.mark.parametrize(
    "cut",
    [aiohttp.ServerDisconnectedError(), aiohttp.ClientOSError(32, "broken"), aiohttp.ClientPayloadError()],
)
def test_image_that_kills_is_sent_once(
    runner: FakeRunner, life: FakeLiveness, calls: RunnerClient, cut: Exception
) -> None:
    """A call that was cut off may have been why: it is not sent to the successor."""
    runner.segments = [raising(cut), FOUND]
    with pytest.raises(RunnerStopped, match="stopped while it worked"):
        asyncio.run(segment(calls))
    assert runner.calls == ["segment"]
    assert life.cut == ["first"]


def test_call_that_was_never_sent_is_tried_again(runner: FakeRunner, calls: RunnerClient) -> None:
    """Where nobody listened, nothing was sent; in the end it is as if there were no model."""
    runner.segments = [raising(refused_connection()), raising(refused_connection()), FOUND]
    assert asyncio.run(segment(calls)) == 5.0
    runner.segments = [raising(refused_connection())]
    with pytest.raises(ModelNotLoaded, match="cannot be reached"):
        asyncio.run(segment(calls))


def test_other_failures(runner: FakeRunner, calls: RunnerClient) -> None:
    """A timeout of BentoML's is a deadline, by whatever name; all else is a failure."""
    for error in (TimeoutError(), aiohttp.SocketTimeoutError()):
        runner.segments = [raising(error)]
        with pytest.raises(DeadlineExceeded):
            asyncio.run(segment(calls))
    runner.segments = [raising(aiohttp.ClientError())]
    with pytest.raises(InferenceFailed):
        asyncio.run(segment(calls))


def test_death_ends_every_call(runner: FakeRunner, life: FakeLiveness, calls: RunnerClient) -> None:
    """Calls that wait on the socket of a dead runner, which stays open, end at once."""
    runner.segments = [silent]

    async def die() -> list[object]:
        waiting = [asyncio.create_task(segment(calls)) for _ in range(20)]
        while len(runner.calls) < len(waiting):  # noqa: ASYNC110 - the calls have no event to wait for
            await asyncio.sleep(0)
        life.identity = "second"
        return await asyncio.gather(*waiting, return_exceptions=True)

    started_s = time.monotonic()
    assert {type(ended) for ended in asyncio.run(die())} == {RunnerStopped}
    assert time.monotonic() - started_s < 2


def test_no_call_to_a_dead_runner(runner: FakeRunner, life: FakeLiveness, calls: RunnerClient) -> None:
    """While there is no runner, calls are refused at once and nothing is sent."""
    life.identity = None
    with pytest.raises(ModelNotLoaded, match=STOPPED):
        asyncio.run(segment(calls))
    status = asyncio.run(calls.status())
    assert (status.state, status.detail) == ("loading", STOPPED)
    assert runner.calls == []


def test_status_after_a_death(runner: FakeRunner, life: FakeLiveness, calls: RunnerClient) -> None:
    """What a dead runner said of itself is not believed of its successor."""

    async def states() -> list[str]:
        seen = [(await calls.status()).state]
        life.identity = None
        seen.append((await calls.status()).state)
        life.identity = "second"
        runner.statuses = [answering(EngineStatus(state="loading")), answering(OK)]
        return [*seen, (await calls.status()).state, (await calls.status()).state]

    assert asyncio.run(states()) == ["ok", "loading", "loading", "ok"]
    assert runner.calls == ["status"] * 3


def test_death_while_it_is_asked(runner: FakeRunner, life: FakeLiveness, calls: RunnerClient) -> None:
    """An answer that comes from a runner which is dead by then counts for nothing."""

    async def last_words() -> EngineStatus:
        life.identity = None
        return OK

    runner.statuses = [last_words]
    assert asyncio.run(calls.status()).state == "loading"


@pytest.mark.parametrize("before", [OK, EngineStatus(state="error", detail="torn"), None])
def test_busy_runner_is_believed(
    runner: FakeRunner, calls: RunnerClient, monkeypatch: pytest.MonkeyPatch, before: EngineStatus | None
) -> None:
    """A runner that lives and does not answer is what it was, for a while; a probe never waits a second."""
    monkeypatch.setattr(client, "STATUS_AGE_S", 0.0)
    runner.statuses = [silent] if before is None else [answering(before), silent]

    async def states() -> list[str]:
        seen = [] if before is None else [(await calls.status()).state]
        started_s = time.monotonic()
        seen.append((await calls.status()).state)
        assert time.monotonic() - started_s < 1
        monkeypatch.setattr(calls, "_busy_until_s", 0.0)
        return [*seen, (await calls.status()).state]

    expected = ["loading"] if before is None else [before.state] * 2
    assert asyncio.run(states()) == [*expected, "error"]
