"""Measure the time that storage and results add to one predict.

Does every step of a task except the inference, with the same classes as the server: claim the row, read the
image (a 1280 x 720 JPEG) meanwhile, store the mask (a PNG), settle the row; the outbox is included. It
measures the embedded stores (folder, SQLite), and real servers on loopback: SeaweedFS for R2, PostgreSQL +
PostgREST behind a gateway for Supabase. Each run measures both, alternating, one task at a time; then 50
tasks at once. Every stored mask is read back; the report has its IoU with the drawn object.

    python -m benchmarks.stores            # table, and one line of JSON last
    python -m benchmarks.stores --record   # also appends to benchmarks/stores.csv
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.request import url2pathname
from uuid import uuid4

import numpy as np
from PIL import Image
from tqdm import tqdm

from benchmarks.pictures import FIRST_SEED, Scene
from benchmarks.table import machine_name, record
from outputs.mask_png import encode_png
from processes import identity
from results import Outbox, SqliteResults, Task, open_outbox
from results.supabase import SupabaseResults
from storage import LocalFolder, mask_key
from storage.r2 import R2Bucket
from tests.services import database as databases
from tests.services import objects

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import numpy.typing as npt

    from results import ResultStore
    from storage import ObjectStore

T = TypeVar("T")

LEASE_S = 120.0
MAX_BYTES = 10 * 1024 * 1024
CONCURRENT = 50
STORES_CSV = Path(__file__).parent / "stores.csv"
STEPS = ("claim", "download", "upload", "finish")


@dataclass
class Tier:
    """The stores to measure, and the Edge's operations on them."""

    name: str
    objects: ObjectStore
    outbox: Outbox
    user_id: str
    put: Callable[[str, bytes], None]
    insert: Callable[[Task], Awaitable[None]]
    read: Callable[[str], bytes]
    step_ms: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    ious: list[float] = field(default_factory=list)

    async def new_task(self, jpeg: bytes) -> Task:
        """Upload an image and insert its pending row."""
        key = f"uploads/{self.user_id}/{uuid4()}"
        await asyncio.to_thread(self.put, key, jpeg)
        task = Task(str(uuid4()), self.user_id, key, ("red circle",))
        await self.insert(task)
        return task

    async def run(self, task: Task, png: bytes) -> str:
        """Do and time every step of one task except the inference; returns the mask's URL."""
        started_s = time.perf_counter()
        attempt = await self.outbox.record(task, "benchmark")
        # Concurrent, as in the pipeline.
        stored, _ = await asyncio.gather(
            self._timed("claim", self.outbox.claim(attempt)),
            self._timed(
                "download", self.objects.download_image(task.source_image_url, self.user_id, MAX_BYTES)
            ),
        )
        assert stored is None
        await self.outbox.begin_work(attempt, None)
        key = mask_key(self.user_id, task.task_id, 0, png, attempt_id=attempt.attempt_id)
        await self.outbox.begin_storing(attempt, [key])
        url = await self._timed("upload", self.objects.upload_mask(png, key))
        metadata: dict[str, object] = {"confidence": 0.99, "prompts": list(task.prompts), "results": []}
        finish = self.outbox.update_result(attempt, url, list(task.prompts), metadata, [key])
        await self._timed("finish", finish)
        self.step_ms["added"].append((time.perf_counter() - started_s) * 1000)
        return url

    async def _timed(self, step: str, work: Awaitable[T]) -> T:
        started_s = time.perf_counter()
        answer = await work
        self.step_ms[step].append((time.perf_counter() - started_s) * 1000)
        return answer

    def check(self, url: str, truth: npt.NDArray[np.bool_]) -> None:
        """Read a stored mask and add its IoU."""
        mask = np.asarray(Image.open(io.BytesIO(self.read(url)))) > 0
        self.ious.append(float((mask & truth).sum() / (mask | truth).sum()))


def main() -> int:
    """Measure, print, and append to the CSV file if --record is given."""
    arguments = _parse()
    scenes = [scene for seed in range(FIRST_SEED, FIRST_SEED + 12) if (scene := Scene(seed)).masks]
    reports = []
    for number in range(arguments.runs):
        with tempfile.TemporaryDirectory() as folder:
            sys.stdout.write(f"run {number + 1} of {arguments.runs}\n")
            reports.append(_run(Path(folder), scenes, arguments.tasks))
    rows = [_row(name, [report[name] for report in reports]) for name in reports[0]]
    for row in rows:
        sys.stdout.write("\n".join(f"{key:22} {value}" for key, value in row.items()) + "\n\n")
    if arguments.record:
        record(STORES_CSV, rows)
    sys.stdout.write(json.dumps(rows) + "\n")
    return 0


