"""Starts and stops one server process, and waits for conditions."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from http.client import HTTPConnection, HTTPException
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

POLL_S = 0.02
READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0


class ServiceFailedError(Exception):
    """A server ended or did not become ready; the message has the end of its log."""


class ServerProcess:
    """One server that can be started, stopped and started again.

    Args:
        command: the command line.
        log_path: the file of its output.
        ready: whether it serves; it may raise OSError while nothing listens.
        environment: added to the caller's.
        user: the user to run as; needs root.
        stop_signal: the signal that stops it; SIGKILL goes to its children too.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        log_path: Path,
        ready: Callable[[], bool],
        *,
        environment: Mapping[str, str] | None = None,
        user: str | None = None,
        stop_signal: signal.Signals = signal.SIGKILL,
    ) -> None:
        self._command = [str(part) for part in command]
        self._log_path = log_path
        self._ready = ready
        self._environment = {**os.environ, **(environment or {})}
        self._user = user
        self._stop_signal = stop_signal
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server and wait until it serves. Raises ServiceFailedError."""
        with self._log_path.open("ab") as log:
            self._process = process = subprocess.Popen(
                self._command,
                cwd=self._log_path.parent if self._user is None else "/",
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                user=self._user,
                extra_groups=None if self._user is None else [],
                # A separate group, so that a signal reaches its children too.
                start_new_session=True,
            )

        def serves() -> bool:
            if process.poll() is not None:
                raise ServiceFailedError(f"ended with {process.returncode}:\n{self._log_tail()}")
            try:
                return self._ready()
            except OSError:
                return False

        try:
            wait_until(serves, READY_TIMEOUT_S)
        except TimeoutError:
            self.stop()
            raise ServiceFailedError(f"not ready in {READY_TIMEOUT_S:.0f} s:\n{self._log_tail()}") from None

    def stop(self) -> None:
        """Stop the server like a failure, and wait for its end; does nothing if it is stopped."""
        process, self._process = self._process, None
        if process is None:
            return
        if self._stop_signal is not signal.SIGKILL and process.poll() is None:
            process.send_signal(self._stop_signal)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _log_tail(self) -> str:
        return "\n".join(self._log_path.read_text(errors="replace").splitlines()[-20:])


def wait_until(condition: Callable[[], bool], timeout_s: float = READY_TIMEOUT_S) -> None:
    """Wait until `condition` is true. Raises TimeoutError."""
    until_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until_s:
            raise TimeoutError(f"the condition is still false after {timeout_s:.0f} s")
        time.sleep(POLL_S)


def listens(port: int) -> bool:
    """Whether something accepts connections on `port` of 127.0.0.1."""
    with socket.socket() as probe:
        probe.settimeout(2.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def http_status(url: str) -> int | None:
    """The status of a GET of http://127.0.0.1; None without an answer."""
    parts = urlsplit(url)
    connection = HTTPConnection(parts.hostname or "", parts.port, timeout=5.0)
    with contextlib.closing(connection), contextlib.suppress(OSError, HTTPException):
        connection.request("GET", parts.path)
        return connection.getresponse().status
    return None
