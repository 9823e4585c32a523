"""Servers that do not start, start slowly, or are ended: what `local_server` waits for is watched here."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from commands import local_server
from commands.local_server import POLL_S, ROOT, LocalServer, clean_environment, server_command, stop

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

API_KEY = "0123456789abcdef0123456789abcdef"
REFUSAL_TIMEOUT_S = 60.0

API_WORKER = "sam3"
RUNNER = "sam3_runner"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A start that was refused: its exit status and all that it wrote."""

    status: int
    output: str


def refused_start(
    data_dir: Path, changes: Mapping[str, str | None], *arguments: str, under: Sequence[str] = ()
) -> Refusal:
    """Start the demo with `changes` to its environment (None removes) and `arguments`; wait for its end.

    A process that is left behind holds the output open, and so is a timeout here.

    Args:
        data_dir: of the server.
        changes: to the demo's environment.
        arguments: of `bentoml serve`.
        under: a command that runs the server's.
    """
    ended = subprocess.run(
        [*under, *server_command(local_server._free_port()), *arguments],
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
    """The one line that refuses a start, after `beginning`; no traceback, and a status that says so."""
    assert refusal.status != 0
    assert "Traceback" not in refusal.output
    [line] = [line for line in refusal.output.splitlines() if beginning in line]
    return line.partition(beginning)[2]


@contextmanager
def started_server(
    data_dir: Path, changes: Mapping[str, str | None]
) -> Iterator[tuple[LocalServer, subprocess.Popen[bytes]]]:
    """A server that was started, ready or not; it is stopped at the end of the block."""
    data_dir.mkdir(parents=True, exist_ok=True)
    port = local_server._free_port()
    log_path = data_dir / "server.log"
    with log_path.open("wb") as log:
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
    """The living processes of one of the two services, `API_WORKER` or `RUNNER`."""
    return [child for child in psutil.Process(server.pid).children() if service_of(child) == service]


def runner_of(server: LocalServer) -> psutil.Process:
    """The process that holds the model."""
    [runner] = children_of(server, RUNNER)
    return runner


def kill(process: psutil.Process | subprocess.Popen[bytes]) -> None:
    """SIGKILL; wait until it is gone, or a zombie whose parent has not looked yet."""
    child = psutil.Process(process.pid)
    child.send_signal(signal.SIGKILL)
    while is_alive(child):
        time.sleep(POLL_S)


def is_alive(process: psutil.Process) -> bool:
    """Does it run; a zombie, whose parent has not looked yet, does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def left_after(processes: list[psutil.Process], limit_s: float) -> list[psutil.Process]:
    """Those that still run after `limit_s`; returns as soon as none does."""
    until_s = time.monotonic() + limit_s
    while (left := [process for process in processes if is_alive(process)]) and time.monotonic() < until_s:
        time.sleep(POLL_S)
    return left


def run_alone(service: str, environment: Mapping[str, str]) -> Refusal:
    """Start a process of one service as the supervisor does, but without a supervisor; wait for its end."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        fd = listening.fileno()
        ended = subprocess.run(
            [
                *(sys.executable, "-m", "_bentoml_impl.worker.service", "service:SegmentationService"),
                *("--service-name", service, "--fd", str(fd), "--worker-id", "1"),
                # An API worker looks for the runner's socket.
                *("--runner-map", '{"sam3_runner": "tcp://127.0.0.1:9"}'),
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
    """Which of the two services this is a process of; None: of neither."""
    words = _words(process)
    return words[words.index("--service-name") + 1] if "--service-name" in words else None


def is_decoder(process: psutil.Process) -> bool:
    """Whether this process decodes images for an API worker."""
    return "sam3_runner.images.decoder" in _words(process)


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has just ended
        return []


def changed_environment(data_dir: Path, changes: Mapping[str, str | None]) -> dict[str, str]:
    """The demo's environment with `changes`; None removes a variable."""
    changed = {**clean_environment(data_dir, API_KEY), **changes}
    return {name: value for name, value in changed.items() if value is not None}
