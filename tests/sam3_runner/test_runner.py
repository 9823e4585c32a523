"""The mend of BentoML's batch dispatcher: what it learns in a burst must not slow lone requests."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from bentoml._internal.marshal import dispatcher
from bentoml._internal.utils import alg

from sam3_runner.engine import EngineConfig
from sam3_runner.runner import MAX_BATCH_WAIT_S, BoundedOptimizer, runner_service

pytestmark = pytest.mark.anyio

THEIRS = next(kind for kind in BoundedOptimizer.__mro__ if kind.__module__ == dispatcher.__name__)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _their_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "Optimizer", THEIRS)
    for module in (dispatcher, alg):
        monkeypatch.setattr(module, "time", time)


def after_a_burst(optimizer: Any) -> float:
    """The wait that an optimizer has learnt from many callers who queued for seconds."""
    for batch in range(60):
        optimizer.log_outbound(8, 4.0, 0.5 + batch % 3 / 100)
    optimizer.trigger_refresh()
    return float(optimizer.wait)


def test_wait_is_bounded() -> None:
    """After a burst BentoML's own estimate would wait seconds for company; ours at most 5 ms."""
    assert after_a_burst(THEIRS(1.0)) == pytest.approx(4.0)
    assert after_a_burst(BoundedOptimizer(1.0)) == MAX_BATCH_WAIT_S <= 0.005


def test_short_waits_are_kept() -> None:
    """A wait below the bound is left as BentoML learnt it."""
    optimizer = BoundedOptimizer(1.0)
    for _ in range(10):
        optimizer.log_outbound(1, 0.001, 0.02)
    optimizer.trigger_refresh()
    assert optimizer.wait == pytest.approx(0.001)


def test_dispatchers_use_it() -> None:
    """Once the runner is made, every dispatcher that BentoML makes has the bounded estimate."""
    runner_service(EngineConfig("demo"), timeout_s=10.0, gpu=False, on_start=lambda: None)
    made: Any = dispatcher.CorkDispatcher(1000, 8, fallback=lambda: None)
    assert isinstance(made.optimizer, BoundedOptimizer)


async def answers_when_the_clock_jumps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What twenty callers get whose calls wait for the first one, while the clock is set on by an hour."""
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
    return await asyncio.gather(*calls)


async def test_clock_that_is_set_makes_no_call_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that wait for the model are answered when the wall clock jumps; by BentoML's own, most fail."""
    assert "late" in await answers_when_the_clock_jumps(monkeypatch)
    monkeypatch.undo()
    runner_service(EngineConfig("demo"), timeout_s=10.0, gpu=False, on_start=lambda: None)
    assert await answers_when_the_clock_jumps(monkeypatch) == [str(caller) * 2 for caller in range(20)]


@pytest.mark.parametrize("gpu", [True, False])
def test_one_process_a_gpu(*, gpu: bool) -> None:
    """The runner is one process, and asks for a GPU only where there is one."""
    service: Any = runner_service(EngineConfig("demo"), timeout_s=10.0, gpu=gpu, on_start=lambda: None)
    assert service.config["workers"] == 1
    assert ("gpu" in service.config.get("resources", {})) == gpu
