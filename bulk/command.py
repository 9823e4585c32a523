"""What `sam3 bulk` calls: its arguments, and the process that runs with them.

Loads little: this process does nothing but wait.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process, resource_tracker
from threading import Thread
from typing import TYPE_CHECKING

from bulk.errors import UNAVAILABLE
from bulk.settings import DEFAULT_MAX_WAIT_S, DEFAULT_SHARD_PICTURES
from outputs.refinement import Refinement

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

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
    # Until the child can end by them, they wait: it inherits the mask. (The tracker's start would clear it.)
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    child.start()
    sender.close()

    def interrupt(*_: object) -> None:
        os.kill(child.pid or 0, signal.SIGINT)

    for number in STOP_SIGNALS:
        signal.signal(number, interrupt)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    try:
        exit_code: int = receiver.recv()
    except EOFError:
        sys.stderr.write("sam3: Ray has ended unexpectedly; the same command goes on from here\n")
        return UNAVAILABLE
    child.join(CHILD_END_S)
    child.kill()  # Ray's threads may hold it; what counts is stored
    return exit_code


def _run_in_child(arguments: Arguments, sender: Connection) -> None:
    # A terminal's Ctrl-C reaches the parent alone, which sends it on once.
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
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
    except KeyboardInterrupt:
        sys.stderr.write("sam3: interrupted; the same command goes on from here\n")
        exit_code = INTERRUPTED
    sender.send(exit_code)
