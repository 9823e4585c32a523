"""Starts servers without waiting for them, finds their processes, and kills these."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpx
import psutil

from commands.local_server import (
    POLL_S,
    READY_TIMEOUT_S,
    ROOT,
    LocalServer,
    clean_environment,
    reserved_ports,
    server_command,
    stop,
)
from tests import new_connection
from tests.edge import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

API_KEY = "0123456789abcdef0123456789abcdef"
REFUSAL_TIMEOUT_S = 120.0

API_WORKER = "sam3"
RUNNER = "sam3_runner_0"

LOST_GPUS_FILE = "TEST_LOST_GPUS_FILE"
"""Environment variable of tests/failing_service.py: a file, which may be missing, of the lost GPUs."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A refused start: its exit status and its output."""

    status: int
    output: str


def refused_start(
    data_dir: Path, changes: Mapping[str, str | None], *arguments: str, under: Sequence[str] = ()
) -> Refusal:
    """Start the demo with a changed environment, and wait until it ends.

    A process that outlives the server keeps the output open, which is a timeout here.

    Args:
        data_dir: of the server.
        changes: to the demo's environment; None removes a variable.
        arguments: additional arguments of `bentoml serve`.
        under: a command that runs the server's command.
    """
    with reserved_ports(1) as [port]:
        ended = subprocess.run(
            [*under, *server_command(port), *arguments],
            cwd=ROOT,
            env=changed_environment(data_dir, changes),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=REFUSAL_TIMEOUT_S,
            check=False,
            text=True,
        )
    return Refusal(ended.returncode, ended.stdout)


def sentence_of(refusal: Refusal, beginning: str) -> str:
    """The rest of the line that refuses the start, after `beginning`; checks the status and the log."""
    assert refusal.status != 0
    assert "Traceback" not in refusal.output
    [line] = [line for line in refusal.output.splitlines() if beginning in line]
    return line.partition(beginning)[2]


@contextmanager
def started_server(
    data_dir: Path, changes: Mapping[str, str | None]
) -> Iterator[tuple[LocalServer, subprocess.Popen[bytes]]]:
    """Start a server without waiting until it is ready; stop it at the end of the block."""
    data_dir.mkdir(parents=True, exist_ok=True)
    log_path = data_dir / "server.log"
    with reserved_ports(1) as [port], log_path.open("wb") as log:
        process = subprocess.Popen(
            server_command(port),
            cwd=ROOT,
            env=changed_environment(data_dir, changes),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            yield LocalServer(url, API_KEY, data_dir, log_path, process.pid, ready_s=0.0), process
        finally:
            stop(process)


def children_of(server: LocalServer, service: str) -> list[psutil.Process]:
    """The running processes of a service, such as `API_WORKER` or `RUNNER`."""
    return [child for child in psutil.Process(server.pid).children() if service_of(child) == service]


def runner_of(server: LocalServer) -> psutil.Process:
    """The runner process, found by its command line."""
    [runner] = children_of(server, RUNNER)
    return runner


def wait_until_all_workers_are_ready(server: LocalServer, timeout_s: float = READY_TIMEOUT_S) -> None:
    """Wait until every API worker reports a loaded model."""

    def states() -> set[str]:
        checks = 6 * len(children_of(server, API_WORKER))
        try:
            # A new connection each: any worker may accept it.
            return {new_connection.get(f"{server.url}/health").json()["status"] for _ in range(checks)}
        except httpx.TransportError:
            return set()

    wait_for(states, lambda found: found == {"ok"}, timeout_s)


def kill(process: psutil.Process | subprocess.Popen[bytes]) -> None:
    """Send SIGKILL; wait until the process has ended. A zombie counts as ended."""
    child = psutil.Process(process.pid)
    child.send_signal(signal.SIGKILL)
    while is_alive(child):
        time.sleep(POLL_S)


def is_alive(process: psutil.Process) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def left_after(processes: list[psutil.Process], limit_s: float) -> list[psutil.Process]:
    """Wait until all have ended, for at most `limit_s`; returns those that still run."""
    until_s = time.monotonic() + limit_s
    while (left := [process for process in processes if is_alive(process)]) and time.monotonic() < until_s:
        time.sleep(POLL_S)
    return left


def run_alone(service: str, environment: Mapping[str, str]) -> Refusal:
    """Start one service's process like the supervisor, but without a supervisor; wait until it ends."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        fd = listening.fileno()
        ended = subprocess.run(
            [
                *(sys.executable, "-m", "_bentoml_impl.worker.service", "service:SegmentationService"),
                *("--service-name", service, "--fd", str(fd), "--worker-id", "1"),
                # An API worker needs the address of the runner.
                *("--runner-map", '{"sam3_runner_0": "tcp://127.0.0.1:9"}'),
            ],
            cwd=ROOT,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(fd,),
            timeout=REFUSAL_TIMEOUT_S,
            check=False,
            text=True,
        )
    return Refusal(ended.returncode, ended.stdout)


def service_of(process: psutil.Process) -> str | None:
    """The service that this process runs; None if neither."""
    words = _words(process)
    return words[words.index("--service-name") + 1] if "--service-name" in words else None


def is_decoder(process: psutil.Process) -> bool:
    """Whether this process decodes images for an API worker."""
    return "sam3_runner.images.decoder" in _words(process)


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # the process has ended
        return []


def changed_environment(data_dir: Path, changes: Mapping[str, str | None]) -> dict[str, str]:
    """The demo's environment with `changes`; None removes a variable."""
    changed = {**clean_environment(data_dir, API_KEY), **changes}
    return {name: value for name, value in changed.items() if value is not None}
