"""Measure what a client without a key can cost the server.

Starts the server (demo checkpoint, two API workers, 1,024 open files for each process, as systemd and many
shells allow) and does what any client that reaches its port can do:

- headers: one connection sends up to 256 MB of small headers, for at most ten seconds;
- idle: 900 idle connections, then 5,000, then 5,000 that send 30 KB of a request and do not finish it;
  measures the wait of one more client, and the memory growth;
- metrics: requests of 5,000 unknown paths, and of 100 paths of 60,000 characters; measures a scrape.

    python -m benchmarks.unauthenticated            # table, and one line of JSON last
    python -m benchmarks.unauthenticated --record   # also appends to benchmarks/unauthenticated.csv
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
from tqdm import tqdm

from benchmarks.process_tree import call_each, process_tree
from benchmarks.table import machine_name, record
from commands.local_server import LocalServer, local_server

if TYPE_CHECKING:
    from collections.abc import Iterator

RESULTS = Path(__file__).parent / "unauthenticated.csv"
REQUEST_START = b"GET /health HTTP/1.1\r\nHost: test\r\n"
OPEN_FILES = 1024
HEADERS_BYTES = 256 * 2**20
HEADERS_S = 10.0
CLIENT_TIMEOUT_S = 20.0
"""After this time a client counts as shut out."""


def main() -> int:
    """Measure, print, and append to the CSV file if --record is given."""
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
            **_unfinished(server, 5000),
            **_metrics(server),
        }
    sys.stdout.write("\n".join(f"{key:24} {value}" for key, value in row.items()) + "\n\n")
    if arguments.record:
        record(RESULTS, [row])
    sys.stdout.write(json.dumps([row]) + "\n")
    return 0


def _headers(server: LocalServer) -> dict[str, object]:
    """Send small headers without end, on one connection."""
    block = b"".join(b"x-%d: y\r\n" % number for number in range(100_000))
    sent, started_s = 0, time.monotonic()
    with _peak_growth_mb(server) as growth_mb, _connect(server) as connection:
        connection.sendall(REQUEST_START)
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
    """Open idle connections, and measure one more request."""
    return {f"wait_ms_{count}_idle": _wait_ms(server, count, b"")}


def _unfinished(server: LocalServer, count: int) -> dict[str, object]:
    """The same, with most of a large head sent on each connection."""
    unfinished = REQUEST_START + b"".join(
        b"x-%02d: " % number + b"y" * 1000 + b"\r\n" for number in range(30)
    )
    with _peak_growth_mb(server) as growth_mb:
        waited_ms = _wait_ms(server, count, unfinished)
    return {f"wait_ms_{count}_unfinished": waited_ms, "unfinished_growth_mb": round(growth_mb[0])}


def _wait_ms(server: LocalServer, count: int, unfinished: bytes) -> object:
    with ExitStack() as connections:
        for _ in tqdm(range(count), desc="connections", disable=None):
            try:
                connections.enter_context(_connect(server)).sendall(unfinished)
            except OSError:
                break  # the server accepts no more
        asked_s = time.monotonic()
        try:
            httpx.get(f"{server.url}/health", timeout=CLIENT_TIMEOUT_S).raise_for_status()
        except httpx.HTTPError:
            return "shut out"
        return round((time.monotonic() - asked_s) * 1000)


def _metrics(server: LocalServer) -> dict[str, object]:
    """Request unknown paths, each once."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        client.get("/metrics")
        for number in tqdm(range(5000), desc="unknown paths", disable=None):
            client.get(f"/nothing/{number}")
        short = _scrape(client)
        for number in range(100):
            client.get(f"/{number:060000d}")
        long = _scrape(client)
    return {
        "scrape_kb_5000_paths": short[0],
        "scrape_ms_5000_paths": short[1],
        "scrape_kb_long_paths": long[0],
        "scrape_ms_long_paths": long[1],
    }


def _scrape(client: httpx.Client) -> tuple[int, int]:
    """Size in KB and time in ms of one scrape."""
    asked_s = time.monotonic()
    scrape = client.get("/metrics").raise_for_status()
    return len(scrape.content) // 1024, round((time.monotonic() - asked_s) * 1000)


def _connect(server: LocalServer) -> socket.socket:
    address = urlsplit(server.url)
    return socket.create_connection((address.hostname, address.port), timeout=CLIENT_TIMEOUT_S)


def _answer(connection: socket.socket) -> str:
    """The status of the answer, or "none"."""
    try:
        words = connection.recv(65536).split(maxsplit=2)
    except OSError:
        words = []
    return words[1].decode() if len(words) > 1 else "none"


@contextmanager
def _peak_growth_mb(server: LocalServer) -> Iterator[list[float]]:
    """The largest growth of the server's total resident memory inside the block, in MB."""
    processes = process_tree(server.pid)

    def resident() -> int:
        return sum(call_each(processes, lambda each: each.memory_info().rss))

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
    """Limit processes that are started in the block to `OPEN_FILES` open files (soft limit)."""
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
    parser.add_argument("--server", default="as it is", help="name of what is measured, for the CSV file")
    parser.add_argument("--record", action="store_true", help=f"append to {RESULTS.name}")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
