"""The patch of BentoML's batch dispatcher."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from bentoml._internal.marshal import dispatcher
from bentoml._internal.utils import alg

from bentoml_patches.dispatcher import MAX_BATCH_WAIT_S, BoundedOptimizer, patch

pytestmark = pytest.mark.anyio

UNPATCHED = next(kind for kind in BoundedOptimizer.__mro__ if kind.__module__ == dispatcher.__name__)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _unpatched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "Optimizer", UNPATCHED)
    for module in (dispatcher, alg):
        monkeypatch.setattr(module, "time", time)


def after_a_burst(optimizer: Any) -> float:
    """The wait that an optimizer has learnt from many callers whose requests queued for seconds."""
    for batch in range(60):
        optimizer.log_outbound(8, 4.0, 0.5 + batch % 3 / 100)
    optimizer.trigger_refresh()
    return float(optimizer.wait)


def test_wait_is_bounded() -> None:
    """After a burst BentoML's own estimate is seconds; ours is at most 5 ms."""
    assert after_a_burst(UNPATCHED(1.0)) == pytest.approx(4.0)
    assert after_a_burst(BoundedOptimizer(1.0)) == MAX_BATCH_WAIT_S <= 0.005


def test_short_waits_are_kept() -> None:
    """A wait below the bound is left as BentoML learnt it."""
    optimizer = BoundedOptimizer(1.0)
    for _ in range(10):
        optimizer.log_outbound(1, 0.001, 0.02)
    optimizer.trigger_refresh()
    assert optimizer.wait == pytest.approx(0.001)


def test_dispatchers_use_it() -> None:
    """After the patch every dispatcher that BentoML makes has the bounded estimate."""
    patch()
    made: Any = dispatcher.CorkDispatcher(1000, 8, fallback=lambda: None)
    assert isinstance(made.optimizer, BoundedOptimizer)


async def answers_when_the_clock_jumps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The answers to twenty calls that wait for the first one while the wall clock is set forward."""
    begun, goes_on = asyncio.Event(), asyncio.Event()

    async def double(batch: tuple[str, ...]) -> list[str]:
        begun.set()
        await goes_on.wait()
        return [each * 2 for each in batch]

    made: Any = dispatcher.CorkDispatcher(60_000, 1, fallback=lambda: "late", get_batch_size=lambda _: 1)
    call = made(double)
    calls = [asyncio.ensure_future(call(str(caller))) for caller in range(20)]
    await begun.wait()
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 3600)
    goes_on.set()
    answers: list[str] = await asyncio.gather(*calls)
    return answers


async def test_clock_that_is_set_makes_no_call_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that wait for the model are answered when the wall clock jumps; without the patch they fail."""
    assert "late" in await answers_when_the_clock_jumps(monkeypatch)
    monkeypatch.undo()
    patch()
    assert await answers_when_the_clock_jumps(monkeypatch) == [str(caller) * 2 for caller in range(20)]
