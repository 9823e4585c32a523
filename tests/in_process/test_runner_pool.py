"""RunnerPool with runners that work, load, hang and die: which one gets a request, and what callers see."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp
import pytest

from sam3_runner import FeaturesNotHeld, ModelNotLoaded, RunnerStopped
from sam3_runner.images.decoded import DecodedImage
from sam3_runner.serving.client import RunnerClient
from sam3_runner.serving.engine import EngineStatus
from sam3_runner.serving.pool import IMAGE_WORK, RunnerPool, overall_status
from tests.concepts import concepts
from tests.in_process.bench import in_time, wait_until
from tests.in_process.test_runner_client import (
    BROKEN,
    FOUND,
    IMAGE,
    LOADING,
    OK,
    RESTARTED,
    Liveness,
    Proxy,
    answering,
    outcome,
    raising,
    silent,
)

pytestmark = pytest.mark.anyio


@dataclass
class Runner:
    """A stand-in for a runner's process, which answers when the test lets it."""

    proxy: Proxy = field(default_factory=Proxy)
    liveness: Any = field(default_factory=Liveness)
    may_answer: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        async def behave() -> object:
            await self.may_answer.wait()
            return await FOUND()

        self.proxy.segments = [behave]

    @property
    def requests(self) -> int:
        return len(self.proxy.requests)


@dataclass
class Host:
    """A pool over three runners that are ready."""

    runners: list[Runner]
    pool: RunnerPool

    async def send(self, prompts: int = 1, image: DecodedImage = IMAGE) -> asyncio.Task[Any]:
        """Send a request; returns once a runner has it."""
        before = sum(self.counts)
        call = asyncio.create_task(
            self.pool.segment(image, concepts("circle") * prompts, time.monotonic() + 60)
        )
        await wait_until(lambda: sum(self.counts) > before or call.done())
        return call

    @property
    def counts(self) -> list[int]:
        """How many requests each runner has got."""
        return [runner.requests for runner in self.runners]

    async def answered(self, image: DecodedImage) -> None:
        """Send a request, and let it be answered."""
        await self.finish(await self.send(1, image))

    async def finish(self, *calls: asyncio.Task[Any]) -> None:
        """Let all runners answer."""
        for runner in self.runners:
            runner.may_answer.set()
        await in_time(asyncio.gather(*calls))


@pytest.fixture
async def host() -> Host:
    runners = [Runner() for _ in range(3)]
    pool = RunnerPool([RunnerClient(runner.proxy, runner.liveness, "0") for runner in runners])
    assert (await pool.status()).state == "ok"
    return Host(runners, pool)


# Which runner.


async def test_requests_spread_evenly(host: Host) -> None:
    """Requests of the same size go to the runners in turn."""
    calls = [await host.send() for _ in range(9)]
    assert host.counts == [3, 3, 3]
    await host.finish(*calls)


async def test_work_is_counted_by_prompts(host: Host) -> None:
    """While a runner works on many prompts, the next small requests go to the others."""
    calls = [await host.send(prompts=IMAGE_WORK + 3)]
    calls += [await host.send() for _ in range(4)]
    assert host.counts == [1, 2, 2]
    await host.finish(*calls)


async def test_finished_work_counts_no_more(host: Host) -> None:
    """Once a runner has answered, it is as free as before; of equal ones the longest idle one is next."""
    first = await host.send(prompts=10)
    host.runners[0].may_answer.set()
    await in_time(first)
    calls = [await host.send() for _ in range(3)]
    assert host.counts == [2, 1, 1]
    await host.finish(*calls)


async def test_failed_work_counts_no_more(host: Host) -> None:
    """A request that fails or is cancelled leaves no work behind."""
    host.runners[0].proxy.segments = [
        raising(aiohttp.ServerDisconnectedError()),
        *host.runners[0].proxy.segments,
    ]
    with pytest.raises(RunnerStopped):
        await host.pool.segment(IMAGE, concepts("circle"), time.monotonic() + 60)
    host.runners[0].liveness.identity = "first"
    cancelled = await host.send(prompts=10)
    cancelled.cancel()
    await asyncio.wait({cancelled})
    calls = [await host.send() for _ in range(3)]
    assert host.counts == [2, 2, 1]
    await host.finish(*calls)


@pytest.mark.parametrize("state", [LOADING, BROKEN])
async def test_runner_that_is_not_ready_gets_nothing(host: Host, state: EngineStatus) -> None:
    """A runner that loads or is broken gets no request until it is ready."""
    restarted = host.runners[1]
    restarted.liveness.identity = "second"
    restarted.proxy.statuses = [answering(state)]
    await host.pool.status()
    calls = [await host.send() for _ in range(4)]
    assert host.counts == [2, 0, 2]
    restarted.liveness.identity = "third"
    restarted.proxy.statuses = [answering(OK)]
    await host.pool.status()
    calls.append(await host.send())
    assert host.counts == [2, 1, 2]
    await host.finish(*calls)


async def test_dead_runner_gets_nothing(host: Host) -> None:
    """From its death on, without a status call, a runner gets no request."""
    host.runners[0].liveness.identity = None
    calls = [await host.send() for _ in range(4)]
    assert host.counts == [0, 2, 2]
    await host.finish(*calls)


