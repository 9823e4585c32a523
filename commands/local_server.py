"""Starts the real server on this machine, for the demo, the tests and the benchmarks."""

from __future__ import annotations

import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from sam3_runner.weights.checkpoint import DEMO
from settings import OWN_PREFIXES, Settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ROOT = Path(__file__).parent.parent
SERVICE = "service:SegmentationService"
READY_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 90.0
POLL_S = 0.1
PORTS = range(15_000, 32_000)
"""Below the ports of outgoing connections, so that none of these takes the port of a stopped server."""


class ServerFailedError(Exception):
    """The server ended before it was ready, or was not ready in time; the message ends its log."""


@dataclass(frozen=True, slots=True)
class LocalServer:
    """A running server.

    Attributes:
        url: its base URL, without a trailing slash.
        api_key: the value of the header X-API-Key.
        data_dir: the folder of its embedded stores.
        log_path: the file of its output.
        pid: of its supervisor process.
        ready_s: time from start to ready.
    """

    url: str
    api_key: str
    data_dir: Path
    log_path: Path
    pid: int
    ready_s: float

    @property
    def headers(self) -> dict[str, str]:
        """The headers that every request to /api needs."""
        return {"X-API-Key": self.api_key}


@contextmanager
def local_server(
    data_dir: Path,
    environment: Mapping[str, str] | None = None,
    *,
    port: int | None = None,
    service: str = SERVICE,
    root: Path = ROOT,
    ready_timeout_s: float = READY_TIMEOUT_S,
) -> Iterator[LocalServer]:
    """Run the server until the end of the block: the demo checkpoint and embedded stores in `data_dir`.

    Args:
        data_dir: is created if it is missing.
        environment: additional settings; the caller's own settings and `.env` are ignored.
        port: of 127.0.0.1; None reserves one.
        service: module and name of the Bento's service.
        root: folder of the checkout whose server runs.
        ready_timeout_s: a first start on a GPU compiles kernels, which takes longer than the default allows
            on a slow host.

    Raises:
        ServerFailedError: the server did not become ready in time.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    api_key = (environment or {}).get("API_SECRET_KEY", secrets.token_hex(16))
    log_path = data_dir / "server.log"
    with ExitStack() as stack, log_path.open("wb") as log:
        if port is None:
            [port] = stack.enter_context(reserved_ports(1))
        url = f"http://127.0.0.1:{port}"
        started_s = time.monotonic()
        process = subprocess.Popen(  # noqa: S603 - our own command
            server_command(port, service),
            cwd=root,
            env=clean_environment(data_dir, api_key) | dict(environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        stack.callback(stop, process)
        wait_until_ready(process, url, log_path, ready_timeout_s)
        ready_s = time.monotonic() - started_s
        yield LocalServer(url, api_key, data_dir, log_path, process.pid, ready_s)


def server_command(port: int, service: str = SERVICE) -> list[str]:
    """The command line of `make serve`."""
    return [
        *(sys.executable, "-m", "bentoml", "serve", service),
        *("--host", "127.0.0.1", "--port", str(port)),
    ]


def clean_environment(data_dir: Path, api_key: str) -> dict[str, str]:
    """The caller's environment without this server's settings, then those of the embedded demo."""
    own = {name.upper() for name in Settings.model_fields}
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in own and not name.startswith(OWN_PREFIXES)
    }
    return inherited | {
        "ENV_FILE": os.devnull,
        "SAM3_WEIGHTS_PATH": DEMO,
        "DATA_DIR": str(data_dir),
        "API_SECRET_KEY": api_key,
        "BENTOML_DO_NOT_TRACK": "True",
        # BentoML empties its metrics folder at every start; another running server may use the default one.
        "BENTOML_HOME": str(data_dir.absolute() / "bentoml"),
    }


def stop(process: subprocess.Popen[bytes]) -> None:
    """Send SIGTERM and wait for the end; send SIGKILL after STOP_TIMEOUT_S."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_until_ready(
    process: subprocess.Popen[bytes],
    url: str,
    log_path: Path,
    timeout_s: float = READY_TIMEOUT_S,
    *,
    path: str = "/readyz",
) -> None:
    """Wait until GET {url}{path} answers 200.

    Raises:
        ServerFailedError: the process ended, or `timeout_s` passed.
    """
    until_s = time.monotonic() + timeout_s
    with httpx.Client(timeout=2.0) as client:
        while time.monotonic() < until_s:
            if process.poll() is not None:
                raise ServerFailedError(f"the server ended with {process.returncode}:\n{_tail(log_path)}")
            try:
                if client.get(f"{url}{path}").status_code == httpx.codes.OK:
                    return
            except httpx.TransportError:
                pass  # not listening yet
            time.sleep(POLL_S)
    raise ServerFailedError(f"not ready after {timeout_s:.0f} s:\n{_tail(log_path)}")


def _tail(path: Path) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-20:])


@contextmanager
def reserved_ports(count: int) -> Iterator[list[int]]:
    """Reserve free TCP ports of 127.0.0.1 for servers, until the end of the block.

    A UDP socket on the same port holds the reservation: two callers never get the same port, in whatever
    processes they run, and the kernel ends the reservation of a process that dies.
    """
    with ExitStack() as held:
        ports: list[int] = []
        while len(ports) < count:
            port = random.choice(PORTS)  # noqa: S311 - not a secret
            reservation = held.enter_context(socket.socket(type=socket.SOCK_DGRAM))
            with suppress(OSError), socket.socket() as probe:  # OSError: the port is reserved or in use
                reservation.bind(("127.0.0.1", port))
                probe.bind(("127.0.0.1", port))
                ports.append(port)
        yield ports
