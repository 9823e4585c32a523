"""Measure what costly images cost the server, and how they affect other requests.

Starts the real server (one API worker, demo checkpoint). It sends each image alone: photos of 50 and 67
megapixels, and crafted files. It records the status, the time of the request, and the peak resident memory
of the worker and of its largest decoder. Then it sends forty costly images at once, and normal requests one
after another meanwhile. Last it stops the server while forty more are in progress. Linux only.

    python -m benchmarks.costly_images            # tables
    python -m benchmarks.costly_images --record   # also appends to benchmarks/costly_images.csv
"""

from __future__ import annotations

import argparse
import io
import platform
import statistics
import struct
import sys
import tempfile
import threading
import time
import uuid
import zlib
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Self

import httpx
import numpy as np
import psutil
from PIL import Image

from benchmarks.pictures import FIRST_SEED, Scene
from benchmarks.table import machine_name, record
from commands.local_server import LocalServer, local_server
from storage import LocalFolder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

USER_ID = "bench"
RESULTS = Path(__file__).parent / "costly_images.csv"
CONCURRENT = 40
REPEATS = 24
NORMAL_REQUESTS = 20
TIMEOUT_S = 120.0
POLL_S = 0.005
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "purple", "orange", "pink", "brown")
TEN_PROMPTS = "JPEG 8192 x 8192, ten prompts"


