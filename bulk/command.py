"""What `sam3 bulk` calls: its arguments, and the process that runs with them.

Loads little: this process does nothing but wait.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process, resource_tracker
from threading import Thread, Timer
from typing import TYPE_CHECKING

from bulk.errors import UNAVAILABLE
from bulk.settings import DEFAULT_MAX_WAIT_S, DEFAULT_SHARD_PICTURES
from outputs.refinement import Refinement

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

CHILD_END_S = 30.0
"""For Ray to end its processes."""
INTERRUPTED = 130
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, slots=True)
class Arguments:
    """Of the command line.

    Attributes:
        weights: as SAM3_WEIGHTS_PATH; None: weights/sam3.pt if it exists, else the demo checkpoint.
        ray_address: of a cluster, such as `auto`; None: a Ray of this machine.
        metrics_port: on loopback; None: no metrics.
        The others: see `Run` and `RunSettings`.
    """

    images: str
    prompts: tuple[str, ...]
    out: str
    weights: str | None = None
    score_threshold: float | None = None
    refinement: Refinement = field(default_factory=Refinement)
    write_masks: bool = True
    ray_address: str | None = None
    metrics_port: int | None = None
    shard_pictures: int = DEFAULT_SHARD_PICTURES
    max_wait_s: float = DEFAULT_MAX_WAIT_S
    background: bool = False


def run_command(arguments: Arguments) -> int:
    """Run, print, and return the exit code: see `bulk.errors`; 130 after Ctrl-C or SIGTERM.

    Ray ends the process that uses it without a word when its own processes are gone, so that is a child.
    """
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_run_in_child, args=(arguments, sender), name="sam3 bulk")
    interrupted = False

    def interrupt(*_: object) -> None:
        nonlocal interrupted
        interrupted = True
        if child.pid is None:
            return
        with suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGINT)
        killing = Timer(CHILD_END_S, child.kill)
        killing.daemon = True
        killing.start()

    for number in STOP_SIGNALS:
        signal.signal(number, interrupt)
    _start(child)
    sender.close()
    if interrupted:  # before it had a pid
        interrupt()
    try:
        exit_code: int = receiver.recv()
    except EOFError:
        if not interrupted:
            sys.stderr.write("sam3: Ray has ended unexpectedly; the same command goes on from here\n")
            return UNAVAILABLE
        exit_code = INTERRUPTED  # the signal went to Ray's processes too, and their end was the child's
    if exit_code == INTERRUPTED:
        sys.stderr.write("sam3: interrupted; the same command goes on from here\n")
    child.join(CHILD_END_S)
    child.kill()  # Ray's threads may hold it; what counts is stored
    return exit_code


def _start(child: SpawnProcess) -> None:
    """Start it so that stop signals wait until it can end by them: it inherits this thread's mask."""
    resource_tracker.ensure_running()  # its start would clear the mask
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    child.start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _run_in_child(arguments: Arguments, sender: Connection) -> None:
    # A terminal's Ctrl-C reaches the parent alone, which sends it on once.
    os.setsid()
    for number in STOP_SIGNALS:
        signal.signal(number, _interrupt_once)
    parent = parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(UNAVAILABLE)

    Thread(target=end_with_parent, daemon=True).start()
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        from bulk.checked_run import run_to_exit_code  # noqa: PLC0415 - the parent loads none of it

        exit_code = run_to_exit_code(arguments)
    except (KeyboardInterrupt, SystemExit):  # Ray's own handler of SIGTERM exits
        exit_code = INTERRUPTED
    except Exception:  # noqa: BLE001 - a bug: without an exit code the parent would blame Ray
        traceback.print_exc()
        sys.stderr.write(
            "sam3: this is a bug in sam3: please report it; the same command goes on from here\n"
        )
        exit_code = UNAVAILABLE
    sender.send(exit_code)


def _interrupt_once(*_: object) -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: None)
    raise KeyboardInterrupt
