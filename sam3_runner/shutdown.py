"""A stop that lets tasks in flight end: the runner and its socket stay until the API workers are gone."""

from __future__ import annotations

import atexit
import os
import signal
import threading
from typing import TYPE_CHECKING, Any

import psutil
from bentoml._internal.utils import circus as bentoml_circus
from circus.arbiter import Arbiter

if TYPE_CHECKING:
    from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def keep_sockets_until_the_end() -> None:
    """Make BentoML's supervisor remove the sockets between its processes last, not first.

    Call it in the supervisor's process before it starts the others (a private name of the pinned
    bentoml 1.4.39).
    """

    def stop(arbiter: bentoml_circus.Arbiter) -> object:
        atexit.register(arbiter.exit_stack.close)
        return Arbiter.stop(arbiter)

    bentoml_circus.Arbiter.stop = stop  # type: ignore[method-assign, assignment]


def outlive_siblings(timeout_s: float) -> None:
    """From now on a stop signal takes effect when the other processes of the same parent are gone.

    BentoML's supervisor signals the API workers and the runner together. The workers finish their
    requests first; those still need the runner. Call it from the main thread, after the server has set
    its own handlers.

    Args:
        timeout_s: waits no longer than this.
    """
    for stop_signal in STOP_SIGNALS:
        _defer(stop_signal, timeout_s)


def _defer(stop_signal: signal.Signals, timeout_s: float) -> None:
    stop_now: Any = signal.getsignal(stop_signal)
    alone = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if alone.is_set():
            stop_now(number, frame)
        else:
            threading.Thread(target=wait_for_siblings, name="wait-for-siblings", daemon=True).start()

    def wait_for_siblings() -> None:
        psutil.wait_procs(_siblings(), timeout=timeout_s)
        alone.set()
        os.kill(os.getpid(), stop_signal)

    signal.signal(stop_signal, on_signal)


def _siblings() -> list[psutil.Process]:
    try:
        children = psutil.Process(os.getppid()).children()
    except psutil.NoSuchProcess:  # the parent is gone already
        return []
    return [child for child in children if child.pid != os.getpid()]
