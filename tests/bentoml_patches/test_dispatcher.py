"""The patch of BentoML's batch dispatcher."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import TYPE_CHECKING, Any

import pytest
from bentoml._internal.marshal import dispatcher
from bentoml._internal.utils import alg

from bentoml_patches.dispatcher import patch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

pytestmark = pytest.mark.anyio

TIMEOUT_S = 20.0
LONG_S = 3600.0
CALLERS = 20


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch, unpatched: Any) -> Any:
    """BentoML's module with our patch, and with nothing of it after the test."""
    original = unpatched(dispatcher)
    for name in ("Optimizer", "NonBlockSema"):
        monkeypatch.setattr(dispatcher, name, getattr(original, name))
    train = original.CorkDispatcher.train_optimizer
    monkeypatch.setattr(dispatcher.CorkDispatcher, "train_optimizer", train)
    for module in (dispatcher, alg):
        monkeypatch.setattr(module, "time", time)
    patch()
    return dispatcher


def after_a_burst(optimizer: Any) -> float:
    """The wait that an optimizer has learnt from many callers whose requests queued for seconds."""
    for batch in range(60):
        optimizer.log_outbound(8, 4.0, 0.5 + batch % 3 / 100)
    optimizer.trigger_refresh()
    return float(optimizer.wait)


def test_burst_teaches_no_wait(patched: Any, unpatched: Any) -> None:
    """After a burst BentoML's own estimate is seconds; ours is none."""
    assert after_a_burst(unpatched(dispatcher).Optimizer(1.0)) == pytest.approx(4.0)
    assert after_a_burst(patched.Optimizer(1.0)) == 0


def dispatching(
    module: Any, work: Callable[[Sequence[str]], Any], *, max_batch: int, max_latency_s: float = 60.0
) -> Any:
    """`work` behind a dispatcher of BentoML's, as the runner's method is; one that is late gives "late"."""
    made = module.CorkDispatcher(
        max_latency_s * 1000, max_batch, fallback=lambda: "late", get_batch_size=lambda _: 1
    )
    # Whatever waits for a moment waits for ever: the tests then end by their timeout.
    made.TICKET_INTERVAL = LONG_S
    return made(work)


async def double(batch: Sequence[str]) -> list[str]:
    return [each * 2 for each in batch]


async def test_lone_requests_wait_for_nobody(patched: Any) -> None:
    """Requests one by one, from the first, never wait for others to come."""
    call = dispatching(patched, double, max_batch=8)
    async with asyncio.timeout(TIMEOUT_S):
        assert [await call(str(caller)) for caller in range(CALLERS)] == [
            str(caller) * 2 for caller in range(CALLERS)
        ]


async def test_several_batches_are_in_progress_at_once(patched: Any) -> None:
    """Requests that come during a batch begin before it ends: the runner's scheduler orders them."""
    begun: list[str] = []
    all_begun = asyncio.Event()

    async def together(batch: Sequence[str]) -> list[str]:
        begun.extend(batch)
        if len(begun) == CALLERS:
            all_begun.set()
        await all_begun.wait()
        return await double(batch)

    call = dispatching(patched, together, max_batch=4)
    async with asyncio.timeout(TIMEOUT_S):
        answers = await asyncio.gather(*(call(str(caller)) for caller in range(CALLERS)))
    assert answers == [str(caller) * 2 for caller in range(CALLERS)]


async def test_batches_are_bounded(patched: Any) -> None:
    """No batch has more requests than the service allows."""
    sizes: list[int] = []

    async def counted(batch: Sequence[str]) -> list[str]:
        sizes.append(len(batch))
        return await double(batch)

    call = dispatching(patched, counted, max_batch=4)
    async with asyncio.timeout(TIMEOUT_S):
        await asyncio.gather(*(call(str(caller)) for caller in range(CALLERS)))
    assert sum(sizes) == CALLERS
    assert max(sizes) <= 4


async def answers_when_the_clock_jumps(module: Any) -> list[str]:
    """The answers to calls that come together, while the wall clock is set forward again and again."""
    call = dispatching(module, double, max_batch=8)
    async with asyncio.timeout(TIMEOUT_S):
        answers: list[str] = await asyncio.gather(*(call(str(caller)) for caller in range(CALLERS)))
    return answers


async def test_clock_that_is_set_makes_no_call_late(
    patched: Any, unpatched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls are answered when the wall clock jumps; without the patch they fail."""
    now, readings = time.time, itertools.count()
    monkeypatch.setattr(time, "time", lambda: now() + LONG_S * next(readings))
    assert "late" in await answers_when_the_clock_jumps(unpatched(dispatcher))
    assert await answers_when_the_clock_jumps(patched) == [str(caller) * 2 for caller in range(CALLERS)]
