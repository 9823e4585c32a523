"""BentoML's supervisor (circus' arbiter): restart every dead process, accept no commands, stop cleanly.

By default it looks for dead processes every ten seconds, restarts nothing in a container, and takes commands
on a port of the loopback interface. At a stop it ends the decoders under running tasks, and removes the
sockets between the processes before these have ended.
"""

from __future__ import annotations

import atexit
import errno
import logging
import socket
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import click
from bentoml._internal.utils import circus as bentoml_circus
from circus.arbiter import Arbiter
from circus.exc import ConflictError
from circus.process import DEAD_OR_ZOMBIE, RUNNING, Process
from prometheus_client import multiprocess

from processes.lifecycle import EXIT_UNRECOVERABLE, POLL_S

if TYPE_CHECKING:
    from collections.abc import Callable

    from circus.watcher import Watcher

logger = logging.getLogger(__name__)

STOP_RETRY_S = 0.05
MAX_PORT = 65535
ADDRESS_ERRORS = {
    errno.EADDRINUSE: "stop the program that listens there, or name another port with --port (BENTOML_PORT)",
    errno.EADDRNOTAVAIL: "name an address of this machine with --host (BENTOML_HOST)",
    errno.EACCES: "name a port from 1024 on with --port (BENTOML_PORT), or give this server's user the right",
}
"""How to mend an address that the server cannot listen on."""


def patch(interchangeable: str) -> None:
    """Patch the supervisor of this process. Call it before it starts the other processes.

    A port that cannot be used, and a process that ends by `end_server`, end the supervisor with a sentence.

    Args:
        interchangeable: begins the names of services that do the same: of these the last one alone that ends
            by `end_server` ends the supervisor.
    """
    start = bentoml_circus.Arbiter.start
    Process.status = property(_status)

    def start_patched(arbiter: bentoml_circus.Arbiter, cb: Callable[[Any], Any] | None = None) -> None:
        _check_address(arbiter)
        _use_monotonic_time(arbiter)
        _accept_no_commands(arbiter)
        _poll_processes(arbiter)
        unrecoverable: list[str] = []
        for watcher in arbiter.watchers:
            watcher.respawn = True
            watcher.stop_children = False
            watcher.hooks["after_reap"] = partial(_handle_death, unrecoverable, f"service_{interchangeable}")
        try:
            start(arbiter, cb)
        except RuntimeError:  # "No active process found": the last process of its kind has ended for good
            if not unrecoverable:
                raise
        if unrecoverable:
            arbiter.exit_stack.close()
            sys.exit(f"cannot serve: {unrecoverable[0]} has ended for good; its log lines above say why")

    bentoml_circus.Arbiter.start = start_patched  # type: ignore[method-assign, assignment]
    bentoml_circus.Arbiter.stop = _stop  # type: ignore[method-assign, assignment]


def _accept_no_commands(arbiter: bentoml_circus.Arbiter) -> None:
    """Keep the supervisor's control and its events inside its process.

    On its ports any process of the machine could read the environment, which holds the API key and the
    stores' secrets, and could stop the server. Only `bentoml serve --reload` uses them.
    """
    if any(arbiter.endpoint in str(watcher.cmd) for watcher in arbiter.watchers):
        logger.warning("--reload has no effect: this server's supervisor accepts no commands")
    arbiter.endpoint = arbiter.ctrl.endpoint = "inproc://control"
    arbiter.pubsub_endpoint = "inproc://events"


def _status(process: Process, status_of: Callable[[Process], int] = Process.status.fget) -> int:
    """The status as circus has it, but a process whose exit status was not read yet is running.

    The first thread of a process is a zombie while its others still end, which takes long with much memory.
    circus would forget such a process and start its successor, and never learn how it ended.
    """
    status = status_of(process)
    return RUNNING if status == DEAD_OR_ZOMBIE else status


