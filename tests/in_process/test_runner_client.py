"""RunnerClient with a runner that answers, is busy, cannot be reached, or dies."""

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
from bentoml.exceptions import BentoMLException

from sam3_runner import (
    DeadlineExceeded,
    InferenceFailed,
    ModelNotLoaded,
    PromptTooLong,
    RunnerStopped,
    SAM3Error,
)
from sam3_runner.images.decoded import DecodedImage, LocalImage
from sam3_runner.metrics import collect_request_s
from sam3_runner.serving import client
from sam3_runner.serving.client import CONNECT_ATTEMPTS, POLL_S, STATUS_AGE_S, STATUS_TIMEOUT_S, RunnerClient
from sam3_runner.serving.engine import EngineStatus, SegmentOutcome, SegmentRequest
from tests.concepts import concepts
from tests.in_process.bench import Clock, in_time, wait_until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

pytestmark = pytest.mark.anyio

IMAGE = LocalImage(np.zeros((2, 2, 3), dtype=np.uint8), width=2, height=2)
OK = EngineStatus(state="ok")
LOADING = EngineStatus(state="loading")
BROKEN = EngineStatus(state="error", detail="torn")
RESTARTED = "the model's process has stopped and is being restarted"
BURST = 50


@dataclass
class Liveness:
    """The liveness of a runner's process that the test ends and starts."""

    identity: str | None = "first"
    reason_absent: str = RESTARTED
    has_failed: bool = False
    dying: list[str] = field(default_factory=list)

    def find(self) -> str | None:
        return self.identity

    def mark_dying(self, identity: str) -> None:
        self.dying.append(identity)
        self.identity = None


class Proxy:
    """A stand-in for BentoML's proxy: each call runs the next behaviour of its list, then the last one."""

    def __init__(self) -> None:
        self.to_async = self
        self.calls: list[str] = []
        self.requests: list[SegmentRequest] = []
        self.segments: list[Callable[[], Awaitable[Any]]] = []
        self.statuses: list[Callable[[], Awaitable[Any]]] = [answering(OK)]
        self.cancelled = 0

    async def segment(self, packed: list[bytes]) -> Any:
        self.requests += [pickle.loads(each) for each in packed]  # noqa: S301 - our own
        return await self._next("segment", self.segments)

    async def status(self) -> Any:
        return await self._next("status", self.statuses)

    async def entry(self, method: str, calls: int = 1) -> None:
        """Wait until a method has been called `calls` times."""

        async def is_called() -> bool:
            return self.calls.count(method) >= calls

        await wait_until(is_called)

    async def _next(self, name: str, behaviours: list[Callable[[], Awaitable[Any]]]) -> Any:
        self.calls.append(name)
        try:
            return await (behaviours.pop(0) if len(behaviours) > 1 else behaviours[0])()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


def answering(answer: object) -> Callable[[], Awaitable[Any]]:
    """The call is answered."""

    async def behave() -> Any:
        return answer

    return behave


def raising(error: Exception) -> Callable[[], Awaitable[Any]]:
    """The call fails."""

    async def behave() -> Any:
        raise error

    return behave


async def silent() -> None:
    """The call is never answered."""
    await asyncio.Event().wait()


def refused_connection() -> aiohttp.ClientConnectorError:
    """The connection was refused, so nothing was sent."""
    key: Any = SimpleNamespace(host="runner", port=1, ssl=False, is_ssl=False)
    return aiohttp.ClientConnectorError(key, OSError(111, "refused"))


def outcome(**fields: Any) -> Callable[[], Awaitable[Any]]:
    """The runner's answer to a request."""
    return answering([pickle.dumps(SegmentOutcome(**fields))])


FOUND = outcome(results=[], inference_ms=5.0, is_held=True)


@pytest.fixture
def liveness() -> Liveness:
    return Liveness()


@pytest.fixture
def proxy() -> Proxy:
    return Proxy()


@pytest.fixture
def runner(proxy: Proxy, liveness: Any) -> RunnerClient:
    return RunnerClient(proxy, liveness)


@pytest.fixture
async def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the client's timeouts and of the age of its status."""
    moved = Clock()
    moved.install()
    monkeypatch.setattr(client, "time", SimpleNamespace(monotonic=moved))
    return moved


