"""What may a stranger, who has no key, cost the server?

Starts the server as it is (demo checkpoint, two API workers, 1,024 open files a process, as systemd and many
shells allow) and does to it what anybody can who reaches its port:

- headers: one connection sends up to 256 MB of small headers, for at most ten seconds;
- idle: 900 connections, then 5,000, are opened and say nothing, then 5,000 that begin a request of 30 KB and
  do not end it; how long does a caller wait who comes then, and what do the last ones hold;
- metrics: 5,000 unknown paths, and 100 of 60,000 characters, are asked for; what does a scrape cost.

    python -m benchmarks.strangers            # table, and one line of JSON last
    python -m benchmarks.strangers --record   # also appends to benchmarks/strangers.csv
"""

from __future__ import annotations

import argparse
import json
import resource
import socket
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx
import psutil
from tqdm import tqdm

from benchmarks.table import machine_name, record
from commands.local_server import LocalServer, local_server

if TYPE_CHECKING:
    from collections.abc import Iterator

STRANGERS_CSV = Path(__file__).parent / "strangers.csv"
BEGIN = b"GET /health HTTP/1.1\r\nHost: test\r\n"
OPEN_FILES = 1024
HEADERS_BYTES = 256 * 2**20
HEADERS_S = 10.0
CALLER_S = 20.0
"""A caller that waits longer is shut out."""


def main() -> int:
    """Measure, print, and record if asked."""
    arguments = _parse()
    with tempfile.TemporaryDirectory() as folder, _few_files(), local_server(Path(folder) / "data") as server:
        _allow_all_files()
        row = {
            "measured": datetime.now(UTC).date().isoformat(),
            "machine": machine_name(),
            "server": arguments.server,
            **_headers(server),
            **_idle(server, 900),
            **_idle(server, 5000),
            **_begun(server, 5000),
            **_metrics(server),
        }
    sys.stdout.write("\n".join(f"{key:24} {value}" for key, value in row.items()) + "\n\n")
    if arguments.record:
        record(STRANGERS_CSV, [row])
    sys.stdout.write(json.dumps([row]) + "\n")
    return 0


def _headers(server: LocalServer) -> dict[str, object]:
    """Small headers without an end, on one connection."""
    block = b"".join(b"x-%d: y\r\n" % number for number in range(100_000))
    sent, started_s = 0, time.monotonic()
    with _peak_growth_mb(server) as growth_mb, _connect(server) as connection:
        connection.sendall(BEGIN)
        try:
            while sent < HEADERS_BYTES and time.monotonic() - started_s < HEADERS_S:
                sent += connection.send(block)
        except OSError:
            pass  # refused
        took_s = time.monotonic() - started_s
        answer = _answer(connection)
    return {
        "headers_sent_mb": round(sent / 2**20, 1),
        "headers_s": round(took_s, 2),
        "headers_answer": answer,
        "worker_growth_mb": round(growth_mb[0]),
    }


def _idle(server: LocalServer, count: int) -> dict[str, object]:
    """Connections that say nothing, and one more that asks."""
    return {f"beside_{count}_idle_ms": _wait_ms(server, count, b"")}


def _begun(server: LocalServer, count: int) -> dict[str, object]:
    """The same, with most of a large head sent on each."""
    begun = BEGIN + b"".join(b"x-%02d: " % number + b"y" * 1000 + b"\r\n" for number in range(30))
    with _peak_growth_mb(server) as growth_mb:
        waited_ms = _wait_ms(server, count, begun)
    return {f"beside_{count}_begun_ms": waited_ms, "begun_growth_mb": round(growth_mb[0])}


def _wait_ms(server: LocalServer, count: int, begun: bytes) -> object:
    with ExitStack() as crowd:
        for _ in tqdm(range(count), desc="connections", disable=None):
            try:
                crowd.enter_context(_connect(server)).sendall(begun)
            except OSError:
                break  # nobody takes more
        asked_s = time.monotonic()
        try:
            httpx.get(f"{server.url}/health", timeout=CALLER_S).raise_for_status()
        except httpx.HTTPError:
            return "shut out"
        return round((time.monotonic() - asked_s) * 1000)


def _metrics(server: LocalServer) -> dict[str, object]:
    """Paths that nobody serves, each asked for once."""
    with httpx.Client(base_url=server.url, timeout=60) as stranger:
        stranger.get("/metrics")
        for number in tqdm(range(5000), desc="unknown paths", disable=None):
            stranger.get(f"/nothing/{number}")
        short = _scrape(stranger)
        for number in range(100):
            stranger.get(f"/{number:060000d}")
        long = _scrape(stranger)
    return {
        "scrape_kb_5000_paths": short[0],
        "scrape_ms_5000_paths": short[1],
        "scrape_kb_long_paths": long[0],
        "scrape_ms_long_paths": long[1],
    }


def _scrape(stranger: httpx.Client) -> tuple[int, int]:
    asked_s = time.monotonic()
    scrape = stranger.get("/metrics").raise_for_status()
    return len(scrape.content) // 1024, round((time.monotonic() - asked_s) * 1000)


def _connect(server: LocalServer) -> socket.socket:
    address = urlsplit(server.url)
    return socket.create_connection((address.hostname, address.port), timeout=CALLER_S)


def _answer(connection: socket.socket) -> str:
    """The status of what came back, if anything did."""
    try:
        words = connection.recv(65536).split(maxsplit=2)
    except OSError:
        words = []
    return words[1].decode() if len(words) > 1 else "none"


@contextmanager
def _peak_growth_mb(server: LocalServer) -> Iterator[list[float]]:
    """By how much the server's processes grew together inside the block, at most."""
    processes = psutil.Process(server.pid).children(recursive=True)

    def resident() -> int:
        return sum(process.memory_info().rss for process in processes)

    before, growth_mb, done = resident(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            growth_mb[0] = max(growth_mb[0], (resident() - before) / 2**20)

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield growth_mb
    done.set()
    watcher.join()


@contextmanager
def _few_files() -> Iterator[None]:
    """What is started in the block may open `OPEN_FILES` files, unless it asks for more."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def _allow_all_files() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--server", default="as it is", help="what is measured, for the record")
    parser.add_argument("--record", action="store_true", help=f"append to {STRANGERS_CSV.name}")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