def _run(folder: Path, scenes: list[Scene], tasks: int) -> dict[str, tuple[Tier, float]]:
    with databases.database(folder) as database, objects.seaweedfs(folder) as bucket:
        return asyncio.run(_measure(folder, database, bucket, scenes, tasks))


async def _measure(
    folder: Path, database: databases.Database, bucket: objects.S3Service, scenes: list[Scene], tasks: int
) -> dict[str, tuple[Tier, float]]:
    tiers = [_embedded(folder), _real(folder, database, bucket)]
    masks = [next(iter(scene.masks.values())) for scene in scenes]
    pngs = [encode_png(np.packbits(mask, axis=1), mask.shape[1]) for mask in masks]
    try:
        for number in tqdm(range(-10, tasks), desc="tasks", disable=None):
            scene, png = scenes[number % len(scenes)], pngs[number % len(scenes)]
            for tier in tiers:
                url = await tier.run(await tier.new_task(scene.jpeg), png)
                tier.check(url, next(iter(scene.masks.values())))
                if number < 0:  # negative rounds are the warm-up
                    tier.step_ms.clear()
        measured = {}
        for tier in tiers:
            single_step_ms, tier.step_ms = tier.step_ms, defaultdict(list)
            concurrent = [await tier.new_task(scenes[0].jpeg) for _ in range(CONCURRENT)]
            started_s = time.perf_counter()
            await asyncio.gather(*(tier.run(task, pngs[0]) for task in concurrent))
            per_task_ms = (time.perf_counter() - started_s) * 1000 / CONCURRENT
            tier.step_ms = single_step_ms
            measured[tier.name] = (tier, per_task_ms)
        return measured
    finally:
        for tier in tiers:
            await tier.outbox.close()
            await tier.objects.close()


def _embedded(folder: Path) -> Tier:
    store = LocalFolder(folder / "objects")
    rows = SqliteResults(folder / "results.sqlite", LEASE_S)
    return Tier(
        name="folder + SQLite",
        objects=store,
        outbox=_outbox(folder / "embedded.sqlite", rows),
        user_id="bench",
        put=store.put_upload,
        insert=rows.insert_pending,
        read=lambda url: Path(url2pathname(url.removeprefix("file://"))).read_bytes(),
    )


def _real(folder: Path, database: databases.Database, bucket: objects.S3Service) -> Tier:
    store = R2Bucket(
        endpoint=bucket.endpoint,
        bucket=bucket.bucket,
        access_key_id=bucket.access_key_id,
        secret_access_key=bucket.secret_access_key,
    )
    user_id = database.add_user()

    async def insert(task: Task) -> None:
        await asyncio.to_thread(
            database.execute,
            "insert into segmentation_results (id, user_id, source_image_url, text_prompt)"
            " values (%s, %s, %s, %s)",
            *(task.task_id, user_id, task.source_image_url, task.text_prompt),
        )

    return Tier(
        name="SeaweedFS + PostgREST",
        objects=store,
        outbox=_outbox(
            folder / "real.sqlite", SupabaseResults(database.url, database.secret_key, lease_s=LEASE_S)
        ),
        user_id=user_id,
        put=bucket.put,
        insert=insert,
        read=lambda url: bucket.get(url[url.index("masks/") :]),
    )


def _outbox(path: Path, rows: ResultStore) -> Outbox:
    return open_outbox(
        path,
        rows,
        owner=identity.current(),
        is_alive=identity.is_alive,
        server_version="benchmark",
        lease_s=LEASE_S,
        outage_limit_s=LEASE_S,
    )


def _row(name: str, runs: list[tuple[Tier, float]]) -> dict[str, object]:
    step_ms = {step: [ms for tier, _ in runs for ms in tier.step_ms[step]] for step in (*STEPS, "added")}
    whole_ms = step_ms["added"]
    return {
        "measured": datetime.now(UTC).date().isoformat(),
        "machine": machine_name(),
        "stores": name,
        "runs": len(runs),
        "tasks": len(whole_ms),
        **{f"{step}_p50_ms": round(statistics.median(step_ms[step]), 2) for step in STEPS},
        "added_p50_ms": round(statistics.median(whole_ms), 1),
        "added_p95_ms": round(float(np.percentile(whole_ms, 95)), 1),
        "ms_per_task_50_concurrent": round(statistics.median(ms for _, ms in runs), 1),
        "mask_iou": round(min(iou for tier, _ in runs for iou in tier.ious), 4),
    }


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3, help="server starts")
    parser.add_argument("--tasks", type=int, default=100, help="per run")
    parser.add_argument("--record", action="store_true", help=f"append to {STORES_CSV.name}")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
