"""The processes of one server: what dies is started anew, and a stop lets tasks in flight end.

A process that could only fail again ends the server instead (`end_server`).

BentoML's supervisor starts an API worker's and the runner's processes as its children. `supervise` is for
its process; the others are for theirs.
"""

from __future__ import annotations

import asyncio
import atexit
import errno
import logging
import os
import signal
import socket
import sys
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import click
import psutil
from bentoml._internal.utils import circus as bentoml_circus
from circus.arbiter import Arbiter
from circus.exc import ConflictError
from prometheus_client import multiprocess

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from types import FrameType

    from circus.watcher import Watcher

logger = logging.getLogger("bentoml.sam3")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
LOOK_S = 0.5
"""How often the supervisor looks for dead processes, and they for it."""
LEAVE_S = 3.5
"""Time for what is in flight when the supervisor has died."""
STOP_AGAIN_S = 0.05
MAX_PORT = 65535
HOPELESS = 78
"""Exit status of a process that would fail again, however often it is started: EX_CONFIG of sysexits.h."""
UNUSABLE = {
    errno.EADDRINUSE: "stop the program that listens there, or name another port with --port (BENTOML_PORT)",
    errno.EADDRNOTAVAIL: "name an address of this machine with --host (BENTOML_HOST)",
    errno.EACCES: "name a port from 1024 on with --port (BENTOML_PORT), or give this server's user the right",
}
"""What to do about an address that cannot be listened on."""


def supervise() -> None:
    """Make BentoML's supervisor start every dead process anew, and remove the sockets between them last.

    By default it looks every ten seconds, starts nothing anew in a container, removes the sockets first,
    and takes commands on a port of the loopback. A port that cannot be had, and a process that leaves by
    `end_server`, end the supervisor with a sentence. Call it in its process before it starts the others
    (private names of the pinned bentoml 1.4.40).
    """
    start = bentoml_circus.Arbiter.start

    def start_supervised(arbiter: bentoml_circus.Arbiter, cb: Callable[[Any], Any] | None = None) -> None:
        _refuse_port(arbiter)
        _wait_by_monotonic_time(arbiter)
        _take_no_commands(arbiter)
        _look_often(arbiter)
        hopeless: list[str] = []
        for watcher in arbiter.watchers:
            watcher.respawn = True
            watcher.hooks["after_reap"] = partial(_tell_of_death, hopeless)
        try:
            start(arbiter, cb)
        except RuntimeError:  # "No active process found": the last one of its kind has left for good
            if not hopeless:
                raise
        if hopeless:
            arbiter.exit_stack.close()
            sys.exit(f"cannot serve: {hopeless[0]} has ended for good, and said why above")

    bentoml_circus.Arbiter.start = start_supervised  # type: ignore[method-assign, assignment]
    bentoml_circus.Arbiter.stop = _stop  # type: ignore[method-assign, assignment]


def _take_no_commands(arbiter: bentoml_circus.Arbiter) -> None:
    """Keep the supervisor's control and its events inside its process, where nobody else can reach them.

    On their ports any process of the machine may ask for the environment, which holds the API key and the
    stores' secrets, and may stop the server. Nothing but `bentoml serve --reload` uses them.
    """
    if any(arbiter.endpoint in str(watcher.cmd) for watcher in arbiter.watchers):
        logger.warning("--reload has no effect: this server's supervisor takes no commands")
    arbiter.endpoint = arbiter.ctrl.endpoint = "inproc://control"
    arbiter.pubsub_endpoint = "inproc://events"


def _wait_by_monotonic_time(arbiter: bentoml_circus.Arbiter) -> None:
    """Let nothing in the supervisor wait by the wall clock: set back by an hour, it would do so for an hour.

    Tornado's timers go by `IOLoop.time`, circus' pause after a start by the time at which it began.
    """
    arbiter.loop.time = time.monotonic
    for watcher in arbiter.watchers:
        watcher.spawn_process = _without_start_time(watcher.spawn_process)


def _without_start_time(spawn_process: Callable[..., float | bool]) -> Callable[..., bool]:
    """The same, but that it returns whether a process was started, and not when."""

    def spawn(*arguments: object) -> bool:
        return spawn_process(*arguments) is not False

    return spawn


def _look_often(arbiter: bentoml_circus.Arbiter) -> None:
    """Look for dead processes twice a second, as long as this process lives."""
    arbiter.ctrl.check_delay = -1

    async def look() -> None:
        # One command at a time: while it starts its first processes, or stops, a look would be an error.
        if not arbiter._exclusive_running_command:  # noqa: SLF001
            try:
                await arbiter.manage_watchers()
            except Exception:
                # Whatever it was, the next look may do better; without it dead processes stay dead.
                logger.exception("the supervisor could not look after its processes")
        arbiter.loop.call_later(LOOK_S, look)

    arbiter.loop.call_later(LOOK_S, look)


def _stop(arbiter: bentoml_circus.Arbiter) -> object:
    try:
        stopping = Arbiter.stop(arbiter)
    except ConflictError:
        # It is just starting a process; the signal to stop comes once, and must not be lost.
        return arbiter.loop.call_later(STOP_AGAIN_S, _stop, arbiter)
    atexit.register(arbiter.exit_stack.close)
    return stopping


