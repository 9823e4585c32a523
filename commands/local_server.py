"""Starts the real server on this machine, for the demo, the tests and the benchmarks."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from sam3_runner.checkpoint import DEMO
from settings import OWN_PREFIXES, Settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ROOT = Path(__file__).parent.parent
READY_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 90.0
POLL_S = 0.1


class ServerFailedError(Exception):
    """The server ended before it was ready, or was not ready in time; the message ends its log."""


@dataclass(frozen=True, slots=True)
class LocalServer:
    """A server that runs.

    Attributes:
        url: without a slash at its end.
        api_key: for the header X-API-Key.
        data_dir: of its embedded stores.
        log_path: what it writes.
        pid: of its parent process.
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
        """What every request to /api needs."""
        return {"X-API-Key": self.api_key}


@contextmanager
def local_server(
    data_dir: Path, environment: Mapping[str, str] | None = None, *, port: int = 0
) -> Iterator[LocalServer]:
    """Run the server until the end of the block: the demo checkpoint and embedded stores in `data_dir`.

    Args:
        data_dir: is made when it is missing.
        environment: settings on top of those; the caller's own settings and `.env` are left out.
        port: of 127.0.0.1; 0 takes a free one.

    Raises:
        ServerFailedError: it did not get ready.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    port = port or _free_port()
    api_key = (environment or {}).get("API_SECRET_KEY", secrets.token_hex(16))
    log_path = data_dir / "server.log"
    url = f"http://127.0.0.1:{port}"
    started_s = time.monotonic()
    with log_path.open("wb") as log:
        process = subprocess.Popen(  # noqa: S603 - our own command
            server_command(port),
            cwd=ROOT,
            env=clean_environment(data_dir, api_key) | dict(environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait_until_ready(process, url, log_path)
        ready_s = time.monotonic() - started_s
        yield LocalServer(url, api_key, data_dir, log_path, process.pid, ready_s)
    finally:
        stop(process)


def server_command(port: int) -> list[str]:
    """What `make serve` runs."""
    return [
        *(sys.executable, "-m", "bentoml", "serve", "service:SegmentationService"),
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
        # BentoML empties its metrics folder at every start, under the feet of another server that runs.
        "BENTOML_HOME": str(data_dir.absolute() / "bentoml"),
    }


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the server to finish its work and end; wait for it."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log_path: Path) -> None:
    until_s = time.monotonic() + READY_TIMEOUT_S
    with httpx.Client(timeout=2.0) as client:
        while time.monotonic() < until_s:
            if process.poll() is not None:
                raise ServerFailedError(f"the server ended with {process.returncode}:\n{_tail(log_path)}")
            try:
                if client.get(f"{url}/readyz").status_code == httpx.codes.OK:
                    return
            except httpx.TransportError:
                pass  # not listening yet
            time.sleep(POLL_S)
    raise ServerFailedError(f"not ready after {READY_TIMEOUT_S:.0f} s:\n{_tail(log_path)}")


def _tail(path: Path) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-20:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