@cache
def photo(width: int, height: int) -> Image.Image:
    """An image with detail everywhere, like a camera's."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """`image` as a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def blocks(width: int, height: int) -> Image.Image:
    """An image of blocks that differ in colour and transparency: a small file even if lossless."""
    levels = np.random.default_rng(0).integers(0, 256, (height // 160, width // 160, 4), dtype=np.uint8)
    return Image.fromarray(levels).resize((width, height), Image.Resampling.NEAREST)


def flat(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """An image of one colour: a small file at any size."""
    return Image.new(mode, (width, height))


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_chunks(chunk: bytes) -> bytes:
    """A small PNG that repeats one chunk up to 9 MB."""
    data = encoded(flat(100, 100), "PNG")
    return data[:33] + chunk * (9_000_000 // len(chunk)) + data[33:]


def with_segments(body: bytes) -> bytes:
    """A small JPEG that repeats one EXIF segment up to 9 MB."""
    segment = struct.pack(">HH", 0xFFE1, len(body) + 2) + body
    data = encoded(flat(100, 100), "JPEG")
    return data[:2] + segment * (9_000_000 // len(segment)) + data[2:]


def with_scans(width: int, height: int, scans: int) -> bytes:
    """A progressive JPEG of `scans` scans: repeats its last one."""
    data = encoded(flat(width, height), "JPEG", progressive=True)
    repeats = scans - data.count(b"\xff\xda")
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * repeats + data[-2:]


PICTURES: dict[str, Callable[[], bytes]] = {
    "JPEG 1280 x 720": lambda: encoded(photo(1280, 720), "JPEG"),
    "JPEG 8160 x 6144": lambda: encoded(photo(8160, 6144), "JPEG"),
    "JPEG 8192 x 8192": lambda: encoded(photo(8192, 8192), "JPEG"),
    TEN_PROMPTS: lambda: encoded(photo(8192, 8192), "JPEG"),
    "progressive JPEG 8160 x 6144": lambda: encoded(photo(8160, 6144), "JPEG", progressive=True),
    "progressive JPEG 8192 x 6144, 4:4:4": lambda: encoded(
        photo(8192, 6144), "JPEG", progressive=True, subsampling=0
    ),
    "progressive JPEG 8192 x 8192": lambda: encoded(photo(8192, 8192), "JPEG", progressive=True),
    "JPEG 8192 x 8192 of CMYK": lambda: encoded(flat(8192, 8192, "CMYK"), "JPEG"),
    "WEBP 8160 x 6144": lambda: encoded(photo(8160, 6144), "WEBP", quality=60, method=0),
    "lossless WEBP 7680 x 5760 with alpha": lambda: encoded(
        blocks(7680, 5760), "WEBP", lossless=True, method=2
    ),
    "PNG 8192 x 8192 with alpha": lambda: encoded(flat(8192, 8192, "RGBA"), "PNG", compress_level=1),
    "PNG 65535 x 1024": lambda: encoded(flat(65535, 1024), "PNG", compress_level=1),
    "PNG 1024 x 65535": lambda: encoded(flat(1024, 65535), "PNG", compress_level=1),
    "PNG 1 x 65535": lambda: encoded(flat(1, 65535), "PNG"),
    "progressive JPEG 8160 x 6144, 29 scans": lambda: with_scans(8160, 6144, 29),
    "progressive JPEG 3872 x 3872, 100 scans": lambda: with_scans(3872, 3872, 100),
    "PNG 1 x 50,000,000": lambda: encoded(flat(1, 50_000_000, "1"), "PNG"),
    "PNG 50,000,000 x 1": lambda: encoded(flat(50_000_000, 1, "1"), "PNG"),
    "JPEG of 100,000 scans": lambda: with_scans(64, 64, 100_000)[: 9 * 2**20] + b"\xff\xd9",
    "JPEG of odd EXIF segments": lambda: with_segments(b"Exif\0\0II*\0\0\0\0\0"),
    "PNG of text keys": lambda: with_chunks(png_chunk(b"tEXt", b"key%d\0")),
    "PNG of private chunks": lambda: with_chunks(png_chunk(b"prVt", b"")),
    "PNG of empty IDAT chunks": lambda: with_chunks(png_chunk(b"IDAT", b"")),
}
COSTLIEST = "progressive JPEG 3872 x 3872, 100 scans"
"""The image that takes longest to decode, of those that are not refused."""


class Client:
    """Calls the server for one user."""

    def __init__(self, server: LocalServer) -> None:
        self.server = server
        self._http = httpx.Client(base_url=server.url, headers=server.headers, timeout=TIMEOUT_S)
        self._objects = LocalFolder(server.data_dir / "storage")

    def upload(self, data: bytes) -> str:
        """Store an image; returns its key."""
        key = f"uploads/{USER_ID}/{uuid.uuid4()}"
        self._objects.put_upload(key, data)
        return key

    def predict(self, key: str, prompts: int = 1, task_id: str | None = None) -> tuple[int, float]:
        """Send one request of `prompts` prompts, by default for a new task; returns status and time in s."""
        body = {"image_url": key, "user_id": USER_ID, "task_id": task_id or str(uuid.uuid4())}
        words = [f"{colour} circle" for colour in COLOURS[:prompts]]
        started_s = time.perf_counter()
        status = self._http.post("/api/v1/predict/batch", json={**body, "prompts": words}).status_code
        return status, time.perf_counter() - started_s


def main() -> int:
    """Measure, print, and append to the CSV file if --record is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--record", action="store_true", help=f"append to {RESULTS.name}")
    parser.add_argument("--only", help="only images whose name contains this text")
    arguments = parser.parse_args()
    names = [name for name in PICTURES if (arguments.only or "") in name]
    machine = {
        "measured": datetime.now(UTC).date().isoformat(),
        "machine": machine_name(),
        "python": platform.python_version(),
    }
    with tempfile.TemporaryDirectory() as folder, local_server(Path(folder), {"API_WORKERS": "1"}) as server:
        client = Client(server)
        client.predict(client.upload(PICTURES["JPEG 1280 x 720"]()))
        rows = [machine | row for row in _measure_alone(client, names)]
        _measure_repeats(client)
        _measure_others(client)
        stopped_s = _measure_stop(client)
    sys.stdout.write(f"the stop with {CONCURRENT} of them in progress took {stopped_s:.1f} s\n")
    if arguments.record:
        record(RESULTS, rows)
    return 0


def _measure_alone(client: Client, names: list[str]) -> Iterator[dict[str, object]]:
    """Send each image three times; yields time and peak memory."""
    heads = ("MB", "status", "s", "worker MB", "decod. MB", "after MB")
    sys.stdout.write(f"{'picture':42} {' '.join(f'{head:>9}' for head in heads)}\n")
    for name in names:
        data = PICTURES[name]()
        key = client.upload(data)
        with _Peaks(client.server) as peaks:
            answers = [client.predict(key, len(COLOURS) if name == TEN_PROMPTS else 1) for _ in range(3)]
        row = {
            "picture": name,
            "file_mb": round(len(data) / 1e6, 2),
            "status": answers[0][0],
            "request_s": round(statistics.median(elapsed_s for _, elapsed_s in answers), 2),
            "worker_peak_mb": peaks.worker_mb,
            "decoder_peak_mb": peaks.decoder_mb,
            "resident_after_mb": _resident_mb(client.server),
        }
        sys.stdout.write(f"{name:42} {' '.join(f'{value:>9}' for value in list(row.values())[1:])}\n")
        sys.stdout.flush()
        yield row


def _measure_repeats(client: Client) -> None:
    """Repeat the request of a done task of 50 megapixels, many times at once."""
    key, task_id = client.upload(PICTURES["JPEG 8160 x 6144"]()), str(uuid.uuid4())
    client.predict(key, task_id=task_id)
    started_s = time.perf_counter()
    with _Peaks(client.server) as peaks, ThreadPoolExecutor(REPEATS) as pool:
        answers = list(pool.map(lambda _: client.predict(key, task_id=task_id), range(REPEATS)))
    took_s = time.perf_counter() - started_s
    sys.stdout.write(
        f"{REPEATS} concurrent repeats of a done task of 50 megapixels: {took_s:.2f} s, "
        f"answers {sorted({status for status, _ in answers})}; worker {peaks.worker_mb} MB, "
        f"decoder {peaks.decoder_mb} MB at most\n"
    )


def _measure_others(client: Client) -> None:
    """Measure a normal request, alone and while forty costly images are decoded."""
    normal, costly = client.upload(Scene(FIRST_SEED).jpeg), client.upload(PICTURES[COSTLIEST]())
    alone = [client.predict(normal)[1] for _ in range(NORMAL_REQUESTS)]
    with ThreadPoolExecutor(CONCURRENT) as pool:
        requests = [pool.submit(client.predict, costly) for _ in range(CONCURRENT)]
        time.sleep(1.0)  # until the server works on them; they take much longer
        loaded: list[float] = []
        while len(loaded) < NORMAL_REQUESTS and not all(request.done() for request in requests):
            loaded.append(client.predict(normal)[1])
        statuses = sorted({request.result()[0] for request in requests})
    sys.stdout.write(
        f"a normal request: alone {statistics.median(alone):.2f} s, at most {max(alone):.2f} s\n"
        f"during {CONCURRENT} x {COSTLIEST}: {statistics.median(loaded):.2f} s, at most {max(loaded):.2f} s "
        f"({len(loaded)} requests); answers to the costly ones {statuses}\n"
    )


def _measure_stop(client: Client) -> float:
    """Return the time in s from SIGTERM to the end of the last process."""
    costly = client.upload(PICTURES[COSTLIEST]())
    with ThreadPoolExecutor(CONCURRENT) as pool:
        for _ in range(CONCURRENT):
            pool.submit(client.predict, costly)
        time.sleep(1.0)  # until the server works on them
        server = psutil.Process(client.server.pid)
        processes = [server, *server.children(recursive=True)]
        started_s = time.perf_counter()
        server.terminate()
        psutil.wait_procs(processes, timeout=TIMEOUT_S)
        return time.perf_counter() - started_s


class _Peaks(threading.Thread):
    """Polls the peak memory of the worker and its decoders until it is stopped."""

    def __init__(self, server: LocalServer) -> None:
        super().__init__(daemon=True)
        self._worker = _worker(server)
        self._done = threading.Event()
        self.worker_mb = self.decoder_mb = 0

    def __enter__(self) -> Self:
        for process in (self._worker, *self._worker.children()):
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()

    def run(self) -> None:
        """Poll, because a decoder of a large image ends after it."""
        while not self._done.wait(POLL_S):
            self.worker_mb = _peak_mb(self._worker)
            self.decoder_mb = max([self.decoder_mb, *map(_peak_mb, self._worker.children())])


def _worker(server: LocalServer) -> psutil.Process:
    [worker] = [
        child
        for child in psutil.Process(server.pid).children()
        if "sam3" in child.cmdline()  # the name of the API service; the runner's differs
    ]
    return worker


def _resident_mb(server: LocalServer) -> int:
    """Resident memory of the worker and its idle decoders."""
    worker = _worker(server)
    return round(sum(process.memory_info().rss for process in (worker, *worker.children())) / 1e6)


def _peak_mb(process: psutil.Process) -> int:
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:  # the process has ended
        return 0
    return round(sum(int(line.split()[1]) / 1000 for line in status.splitlines() if line.startswith("VmHWM")))


if __name__ == "__main__":
    sys.exit(main())