async def segment(runner: RunnerClient) -> float:
    return (await runner.segment(IMAGE, concepts("circle"), time.monotonic() + 60))[1]


# Calls.


async def test_request_and_results_are_complete(proxy: Proxy, runner: RunnerClient) -> None:
    """The request has image, prompts, deadline and ids; the results and the time are returned."""
    proxy.segments = [FOUND]
    ids = {"request_id": "request-17", "task_id": "a-task"}
    prompts = concepts("circle", "star")
    assert await runner.segment(IMAGE, prompts, 12.5, with_masks=True, log_ids=ids) == ([], 5.0)
    [request] = proxy.requests
    assert (request.prompts, request.with_masks) == (prompts, True)
    assert (request.deadline_s, request.log_ids) == (12.5, ids)
    assert (request.image.width, request.image.height) == (2, 2)
    assert isinstance(request.image, DecodedImage)
    assert np.array_equal(request.image.array(), IMAGE.array())


async def test_stages_of_the_runner_count_for_the_request(proxy: Proxy, runner: RunnerClient) -> None:
    """The runner's stages are added to the times of the request that is served, of each of its calls."""
    proxy.segments = [outcome(results=[], stages_s={"queue": 0.5, "encode_image": 2.0})]
    stages_s = collect_request_s()
    await segment(runner)
    await segment(runner)
    assert stages_s == {"queue": 1.0, "encode_image": 4.0}


@pytest.mark.parametrize(
    "error",
    [
        ModelNotLoaded("the model is loading"),
        PromptTooLong("the prompt has 40 tokens"),
        InferenceFailed("the model failed on this image"),
        DeadlineExceeded("the deadline has passed"),
    ],
)
async def test_errors_of_the_runner_are_raised(proxy: Proxy, runner: RunnerClient, error: SAM3Error) -> None:
    """An error in the runner's outcome is raised unchanged, without a retry."""
    proxy.segments = [outcome(error=error), FOUND]
    with pytest.raises(type(error), match=str(error)):
        await segment(runner)
    assert proxy.calls == ["segment"]


@pytest.mark.parametrize(
    "cut",
    [aiohttp.ServerDisconnectedError(), aiohttp.ClientOSError(32, "broken"), aiohttp.ClientPayloadError()],
)
async def test_broken_call_is_not_retried(
    proxy: Proxy, liveness: Liveness, runner: RunnerClient, cut: Exception
) -> None:
    """A call that breaks off is not retried: its image may have killed the process."""
    proxy.segments = [raising(cut), FOUND]
    with pytest.raises(RunnerStopped, match="stopped while it worked"):
        await segment(runner)
    assert proxy.calls == ["segment"]
    assert liveness.dying == ["first"]
    # The process counts as dead from then on, whatever the system says.
    with pytest.raises(ModelNotLoaded, match=RESTARTED):
        await segment(runner)
    assert proxy.calls == ["segment"]


async def test_runner_that_ends_counts_as_dead(
    proxy: Proxy, liveness: Liveness, runner: RunnerClient
) -> None:
    """A runner whose device has failed gets no further calls, although its process has not ended yet."""
    proxy.segments = [outcome(error=RunnerStopped("the model's device has failed")), FOUND]
    with pytest.raises(RunnerStopped, match="device has failed"):
        await segment(runner)
    assert liveness.dying == ["first"]
    with pytest.raises(ModelNotLoaded, match=RESTARTED):
        await segment(runner)
    assert proxy.calls == ["segment"]


@pytest.mark.parametrize("refusals", range(1, CONNECT_ATTEMPTS))
async def test_refused_connection_is_retried(
    proxy: Proxy, runner: RunnerClient, clock: Clock, refusals: int
) -> None:
    """A refused connection is retried, and the request is sent once."""
    proxy.segments = [*[raising(refused_connection())] * refusals, FOUND]
    call = asyncio.create_task(segment(runner))
    for attempt in range(1, refusals + 1):
        await proxy.entry("segment", attempt)
        await clock.advance(1)
    assert await in_time(call) == 5.0
    assert len(proxy.calls) == refusals + 1