def _tell_of_death(
    hopeless: list[str],
    *,
    watcher: Watcher,
    arbiter: bentoml_circus.Arbiter,
    process_pid: int,
    exit_code: int,
    **_: object,
) -> None:
    # What it had in progress would be counted for ever.
    multiprocess.mark_process_dead(  # type: ignore[no-untyped-call]
        process_pid, watcher.env["PROMETHEUS_MULTIPROC_DIR"]
    )
    if watcher.is_stopping():
        return
    process = f"process {process_pid} ({watcher.name})"
    if exit_code == HOPELESS:
        hopeless.append(process)
        watcher.respawn = False
        if watcher.processes:  # without one the supervisor stops by itself
            arbiter.loop.add_callback(_stop, arbiter)
    else:
        logger.warning("%s ended with status %s: another is started", process, exit_code)


def _refuse_port(arbiter: bentoml_circus.Arbiter) -> None:
    """Try the address that the supervisor is about to listen on, with its own options."""
    command = click.get_current_context(silent=True)
    asked = command.params.get("port") if command else None
    if asked is not None and not 0 <= asked <= MAX_PORT:  # the system would take it modulo 65536
        arbiter.exit_stack.close()
        sys.exit(f"cannot start: --port (or BENTOML_PORT) must be at most {MAX_PORT}, not {asked}")
    for theirs in arbiter.sockets.values():
        if theirs.is_unix:
            continue
        with socket.socket(theirs.family, theirs.socktype) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind((theirs.host, theirs.port))
                trial.listen()
            except OSError as error:
                arbiter.exit_stack.close()
                mend = UNUSABLE.get(error.errno or 0, "name another with --port and --host")
                sys.exit(
                    f"cannot start: port {theirs.port} of {theirs.host} cannot be used "
                    f"({error.strerror}): {mend}"
                )


def end_server() -> NoReturn:
    """End this process, and with it the server: what is wrong was logged, and will not pass by itself."""
    os._exit(HOPELESS)


def outlive_siblings(timeout_s: float) -> None:
    """From now on a stop signal takes effect when the other processes of the same parent are gone.

    BentoML's supervisor signals the API workers and the runner together. The workers finish their
    requests first; those still need the runner. Call it from the main thread, after the server has set
    its own handlers.

    Args:
        timeout_s: waits no longer than this.
    """
    for stop_signal in STOP_SIGNALS:
        _defer(stop_signal, os.getppid(), timeout_s)


def when_told_to_stop(begin: Callable[[], Coroutine[None, None, None]]) -> None:
    """Begin to stop at the signal, before the server has ended its last request, which it waits for.

    Call it in the main thread, inside the event loop that serves, after the server has set its own handlers.
    """
    loop, beginnings = asyncio.get_running_loop(), set()

    def begin_in_loop() -> None:
        beginning = loop.create_task(begin())
        beginnings.add(beginning)
        beginning.add_done_callback(beginnings.discard)

    def also(stop_signal: signal.Signals) -> None:
        stop: Any = signal.getsignal(stop_signal)

        def on_signal(number: int, frame: FrameType | None) -> None:
            loop.call_soon_threadsafe(begin_in_loop)
            if callable(stop):
                stop(number, frame)

        signal.signal(stop_signal, on_signal)

    for stop_signal in STOP_SIGNALS:
        also(stop_signal)


def _defer(stop_signal: signal.Signals, parent_pid: int, timeout_s: float) -> None:
    stop_now: Any = signal.getsignal(stop_signal)
    alone = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if alone.is_set():
            stop_now(number, frame)
        else:
            threading.Thread(target=wait_for_siblings, name="wait-for-siblings", daemon=True).start()

    def wait_for_siblings() -> None:
        psutil.wait_procs(_siblings(parent_pid), timeout=timeout_s)
        alone.set()
        os.kill(os.getpid(), stop_signal)

    signal.signal(stop_signal, on_signal)


def _siblings(parent_pid: int) -> list[psutil.Process]:
    if os.getppid() != parent_pid:  # it is gone; whose child this is now, has children of others
        return []
    try:
        children = psutil.Process(parent_pid).children()
    except psutil.NoSuchProcess:
        return []
    return [child for child in children if child.pid != os.getpid()]


def leave_with(is_alive: Callable[[], bool], *, stop_first: bool) -> None:
    """From now on this process ends soon after its supervisor, which may be killed without a last word.

    What stays behind would hold the port and the model's memory, and nobody would start it anew.

    Args:
        is_alive: does the supervisor run; asked twice a second.
        stop_first: begin a clean stop at once; else serve on until the end, `LEAVE_S` later.
    """

    def watch() -> None:
        while is_alive():
            time.sleep(LOOK_S)
        logger.error("the supervisor has died: process %d leaves", os.getpid())
        if stop_first:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(LEAVE_S)
        os._exit(1)

    threading.Thread(target=watch, name="watch-supervisor", daemon=True).start()
