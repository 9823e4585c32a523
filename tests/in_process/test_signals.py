"""Stop signals, and the end of a process whose supervisor has died."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

import psutil
import pytest

from processes import lifecycle
from processes.lifecycle import (
    EXIT_UNRECOVERABLE,
    STOP_SIGNALS,
    end_server,
    end_with_supervisor,
    on_stop_signal,
    outlive_siblings,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

pytestmark = pytest.mark.anyio

WAIT_S = 30.0
MOMENT_S = 0.1


class Server:
    """A stand-in for uvicorn: the handler of the stop signals."""

    def __init__(self) -> None:
        self.stops: list[int] = []
        self.stopped = threading.Event()

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        self.stops.append(number)
        self.stopped.set()

    def stops_in_time(self) -> bool:
        """Wait for the handler.

        The waits are short, since the kernel may give the signal to another thread: Python then calls the
        handler only after the wait of this one.
        """
        until_s = time.monotonic() + WAIT_S
        while not self.stopped.wait(MOMENT_S) and time.monotonic() < until_s:
            pass
        return self.stopped.is_set()


@pytest.fixture
def server() -> Iterator[Server]:
    """A server that has set its handlers; the original ones are restored."""
    serving = Server()
    before = {number: signal.signal(number, serving) for number in STOP_SIGNALS}
    yield serving
    for number, handler in before.items():
        signal.signal(number, handler)


# An API worker.


@pytest.mark.parametrize("number", STOP_SIGNALS)
async def test_signal_runs_the_coroutine_and_the_servers_handler(
    server: Server, number: signal.Signals
) -> None:
    """The signal runs our coroutine in the event loop, and calls the server's handler."""
    begun = asyncio.Event()

    async def begin_stop() -> None:
        begun.set()

    on_stop_signal(begin_stop)
    assert not begun.is_set()
    signal.raise_signal(number)
    assert server.stops == [number]
    async with asyncio.timeout(WAIT_S):
        await begun.wait()


async def test_coroutine_runs_to_its_end(server: Server) -> None:
    """The coroutine runs to its end, also after the server's handler was called."""
    ended, go_on = asyncio.Event(), asyncio.Event()

    async def begin_stop() -> None:
        await go_on.wait()
        ended.set()

    on_stop_signal(begin_stop)
    signal.raise_signal(signal.SIGTERM)
    await asyncio.sleep(0)
    assert server.stops == [signal.SIGTERM]
    go_on.set()
    async with asyncio.timeout(WAIT_S):
        await ended.wait()


async def test_signal_without_a_previous_handler(server: Server) -> None:
    """The coroutine runs also if the signal had no handler."""
    del server
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    begun = asyncio.Event()

    async def begin_stop() -> None:
        begun.set()

    on_stop_signal(begin_stop)
    signal.raise_signal(signal.SIGTERM)
    async with asyncio.timeout(WAIT_S):
        await begun.wait()


# The runner, which outlives the API workers.


class Sibling:
    """A stand-in for a process of the same parent."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.ended = threading.Event()


class Family:
    """A stand-in for psutil, with these children of our parent."""

    NoSuchProcess = psutil.NoSuchProcess

    def __init__(self, *siblings: Sibling) -> None:
        self.siblings = siblings
        self.parent_is_gone = False
        self.waits = 0

    def Process(self, pid: int) -> Any:  # noqa: N802 - psutil's name
        assert pid == os.getppid()
        if self.parent_is_gone:
            raise psutil.NoSuchProcess(pid)
        return self

    def children(self) -> list[Sibling]:
        return [Sibling(os.getpid()), *self.siblings]

    def wait_procs(self, processes: list[Sibling], timeout: float) -> None:
        """Like psutil's: returns when all have ended, or after the timeout."""
        assert os.getpid() not in {each.pid for each in processes}
        self.waits += 1
        for each in processes:
            each.ended.wait(timeout)


def family_of(monkeypatch: pytest.MonkeyPatch, *siblings: Sibling) -> Family:
    """Make these the siblings of this process."""
    family = Family(*siblings)
    monkeypatch.setattr(lifecycle, "psutil", family)
    return family