async def test_runner_cannot_be_reached(proxy: Proxy, runner: RunnerClient) -> None:
    """After CONNECT_ATTEMPTS refused connections the call raises ModelNotLoaded."""
    proxy.segments = [raising(refused_connection())]
    with pytest.raises(ModelNotLoaded, match="cannot be reached"):
        await segment(runner)
    assert len(proxy.calls) == CONNECT_ATTEMPTS


@pytest.mark.parametrize("error", [TimeoutError(), aiohttp.SocketTimeoutError()])
async def test_timeout_is_not_retried(proxy: Proxy, runner: RunnerClient, error: Exception) -> None:
    """Timeouts of BentoML and aiohttp raise DeadlineExceeded, without a retry."""
    proxy.segments = [raising(error)]
    with pytest.raises(DeadlineExceeded):
        await segment(runner)
    assert proxy.calls == ["segment"]


@pytest.mark.parametrize("error", [aiohttp.ClientError("private"), BentoMLException("private")])
async def test_other_failures(proxy: Proxy, runner: RunnerClient, error: Exception) -> None:
    """Other errors raise InferenceFailed without their message."""
    proxy.segments = [raising(error)]
    with pytest.raises(InferenceFailed, match=r"^the model's process failed$"):
        await segment(runner)
    assert proxy.calls == ["segment"]


async def test_cancelled_call_is_cancelled_at_the_proxy(proxy: Proxy, runner: RunnerClient) -> None:
    """A cancelled call cancels the call of the proxy."""
    proxy.segments = [silent]
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await segment(runner)

    async def is_cancelled() -> bool:
        return proxy.cancelled == 1

    await wait_until(is_cancelled)


# Deaths.


async def test_dead_before_the_call(proxy: Proxy, liveness: Liveness, runner: RunnerClient) -> None:
    """Without a runner's process calls fail immediately, and nothing is sent."""
    liveness.identity = None
    with pytest.raises(ModelNotLoaded, match=RESTARTED):
        await segment(runner)
    status = await runner.status()
    assert (status.state, status.detail) == ("loading", RESTARTED)
    assert proxy.calls == []


@pytest.mark.parametrize("successor", ["second", None])
async def test_dead_during_the_call(
    proxy: Proxy, liveness: Liveness, runner: RunnerClient, clock: Clock, successor: str | None
) -> None:
    """Calls in progress end when the process has died: its socket stays open."""
    proxy.segments = [silent]
    waiting = [asyncio.create_task(segment(runner)) for _ in range(20)]
    await proxy.entry("segment", 20)
    await clock.advance(POLL_S)
    assert not any(call.done() for call in waiting)
    liveness.identity = successor
    await clock.advance(POLL_S)
    ended = await in_time(asyncio.gather(*waiting, return_exceptions=True))
    assert {type(each) for each in ended} == {RunnerStopped}
    assert len(proxy.calls) == proxy.cancelled == 20


async def test_dead_after_the_call(proxy: Proxy, liveness: Liveness, runner: RunnerClient) -> None:
    """After a death the next call fails; after the restart calls work again."""
    proxy.segments = [FOUND]
    assert await segment(runner) == 5.0
    liveness.identity = None
    with pytest.raises(ModelNotLoaded):
        await segment(runner)
    liveness.identity = "second"
    assert await segment(runner) == 5.0
    assert proxy.calls == ["segment"] * 2


async def test_result_of_a_dying_process_is_returned(
    proxy: Proxy, liveness: Liveness, runner: RunnerClient
) -> None:
    """A result that has arrived is returned, even if the process has died since."""

    async def answer_and_die() -> Any:
        liveness.identity = None
        return await FOUND()

    proxy.segments = [answer_and_die]
    assert await segment(runner) == 5.0


# The status.


async def test_concurrent_status_requests_share_one_call(proxy: Proxy, runner: RunnerClient) -> None:
    """Concurrent status requests share one call."""
    statuses = await asyncio.gather(*(runner.status() for _ in range(BURST)))
    assert statuses == [OK] * BURST
    assert proxy.calls == ["status"]