def _use_monotonic_time(arbiter: bentoml_circus.Arbiter) -> None:
    """Let no timer of the supervisor use the wall clock: set back by an hour, it would wait for an hour.

    Tornado's timers use `IOLoop.time`, circus' pause after a start the time at which the start began.
    """
    arbiter.loop.time = time.monotonic
    for watcher in arbiter.watchers:
        watcher.spawn_process = _without_start_time(watcher.spawn_process)


def _without_start_time(spawn_process: Callable[..., float | bool]) -> Callable[..., bool]:
    """The same, but it returns whether a process was started, and not when."""

    def spawn(*arguments: object) -> bool:
        return spawn_process(*arguments) is not False

    return spawn


def _poll_processes(arbiter: bentoml_circus.Arbiter) -> None:
    """Look for dead processes every `POLL_S`, as long as this process lives."""
    arbiter.ctrl.check_delay = -1

    async def poll() -> None:
        # One command at a time: circus raises an error for a look while it starts its processes, or stops.
        if not arbiter._exclusive_running_command:  # noqa: SLF001
            try:
                await arbiter.manage_watchers()
            except Exception:
                # The next look may succeed; without it dead processes stay dead.
                logger.exception("the supervisor could not check its processes")
        arbiter.loop.call_later(POLL_S, poll)

    arbiter.loop.call_later(POLL_S, poll)


def _stop(arbiter: bentoml_circus.Arbiter) -> object:
    """Stop, also while a process is being started; remove the sockets after the processes have ended."""
    try:
        stopping = Arbiter.stop(arbiter)
    except ConflictError:
        # The stop signal comes once and must not be lost.
        return arbiter.loop.call_later(STOP_RETRY_S, _stop, arbiter)
    atexit.register(arbiter.exit_stack.close)
    return stopping


def _handle_death(
    unrecoverable: list[str],
    interchangeable: str,
    *,
    watcher: Watcher,
    arbiter: bentoml_circus.Arbiter,
    process_pid: int,
    exit_code: int,
    **_: object,
) -> None:
    # Otherwise the metrics would count its tasks in progress for ever.
    multiprocess.mark_process_dead(  # type: ignore[no-untyped-call]
        process_pid, watcher.env["PROMETHEUS_MULTIPROC_DIR"]
    )
    if watcher.is_stopping():
        return
    process = f"process {process_pid} ({watcher.name})"
    if exit_code == EXIT_UNRECOVERABLE:
        watcher.respawn = False
        alike = [each for each in arbiter.watchers if each.name.startswith(interchangeable)]
        if watcher in alike and len(alike) > 1:
            logger.error("%s has ended for good; the others like it serve on", process)
            arbiter.watchers.remove(watcher)
            return
        unrecoverable.append(process)
        if watcher.processes:  # without one the supervisor stops by itself
            arbiter.loop.add_callback(_stop, arbiter)
    else:
        logger.warning("%s ended with status %s: it is restarted", process, exit_code)


def named_port() -> int | None:
    """The port that the command `bentoml serve` was given; None where no such command runs."""
    command = click.get_current_context(silent=True)
    return command.params.get("port") if command else None


def _check_address(arbiter: bentoml_circus.Arbiter) -> None:
    """Try the address that the supervisor is about to listen on, with the same options."""
    port = named_port()
    if port is not None and not 0 <= port <= MAX_PORT:  # the system would take it modulo 65536
        arbiter.exit_stack.close()
        sys.exit(f"cannot start: --port (or BENTOML_PORT) must be at most {MAX_PORT}, not {port}")
    for listener in arbiter.sockets.values():
        if listener.is_unix:
            continue
        with socket.socket(listener.family, listener.socktype) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind((listener.host, listener.port))
                trial.listen()
            except OSError as error:
                arbiter.exit_stack.close()
                mend = ADDRESS_ERRORS.get(error.errno or 0, "name another with --port and --host")
                sys.exit(
                    f"cannot start: port {listener.port} of {listener.host} cannot be used "
                    f"({error.strerror}): {mend}"
                )
