"""The parts of the supervision that a real server meets too rarely to be tested on one."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
from bentoml._internal.utils import circus as bentoml_circus
from circus.arbiter import Arbiter
from circus.exc import ConflictError

from sam3_runner import supervision

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _their_arbiter(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("start", "stop"):
        monkeypatch.setattr(bentoml_circus.Arbiter, name, getattr(bentoml_circus.Arbiter, name))


def test_signal_to_stop_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A supervisor that is told to stop while it starts a process stops a moment later."""
    later: list[tuple[Any, ...]] = []
    stops = iter([ConflictError("busy"), None])

    def stop(_arbiter: object) -> str:
        if error := next(stops):
            raise error
        return "stopping"

    monkeypatch.setattr(Arbiter, "stop", stop)
    supervision.supervise()
    arbiter: Any = SimpleNamespace(
        exit_stack=contextlib.ExitStack(),
        loop=SimpleNamespace(call_later=lambda _delay_s, call, *arguments: later.append((call, *arguments))),
    )
    bentoml_circus.Arbiter.stop(arbiter)
    [(call, *arguments)] = later
    assert call(*arguments) == "stopping"


async def test_looks_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The supervisor looks for dead processes for ever: not while it is busy, and after an error again."""
    looks, later = [], []
    monkeypatch.setattr(bentoml_circus.Arbiter, "start", lambda *_arguments: None)
    supervision.supervise()

    async def manage_watchers() -> None:
        looks.append("look")
        raise OSError("no more processes")

    watcher = SimpleNamespace(respawn=False, hooks={})
    arbiter: Any = SimpleNamespace(
        watchers=[watcher],
        ctrl=SimpleNamespace(check_delay=10_000),
        loop=SimpleNamespace(call_later=lambda _delay_s, call: later.append(call)),
        manage_watchers=manage_watchers,
        _exclusive_running_command="arbiter_start_watchers",
    )
    bentoml_circus.Arbiter.start(arbiter)
    assert watcher.respawn
    await later.pop()()
    assert looks == []
    arbiter._exclusive_running_command = None
    for times in (1, 2):
        await later.pop()()
        assert len(looks) == times
    assert len(later) == 1
