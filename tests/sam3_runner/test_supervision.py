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


def test_no_look_while_it_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the supervisor starts its first processes, its look for dead ones waits."""
    looks = []
    monkeypatch.setattr(bentoml_circus.Arbiter, "start", lambda *_arguments: None)
    supervision.supervise()
    watcher = SimpleNamespace(respawn=False, hooks={})
    arbiter: Any = SimpleNamespace(
        watchers=[watcher],
        ctrl=SimpleNamespace(check_delay=10_000),
        manage_watchers=lambda: looks.append("look"),
        _exclusive_running_command="arbiter_start_watchers",
    )
    bentoml_circus.Arbiter.start(arbiter)
    assert watcher.respawn
    assert arbiter.ctrl.check_delay <= 1000
    arbiter.manage_watchers()
    assert looks == []
    arbiter._exclusive_running_command = None
    arbiter.manage_watchers()
    assert looks == ["look"]
