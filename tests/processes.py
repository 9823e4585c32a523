"""Servers that do not start, start slowly, or are ended: what `local_server` waits for is watched here."""

from __future__ import annotations

import subprocess
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import local_server
from local_server import ROOT, LocalServer, clean_environment, server_command, stop

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

API_KEY = "0123456789abcdef0123456789abcdef"
REFUSAL_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Refusal:
    """A start that was refused: its exit status and all that it wrote."""

    status: int
    output: str


def refused_start(data_dir: Path, changes: Mapping[str, str | None]) -> Refusal:
    """Start the demo with `changes` to its environment (None removes), and wait for its end."""
    ended = subprocess.run(
        server_command(local_server._free_port()),
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


def changed_environment(data_dir: Path, changes: Mapping[str, str | None]) -> dict[str, str]:
    """The demo's environment with `changes`; None removes a variable."""
    changed = {**clean_environment(data_dir, API_KEY), **changes}
    return {name: value for name, value in changed.items() if value is not None}