@contextmanager
def threads_ended() -> Iterator[None]:
    """At the end of the block, wait for the threads that it started."""
    before = {*threading.enumerate()}
    yield
    for thread in {*threading.enumerate()} - before:
        thread.join(WAIT_S)
        assert not thread.is_alive()


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_runner_stops_after_the_workers(
    server: Server, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """The signal takes effect when all siblings have ended."""
    workers = [Sibling(1), Sibling(2)]
    family_of(monkeypatch, *workers)
    outlive_siblings(WAIT_S)
    with threads_ended():
        signal.raise_signal(number)
        workers[0].ended.set()
        assert not server.stopped.wait(MOMENT_S)
        workers[1].ended.set()
        assert server.stops_in_time()
    assert server.stops == [number]


def test_runner_does_not_wait_for_other_runners(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal takes effect when the workers have ended, while other runners wait as well."""
    worker, other_runner = Sibling(1), Sibling(2)
    family_of(monkeypatch, worker, other_runner)
    outlive_siblings(WAIT_S, except_for=lambda: {other_runner.pid})
    with threads_ended():
        signal.raise_signal(signal.SIGTERM)
        assert not server.stopped.wait(MOMENT_S)
        worker.ended.set()
        assert server.stops_in_time()


def test_runner_without_siblings_stops_immediately(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without siblings the signal takes effect immediately."""
    family_of(monkeypatch)
    outlive_siblings(WAIT_S)
    with threads_ended():
        signal.raise_signal(signal.SIGTERM)
        assert server.stops_in_time()


def test_runner_stops_after_the_timeout(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the timeout the signal takes effect, though a sibling is left."""
    family_of(monkeypatch, Sibling(1))
    outlive_siblings(0.05)
    with threads_ended():
        signal.raise_signal(signal.SIGTERM)
        assert server.stops_in_time()


def test_second_signal_does_not_stop_the_runner_early(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second signal does not take effect before the siblings have ended."""
    worker = Sibling(1)
    family_of(monkeypatch, worker)
    outlive_siblings(WAIT_S)
    with threads_ended():
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
        assert not server.stopped.wait(MOMENT_S)
        worker.ended.set()
        assert server.stops_in_time()


def test_runner_with_a_dead_supervisor_stops_immediately(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a dead supervisor the signal takes effect immediately."""
    family = family_of(monkeypatch, Sibling(1))
    outlive_siblings(WAIT_S)
    family.parent_is_gone = True
    with threads_ended():
        signal.raise_signal(signal.SIGTERM)
        assert server.stops_in_time()


def test_orphaned_runner_stops_immediately(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The children of an orphan's new parent are not waited for."""
    family_of(monkeypatch, Sibling(1))
    outlive_siblings(WAIT_S)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    with threads_ended():
        signal.raise_signal(signal.SIGTERM)
        assert server.stops_in_time()


# The end of a process.


class Exits:
    """A stand-in for `os._exit`, in any thread."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.called = threading.Event()

    def __call__(self, status: int) -> None:
        self.status = status
        self.called.set()


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> Exits:
    calls = Exits()
    monkeypatch.setattr(os, "_exit", calls)
    monkeypatch.setattr(lifecycle, "POLL_S", 0.005)
    monkeypatch.setattr(lifecycle, "ORPHAN_TIME_S", 0.0)
    return calls


@pytest.mark.parametrize("stop_first", [True, False])
def test_process_ends_with_its_supervisor(
    server: Server, exits: Exits, caplog: pytest.LogCaptureFixture, *, stop_first: bool
) -> None:
    """After its supervisor's death a process logs it and ends; `stop_first` sends SIGTERM before."""
    is_dead = threading.Event()
    with threads_ended():
        end_with_supervisor(lambda: not is_dead.is_set(), stop_first=stop_first)
        assert not exits.called.wait(MOMENT_S)
        assert caplog.records == []
        is_dead.set()
        assert exits.called.wait(WAIT_S)
    assert exits.status == 1
    assert server.stops == ([signal.SIGTERM] if stop_first else [])
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert record.getMessage() == f"the supervisor has died: process {os.getpid()} ends"


def test_process_ends_after_the_orphan_time(
    server: Server, exits: Exits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends ORPHAN_TIME_S after the clean stop began."""
    waits: list[float] = []
    monkeypatch.setattr(lifecycle, "ORPHAN_TIME_S", 3.5)
    monkeypatch.setattr(lifecycle, "time", SimpleNamespace(sleep=waits.append))
    with threads_ended():
        end_with_supervisor(lambda: False, stop_first=True)
        assert server.stops_in_time()
        assert exits.called.wait(WAIT_S)
    assert waits == [3.5]


def test_end_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """`end_server` ends the process with the status that ends the server."""

    def end(status: int) -> NoReturn:
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(SystemExit) as ended:
        end_server()
    assert ended.value.code == EXIT_UNRECOVERABLE == 78