@pytest.mark.parametrize("status", [OK, BROKEN])
async def test_status_is_cached(
    proxy: Proxy, runner: RunnerClient, clock: Clock, status: EngineStatus
) -> None:
    """A status is cached for STATUS_AGE_S."""
    proxy.statuses = [answering(status)]
    for _ in range(BURST):
        assert await runner.status() == status
    assert proxy.calls == ["status"]
    await clock.advance(STATUS_AGE_S)
    for _ in range(BURST):
        assert await runner.status() == status
    assert proxy.calls == ["status"] * 2


async def test_refusal_ends_the_cached_status(proxy: Proxy, runner: RunnerClient) -> None:
    """After the runner has refused a request, the cached status is not used: kept tasks must wait."""
    proxy.statuses = [answering(OK), answering(BROKEN)]
    proxy.segments = [outcome(error=ModelNotLoaded("the model's device has failed"))]
    assert await runner.status() == OK
    with pytest.raises(ModelNotLoaded):
        await segment(runner)
    assert await runner.status() == BROKEN


async def test_loading_is_not_cached(proxy: Proxy, runner: RunnerClient) -> None:
    """The status `loading` is not cached."""
    proxy.statuses = [answering(LOADING), answering(OK)]
    assert [(await runner.status()).state for _ in range(3)] == ["loading", "ok", "ok"]
    assert proxy.calls == ["status"] * 2


async def test_shared_status_call_survives_its_first_caller(proxy: Proxy, runner: RunnerClient) -> None:
    """A shared status call continues when the caller that started it is cancelled."""
    go_on = asyncio.Event()

    async def slow() -> EngineStatus:
        await go_on.wait()
        return OK

    proxy.statuses = [slow]
    first, second = asyncio.create_task(runner.status()), asyncio.create_task(runner.status())
    await proxy.entry("status")
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    go_on.set()
    assert await in_time(second) == OK
    assert proxy.calls == ["status"]


async def test_status_after_a_death(proxy: Proxy, liveness: Liveness, runner: RunnerClient) -> None:
    """The cached status of a dead process is not used for the next one."""
    seen = [(await runner.status()).state]
    liveness.identity = None
    seen.append((await runner.status()).state)
    liveness.identity = "second"
    proxy.statuses = [answering(LOADING), answering(OK)]
    seen += [(await runner.status()).state, (await runner.status()).state]
    assert seen == ["ok", "loading", "loading", "ok"]
    assert proxy.calls == ["status"] * 3


async def test_death_during_the_status_call(proxy: Proxy, liveness: Liveness, runner: RunnerClient) -> None:
    """An answer of a process that has died meanwhile is not used."""

    async def answer_and_die() -> EngineStatus:
        liveness.identity = None
        return OK

    proxy.statuses = [answer_and_die]
    assert (await runner.status()).state == "loading"


@pytest.mark.parametrize("before", [OK, BROKEN, None])
async def test_busy_runner(
    proxy: Proxy, runner: RunnerClient, clock: Clock, before: EngineStatus | None
) -> None:
    """A runner that does not answer keeps its last status for BUSY_TIME_S; then it is an error."""
    proxy.statuses = [silent] if before is None else [answering(before), silent]
    expected = "loading" if before is None else before.state
    if before is not None:
        assert await runner.status() == before
        await clock.advance(STATUS_AGE_S)
    assert await late_state(proxy, runner, clock) == expected
    await clock.advance(client.BUSY_TIME_S)
    assert await late_state(proxy, runner, clock) == "error"


async def late_state(proxy: Proxy, runner: RunnerClient, clock: Clock) -> str:
    """The state that a caller gets after STATUS_TIMEOUT_S without an answer."""
    calls = proxy.calls.count("status")
    asking = asyncio.create_task(runner.status())
    await proxy.entry("status", calls + 1)
    await clock.advance(STATUS_TIMEOUT_S)
    return (await in_time(asking)).state


@pytest.mark.parametrize("error", [refused_connection(), BentoMLException("private")])
async def test_status_call_fails(proxy: Proxy, runner: RunnerClient, error: Exception) -> None:
    """A runner that cannot be called is an error immediately, without the error's message."""
    proxy.statuses = [raising(error)]
    status = await runner.status()
    assert (status.state, status.detail) == ("error", "the model's process does not answer")
