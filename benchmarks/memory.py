"""Measure how the server's memory grows over requests.

Starts the real server (demo checkpoint, embedded stores) and sends requests in windows of a fixed number,
over kept connections. After each window it reads what each process holds, in MB: anonymous memory and pixel
files (PSS). Pages of program files are left out: their share changes when other programs begin and end.

    python -m benchmarks.memory                                         # tasks: one picture, other prompts
    python -m benchmarks.memory --requests wrong-key --window 25000     # refused before anything is read
    python -m benchmarks.memory --against ../other-checkout --record

Requests:
    tasks         one prompt on one 1920 x 1080 picture, again and again; its features are held
    late          the same, with a deadline of 1 ms that cannot be met under load: 429, or an ended task
    no-image      tasks whose image does not exist
    wrong-key     a key that is not valid: 401
    unknown-path  another path each time: 404
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import re
import sys
import tempfile
import uuid
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp

from benchmarks.pictures import FIRST_SEED, Scene
from benchmarks.process_tree import call_each, process_tree
from benchmarks.table import add_settings, machine_name, record
from commands.local_server import ROOT, local_server
from storage import LocalFolder
from version import VERSION

if TYPE_CHECKING:
    from collections.abc import Iterator

    import psutil

    from commands.local_server import LocalServer

RESULTS = Path(__file__).parent / "memory.csv"
WIDTH_PX, HEIGHT_PX = 1920, 1080
USER_ID = "bench"
KEY = f"uploads/{USER_ID}/picture"
REQUESTS = ("tasks", "late", "no-image", "wrong-key", "unknown-path")
WARM_UP = 300
"""Tasks before the first reading, so that every process has started."""
PARTS = ("supervisor", "api_workers", "decoders", "runners")


def main() -> int:
    """Measure, print, and append to the CSV file if --record is given."""
    options = _parse()
    scene = _scene()
    checkouts = {options.label: ROOT}
    if options.against:
        checkouts[options.against_label] = options.against.resolve()
    for version, root in checkouts.items():
        rows = list(_measure(options, scene, version, root))
        _print_growth(rows)
        if options.record:
            record(RESULTS, rows)
    return 0


def _scene() -> Scene:
    scenes = (Scene(seed, WIDTH_PX, HEIGHT_PX) for seed in itertools.count(FIRST_SEED))
    return next(scene for scene in scenes if scene.masks)


def _measure(
    options: argparse.Namespace, scene: Scene, version: str, root: Path
) -> Iterator[dict[str, object]]:
    """A row before the first window, and one after each."""
    prompts = list(scene.masks)
    with (
        tempfile.TemporaryDirectory(prefix="memory-") as folder,
        local_server(Path(folder) / "data", dict(options.setting), root=root) as server,
    ):
        LocalFolder(server.data_dir / "storage").put_upload(KEY, scene.jpeg)
        asyncio.run(_send(server, "tasks", WARM_UP, options.clients, prompts))
        for window in range(options.windows + 1):
            statuses: Counter[str] = Counter()
            if window:
                statuses = asyncio.run(
                    _send(server, options.requests, options.window, options.clients, prompts)
                )
            row: dict[str, object] = {
                "measured": datetime.now(UTC).date().isoformat(),
                "machine": machine_name(),
                "version": version,
                "requests": options.requests,
                "clients": options.clients,
                "sent": window * options.window,
                **_memory_mb(server.pid),
                "statuses": " ".join(f"{status}={count}" for status, count in sorted(statuses.items())),
            }
            sys.stdout.write("  ".join(f"{name} {row[name]}" for name in list(row)[2:]) + "\n")
            sys.stdout.flush()
            yield row


async def _send(
    server: LocalServer, requests: str, count: int, clients: int, prompts: list[str]
) -> Counter[str]:
    """Send `count` requests from `clients` callers; returns how many ended with each status."""

    async def one_client() -> None:
        for number in numbers:
            path, content = _request(requests, prompts[number % len(prompts)])
            try:
                async with session.post(server.url + path, **content) as response:
                    await response.read()
                    statuses[str(response.status)] += 1
            except (aiohttp.ClientError, TimeoutError) as error:
                statuses[type(error).__name__] += 1

    statuses: Counter[str] = Counter()
    numbers = iter(range(count))
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(headers=server.headers, connector=connector) as session:
        await asyncio.gather(*(one_client() for _ in range(clients)))
    return statuses


def _request(requests: str, prompt: str) -> tuple[str, dict[str, Any]]:
    """Path and arguments of one request."""
    task_id = str(uuid.uuid4())
    body = {"image_url": KEY, "text_prompt": prompt, "user_id": USER_ID, "task_id": task_id}
    path, headers = "/api/v1/predict", {}
    match requests:
        case "late":
            headers = {"X-Deadline-Ms": "1"}
        case "no-image":
            body["image_url"] = f"{KEY}-{task_id}"
        case "wrong-key":
            headers = {"X-API-Key": "not-a-key-of-this-server"}
        case "unknown-path":
            path = f"/nothing/{task_id}"
    return path, {"json": body, "headers": headers}


def _memory_mb(pid: int) -> dict[str, object]:
    """Memory of each part of the server, and of all."""

    def read(process: psutil.Process) -> tuple[str, float]:
        command = " ".join(process.cmdline())
        if process.pid == pid:
            part = "supervisor"
        elif "sam3_runner.images.decoder" in command:
            part = "decoders"
        else:
            part = "runners" if "sam3_runner_" in command else "api_workers"
        return part, _held_mb(process.pid)

    parts = dict.fromkeys(PARTS, 0.0)
    for part, mb in call_each(process_tree(pid), read):
        parts[part] += mb
    rounded = {f"{part}_mb": round(mb, 1) for part, mb in parts.items()}
    return {"all_mb": round(sum(parts.values()), 1), **rounded}


def _held_mb(pid: int) -> float:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(kb) for kb in re.findall(r"^Pss_(?:Anon|Shmem):\s+(\d+) kB", text, re.MULTILINE)) / 1000


def _print_growth(rows: list[dict[str, object]]) -> None:
    """The growth over the second half, in which what is kept up to a bound should have reached it."""
    half = rows[len(rows) // 2 :]
    first, last = (float(str(half[index]["all_mb"])) for index in (0, -1))
    sent = int(str(half[-1]["sent"])) - int(str(half[0]["sent"]))
    if sent:
        growth = (last - first) / sent * 10_000
        sys.stdout.write(
            f"{half[0]['version']}: second half: {growth:+.1f} MB in 10,000 requests, "
            f"{growth / first:+.1%} of {first:.0f} MB\n"
        )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", choices=REQUESTS, default="tasks", help="what is sent")
    parser.add_argument("--window", type=int, default=2000, help="requests between two readings")
    parser.add_argument("--windows", type=int, default=8, help="how many")
    parser.add_argument("--clients", type=int, default=4, help="callers, each with one request at a time")
    add_settings(parser, "MALLOC_ARENA_MAX=2")
    parser.add_argument("--label", default=VERSION, help="name of this version in the table")
    parser.add_argument("--against", type=Path, help="folder of another checkout, measured after this")
    parser.add_argument("--against-label", default="other", help="name of the other version")
    parser.add_argument("--record", action="store_true", help=f"append to {RESULTS.name}")
    options = parser.parse_args()
    if not os.access("/proc/self/smaps_rollup", os.R_OK):
        parser.error("/proc/self/smaps_rollup cannot be read: run this on Linux")
    return options


if __name__ == "__main__":
    sys.exit(main())