async def test_no_runner(host: Host) -> None:
    """Without any living runner a request fails with the reason, and nothing is sent."""
    for runner in host.runners:
        runner.liveness.identity = None
    with pytest.raises(ModelNotLoaded, match=RESTARTED):
        await host.pool.segment(IMAGE, concepts("circle"), time.monotonic() + 60)
    assert host.counts == [0, 0, 0]


# Images whose features a runner holds.

KNOWN = replace(IMAGE, key="known")
WITHOUT_PIXELS = DecodedImage(None, IMAGE.width, IMAGE.height, key="known")


async def test_image_goes_where_its_features_are(host: Host) -> None:
    """Requests with the same image go to the runner that has had it, also without pixels; others spread."""
    assert not host.pool.may_hold("known")
    await host.answered(KNOWN)
    assert host.pool.may_hold("known")
    await host.answered(KNOWN)
    await host.answered(WITHOUT_PIXELS)
    assert host.counts == [3, 0, 0]
    await host.answered(replace(IMAGE, key="other"))
    assert host.counts == [3, 1, 0]


async def test_busy_holder_is_left_for_an_idle_runner(host: Host) -> None:
    """Where the holder is busier by more than an encoding, another one gets the image, which needs pixels."""
    await host.answered(KNOWN)
    host.runners[0].may_answer.clear()
    calls = [await host.send(IMAGE_WORK + 1, KNOWN)]
    with pytest.raises(FeaturesNotHeld):
        await host.pool.segment(WITHOUT_PIXELS, concepts("circle"), time.monotonic() + 60)
    assert host.counts == [2, 0, 0]
    calls.append(await host.send(1, KNOWN))
    assert host.counts == [2, 1, 0]
    await host.finish(*calls)


async def test_features_of_a_dead_runner_are_gone(host: Host) -> None:
    """After the death of the runner with the features, the image needs its pixels, for any runner."""
    await host.answered(KNOWN)
    host.runners[0].liveness.identity = "second"
    assert not host.pool.may_hold("known")
    with pytest.raises(FeaturesNotHeld):
        await host.pool.segment(WITHOUT_PIXELS, concepts("circle"), time.monotonic() + 60)


# What a death means.


async def test_death_fails_only_the_requests_of_that_runner(host: Host) -> None:
    """The requests of a runner that dies fail, once each; those of the others are answered."""
    calls = [await host.send() for _ in range(6)]
    host.runners[1].liveness.identity = None
    for runner in (host.runners[0], host.runners[2]):
        runner.may_answer.set()
    answers = await in_time(asyncio.gather(*calls, return_exceptions=True))
    assert [isinstance(answer, RunnerStopped) for answer in answers] == [False, True, False] * 2
    assert host.counts == [2, 2, 2]


async def test_request_that_was_not_begun_goes_to_another_runner(host: Host) -> None:
    """A runner that has just failed, and refuses what waits there, does not fail it: another one does it."""
    host.runners[0].proxy.segments = [outcome(error=ModelNotLoaded("its device has failed"))]
    await host.finish(await host.send())
    assert host.counts == [1, 1, 0]


async def test_request_that_all_refuse_fails(host: Host) -> None:
    """Each ready runner is asked once."""
    for runner in host.runners:
        runner.proxy.segments = [outcome(error=ModelNotLoaded("its device has failed"))]
    with pytest.raises(ModelNotLoaded, match="its device has failed"):
        await host.pool.segment(IMAGE, concepts("circle"), time.monotonic() + 60)
    assert host.counts == [1, 1, 1]


# The status.


async def test_one_ready_runner_is_enough(host: Host) -> None:
    """The model is ready while one runner is; the list has the state of each."""
    host.runners[0].liveness.identity = None
    host.runners[2].liveness.identity = "second"
    host.runners[2].proxy.statuses = [answering(BROKEN)]
    statuses = await host.pool.statuses()
    assert [status.state for status in statuses] == ["loading", "ok", "error"]
    assert statuses[0].detail == RESTARTED
    assert (await host.pool.status()).state == "ok"
    host.runners[1].liveness.identity = None
    assert await host.pool.status() == EngineStatus(state="loading", detail=RESTARTED)


def test_overall_status_is_of_the_first_that_is_ready() -> None:
    """Names and memory of the first ready one count, and an error only where nothing else is left."""
    ready = [EngineStatus(state="ok", gpu_name=name) for name in ("H100", "H200")]
    assert overall_status([BROKEN, LOADING, *ready]) == ready[0]
    assert overall_status([BROKEN, LOADING]) == LOADING
    assert overall_status([BROKEN]) == BROKEN


async def test_hanging_runner_does_not_delay_the_status(host: Host) -> None:
    """While one runner does not answer, the states of the others are returned before its call is given up."""
    hanging = host.runners[1]
    hanging.liveness.identity = "second"
    hanging.proxy.statuses = [silent]
    assert [status.state for status in await host.pool.statuses()] == ["ok", "loading", "ok"]
    assert (hanging.proxy.calls.count("status"), hanging.proxy.cancelled) == (2, 0)
