"""Measure what a server's callers notice of a bulk run on the same machine.

    python -m benchmarks.bulk_background --record

One server, demo checkpoint, with one caller that sends another picture each time, as soon as the last one is
answered. It is measured alone, beside `sam3 bulk`, and beside `sam3 bulk --background`, in turn and --rounds
times, from when the run's model works. The run's own rate is that of its rows meanwhile.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import psutil

from benchmarks.pictures import FIRST_SEED, Scene
from benchmarks.table import machine_name, record
from bulk.rows import read_rows
from commands.local_server import ROOT, LocalServer, local_server
from storage import LocalFolder

if TYPE_CHECKING:
    from collections.abc import Iterator

RESULTS = Path(__file__).parent / "bulk_background.csv"
KINDS: dict[str, list[str] | None] = {"none": None, "bulk": [], "bulk --background": ["--background"]}
USER_ID = "bench"
PROMPT = "red circle"
WIDTH_PX, HEIGHT_PX = 640, 480
PICTURES = 64
"""Different ones, so that the run never ends while it is measured: each has many names."""
NAMES = 4096
START_TIMEOUT_S = 180.0


def main() -> int:
    """Measure, print, and append to the CSV file if --record is given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--record", action="store_true", help=f"append to {RESULTS.name}")
    options = parser.parse_args()
    times_s: dict[str, list[float]] = {kind: [] for kind in KINDS}
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory(prefix="sam3-bulk-background-") as temporary:
        folder = Path(temporary)
        jpegs = [Scene(FIRST_SEED + number, WIDTH_PX, HEIGHT_PX).jpeg for number in range(PICTURES)]
        (folder / "in").mkdir()
        for number in range(NAMES):
            (folder / "in" / f"{number:05}.jpg").write_bytes(jpegs[number % PICTURES])
        with local_server(folder / "server") as server:
            for round_number in range(options.rounds):
                for kind, arguments in KINDS.items():
                    out = folder / f"{round_number}-{kind}"
                    run = nullcontext() if arguments is None else _bulk(folder / "in", out, arguments)
                    with run:
                        started = datetime.now(UTC)
                        times_s[kind] += _call(server, jpegs, options.seconds)
                        rates[kind].append(_rows_since(out, started) / options.seconds)
    rows: list[dict[str, object]] = [
        {
            "date": datetime.now(UTC).date().isoformat(),
            "machine": machine_name(),
            "beside": kind,
            "requests": len(times),
            "p50_ms": round(1000 * statistics.median(times), 1),
            "p95_ms": round(1000 * statistics.quantiles(times, n=20)[-1], 1),
            "p99_ms": round(1000 * statistics.quantiles(times, n=100)[-1], 1),
            "bulk_rate": round(statistics.mean(rates[kind]), 2),
        }
        for kind, times in times_s.items()
    ]
    for row in rows:
        sys.stdout.write("  ".join(f"{name} {value}" for name, value in row.items()) + "\n")
    if options.record:
        record(RESULTS, rows)
    return 0


@contextmanager
def _bulk(images: Path, out: Path, arguments: list[str]) -> Iterator[None]:
    """A bulk run, from its first rows to the end of the block."""
    command = [sys.executable, "-m", "sam3_client", "bulk", "--images", str(images), "--out", str(out)]
    command += ["--prompts", PROMPT, "--weights", "demo", "--shard-pictures", "8", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: S603 - ours
    family: list[psutil.Process] = []
    try:
        until_s = time.monotonic() + START_TIMEOUT_S
        while not any(out.glob("*/rows/*.parquet")):
            if process.poll() is not None or time.monotonic() > until_s:
                raise RuntimeError("sam3 bulk does not begin")
            time.sleep(0.2)
        family = psutil.Process(process.pid).children(recursive=True)
        yield
    finally:
        process.kill()
        process.wait()
        psutil.wait_procs(family, timeout=60)


def _call(server: LocalServer, jpegs: list[bytes], seconds: float) -> list[float]:
    """Times of one caller's requests, in s."""
    store = LocalFolder(server.data_dir / "storage")
    times_s: list[float] = []
    until_s = time.monotonic() + seconds
    with httpx.Client(headers=server.headers, timeout=60) as client:
        while time.monotonic() < until_s:
            key = f"uploads/{USER_ID}/{uuid.uuid4()}"
            # Another file each time: features that are held would answer without the model.
            store.put_upload(key, jpegs[len(times_s) % len(jpegs)] + uuid.uuid4().bytes)
            body = {
                "image_url": key,
                "text_prompt": PROMPT,
                "user_id": USER_ID,
                "task_id": str(uuid.uuid4()),
            }
            started_s = time.perf_counter()
            client.post(f"{server.url}/api/v1/predict", json=body).raise_for_status()
            times_s.append(time.perf_counter() - started_s)
    return times_s


def _rows_since(out: Path, started: datetime) -> int:
    rows = (row for part in out.glob("*/rows/*.parquet") for row in read_rows(part))
    return sum(row.finished_at >= started for row in rows)


if __name__ == "__main__":
    sys.exit(main())
