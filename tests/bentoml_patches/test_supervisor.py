"""The patch of the supervisor: what a real server meets too rarely to be tested on one."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from bentoml import serving
from bentoml._internal.utils import circus as bentoml_circus
from circus.arbiter import Arbiter
from circus.exc import ConflictError
from circus.process import Process

from bentoml_patches import supervisor
from commands.local_server import ROOT
from tests.faults.clock import Clock, missing

if TYPE_CHECKING:
    from pathlib import Path

TIMEOUT_S = 60.0

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _unpatched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("start", "stop"):
        monkeypatch.setattr(bentoml_circus.Arbiter, name, getattr(bentoml_circus.Arbiter, name))
    monkeypatch.setattr(Process, "status", Process.status)


def test_signal_to_stop_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A supervisor that gets the stop signal while it starts a process stops a moment later."""
    later: list[tuple[Any, ...]] = []
    stops = iter([ConflictError("busy"), None])

    def stop(_arbiter: object) -> str:
        if error := next(stops):
            raise error
        return "stopping"

    monkeypatch.setattr(Arbiter, "stop", stop)
    supervisor.patch("runner_")
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
    supervisor.patch("runner_")

    async def manage_watchers() -> None:
        looks.append("look")
        raise OSError("no more processes")

    watcher = SimpleNamespace(respawn=False, hooks={}, cmd="python", spawn_process=lambda: 1.0)
    arbiter: Any = SimpleNamespace(
        watchers=[watcher],
        endpoint="tcp://127.0.0.1:1",
        sockets={},
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


def test_the_patch_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """BentoML's own looks every ten seconds, listens for commands, and restarts nothing in a container."""
    arbiter = bentoml_circus.create_standalone_arbiter([])
    assert arbiter.check_delay == 10
    assert arbiter.endpoint.startswith("tcp://")
    monkeypatch.setattr(serving, "running_inside_container", lambda: True)
    assert serving.create_watcher("runner", [], working_dir=".").respawn is False


SUPERVISOR = """
import os, pathlib, struct, sys
from bentoml._internal.utils.circus import create_standalone_arbiter
from circus.watcher import Watcher
from bentoml_patches import supervisor

def set_back(**_):
    with open(os.environ["WRONG_CLOCK"], "r+b") as clock:
        clock.write(struct.pack("l", 0))
    return True

def started(_):
    print("started", flush=True)
    arbiter.stop()

supervisor.patch("runner_")
sleep = ["-c", "import time; time.sleep(600)"]
child = Watcher("child", sys.executable, args=sleep, hooks={"after_spawn": (set_back, False)})
arbiter = create_standalone_arbiter([child])
arbiter.start(cb=started)
"""


SLOW_END = """
import ctypes, os, sys, threading, time

def end_later():
    time.sleep(1.5)
    os._exit(7)

threading.Thread(target=end_later).start()
ctypes.CDLL(None).pthread_exit(None)
"""
"""Its first thread is a zombie for 1.5 s before the process ends."""

DEATHS = """
import sys
from circus.process import Process
from bentoml._internal.utils.circus import create_standalone_arbiter
from circus.watcher import Watcher
from bentoml_patches import supervisor

status, [patched, child_code] = Process.status, sys.argv[1:]
starts = []

def count(**_):
    starts.append(1)
    if len(starts) == 2:
        arbiter.loop.add_callback(arbiter.stop)
    return True

supervisor.patch("runner_")
if patched == "no":
    Process.status = status
environment = {"PROMETHEUS_MULTIPROC_DIR": "/nowhere"}
hooks = {"after_spawn": (count, False)}
child = Watcher("child", sys.executable, args=["-c", child_code], env=environment, hooks=hooks)
arbiter = create_standalone_arbiter([child])
arbiter.start()
"""


@pytest.mark.parametrize("patched", ["yes", "no"])
def test_slow_end_is_not_missed(patched: str) -> None:
    """The exit status of a process whose threads end one after another is read; circus' own misses it."""
    ended = subprocess.run(
        [sys.executable, "-c", DEATHS, patched, SLOW_END],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        timeout=TIMEOUT_S,
        check=True,
    )
    assert ("(child) ended with status 7: it is restarted" in ended.stderr) == (patched == "yes")


def test_clock_that_is_set_back_while_processes_start(tmp_path: Path) -> None:
    """A supervisor whose clock is set back in the middle of a start goes on at once."""
    if reason := missing():
        pytest.skip(reason)
    clock = Clock(tmp_path, "supervisor")
    with clock.wrong_by(600):
        ended = subprocess.run(
            [sys.executable, "-c", SUPERVISOR],
            cwd=ROOT,
            env={**clock.environment(), "PATH": "/usr/bin:/bin"},
            stdout=subprocess.PIPE,
            timeout=TIMEOUT_S,
            check=True,
        )
    assert ended.stdout == b"started\n"
