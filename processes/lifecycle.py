"""How the server's processes end: at a stop, with their supervisor, or for good.

bentoml_patches/supervisor.py restarts those that die.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any, NoReturn

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Coroutine
    from types import FrameType

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
POLL_S = 0.5
"""How often the supervisor checks its processes, and they check their supervisor."""
ORPHAN_TIME_S = 3.5
"""Time for the work in progress after the supervisor has died."""
ANSWER_TIME_S = 0.5
"""Time for the answers of a process that ends by itself."""
EXIT_UNRECOVERABLE = 78
"""Exit status of a process that would fail again after every restart: EX_CONFIG of sysexits.h."""


def end_server() -> NoReturn:
    """End this process, and with it the server: the error was logged, and a restart would not mend it."""
    os._exit(EXIT_UNRECOVERABLE)


def end_process_soon() -> None:
    """End this process in `ANSWER_TIME_S` with status 1, so that its supervisor starts it anew; returns now.

    Its answers to the calls in progress are sent meanwhile. No clean-up runs: it may never end where the
    process' GPU has failed.
    """
    logger.error("process %d ends, and is started anew", os.getpid())
    ending = threading.Timer(ANSWER_TIME_S, os._exit, [1])
    ending.daemon = True
    ending.start()


def outlive_siblings(timeout_s: float, except_for: Callable[[], Collection[int]] = frozenset) -> None:
    """From now on a stop signal takes effect when the other processes of the same parent have ended.

    BentoML's supervisor signals the API workers and the runners together. The workers finish their
    requests first, and those need the runners. Call it from the main thread, after the server has set
    its own handlers.

    Args:
        timeout_s: the longest wait.
        except_for: the pids of processes that are not waited for, at the signal: the other runners, which
            wait as this one does.
    """
    for stop_signal in STOP_SIGNALS:
        _defer(stop_signal, os.getppid(), timeout_s, except_for)


def on_stop_signal(begin_stop: Callable[[], Coroutine[None, None, None]]) -> None:
    """Run `begin_stop` at the stop signal, before the server waits for its last request.

    Call it in the main thread, inside the event loop that serves, after the server has set its own handlers.
    """
    loop, running = asyncio.get_running_loop(), set()

    def begin_in_loop() -> None:
        task = loop.create_task(begin_stop())
        running.add(task)
        task.add_done_callback(running.discard)

    def chain(stop_signal: signal.Signals) -> None:
        next_handler: Any = signal.getsignal(stop_signal)

        def on_signal(number: int, frame: FrameType | None) -> None:
            loop.call_soon_threadsafe(begin_in_loop)
            if callable(next_handler):
                next_handler(number, frame)

        signal.signal(stop_signal, on_signal)

    for stop_signal in STOP_SIGNALS:
        chain(stop_signal)


def _defer(
    stop_signal: signal.Signals, parent_pid: int, timeout_s: float, except_for: Callable[[], Collection[int]]
) -> None:
    stop_now: Any = signal.getsignal(stop_signal)
    siblings_ended = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if siblings_ended.is_set():
            stop_now(number, frame)
        else:
            threading.Thread(target=wait_for_siblings, name="wait-for-siblings", daemon=True).start()

    def wait_for_siblings() -> None:
        spared = except_for()
        awaited = [sibling for sibling in _siblings(parent_pid) if sibling.pid not in spared]
        psutil.wait_procs(awaited, timeout=timeout_s)
        siblings_ended.set()
        os.kill(os.getpid(), stop_signal)

    signal.signal(stop_signal, on_signal)


def _siblings(parent_pid: int) -> list[psutil.Process]:
    if os.getppid() != parent_pid:  # the parent has died, and the new one has children of other programs
        return []
    try:
        children = psutil.Process(parent_pid).children()
    except psutil.NoSuchProcess:
        return []
    return [child for child in children if child.pid != os.getpid()]


def end_with_supervisor(is_alive: Callable[[], bool], *, stop_first: bool) -> None:
    """From now on this process ends soon after its supervisor, which may be killed without a signal to it.

    A process that stayed would hold the port and the model's memory, and nobody would restart it.

    Args:
        is_alive: whether the supervisor runs; called every `POLL_S`.
        stop_first: begin a clean stop at once; otherwise serve until the end, `ORPHAN_TIME_S` later.
    """

    def watch() -> None:
        while is_alive():
            time.sleep(POLL_S)
        logger.error("the supervisor has died: process %d ends", os.getpid())
        if stop_first:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ORPHAN_TIME_S)
        os._exit(1)

    threading.Thread(target=watch, name="watch-supervisor", daemon=True).start()
