"""Measure what a picture leaves in a bulk run, in bytes and in time of one core: rows, mask, plan, results.

Pictures of 1920 x 1080 with 1, 5 and 20 objects at random places, all found by one prompt: each is a blob of
another shape, about half of a square of 100 px. No model runs. `results` is the pass over all rows that makes
coco.json and summary.json, and chooses the samples of the report.
`page` is one answer of a bucket's list, with 1,000 names, of SeaweedFS on this machine.

    python -m benchmarks.bulk_parts --record
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.outputs import HEIGHT, WIDTH
from benchmarks.table import machine_name, record
from bulk.errors import PictureError
from bulk.objects import open_objects
from bulk.plan import make_plan
from bulk.report import RunDescription
from bulk.rows import TimingsMs, found_row, write_part
from bulk.run_results import COCO, write_results
from bulk.settings import DEFAULT_SHARD_PICTURES
from bulk.sources import Picture, list_pictures
from outputs.mask_png import encode_png
from sam3_runner.instances import Instance, MaskCrop, PredictResult, packed_union
from tests.services.objects import BUCKET, seaweedfs

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    from bulk.rows import PictureRow

    T = TypeVar("T")

RESULTS = Path(__file__).parent / "bulk_parts.csv"
INSTANCES = (1, 5, 20)
SHARDS = 16
LISTED = 5000
SEED = 0
PROMPT = "blob"
BLOB_PX, BLOB_CELLS = 100, 4


def pictures(instances: int) -> list[list[PredictResult]]:
    """The results of a shard's pictures."""
    random = np.random.default_rng(SEED)
    return [
        [PredictResult(PROMPT, 0.9, WIDTH, HEIGHT, [blob(random, number) for number in range(instances)])]
        for _ in range(DEFAULT_SHARD_PICTURES)
    ]


def blob(random: np.random.Generator, query: int) -> Instance:
    """An object with a smooth outline that no other one has."""
    cells = Image.fromarray(random.standard_normal((BLOB_CELLS, BLOB_CELLS)).astype(np.float32))
    mask = np.asarray(cells.resize((BLOB_PX, BLOB_PX), Image.Resampling.BICUBIC)) > 0
    left, top = random.integers(0, (WIDTH - BLOB_PX, HEIGHT - BLOB_PX)).tolist()
    aligned = np.packbits(np.pad(mask, ((0, 0), (left % 8, 0))), axis=1)
    box = (left, top, left + BLOB_PX, top + BLOB_PX)
    crop = MaskCrop(left, top, BLOB_PX, BLOB_PX, aligned.tobytes())
    return Instance(float(random.uniform(0.5, 1.0)), box, int(mask.sum()), query, crop)


def uri(number: int) -> str:
    """Of a picture, as an Edge names its uploads."""
    key = hashlib.sha256(str(number).encode()).hexdigest()
    return f"s3://s3-images/uploads/{key[:36]}/{key[28:]}"


def row_of(number: int, results: list[PredictResult]) -> PictureRow:
    """The row of one picture."""
    digest = hashlib.sha256(str(number).encode()).hexdigest()
    return found_row(
        uri(number),
        results,
        image_bytes=370_000,
        image_sha256=digest,
        key=digest,
        timings_ms=TimingsMs(20.0, 15.0, 13.1, 9.0),
        model_sha256=hashlib.sha256(b"model").hexdigest(),
        finished_at=datetime.now(UTC),
    )


def cpu_ms(work: Callable[[], T], count: int) -> tuple[float, T]:
    """CPU time of this process for each of `count`, and the result of `work`."""
    begun_s = time.process_time()
    result = work()
    return (time.process_time() - begun_s) / count * 1000, result


def measure(instances: int, folder: Path) -> dict[str, object]:
    """A row of figures for pictures with so many instances."""
    found = pictures(instances)
    count = len(found)
    png_ms, pngs = cpu_ms(lambda: [encode_png(packed_union(each), WIDTH) for each in found], count)
    row_ms, rows = cpu_ms(lambda: [row_of(number, each) for number, each in enumerate(found)], count)
    part_ms, part = cpu_ms(lambda: write_part(rows), count)
    run = RunDescription(
        "0" * 12, "s3://s3-images/uploads", str(folder), (PROMPT,), {}, "demo", "0" * 64, "0"
    )
    parts = [part] * SHARDS
    results_ms, _ = cpu_ms(lambda: write_results(parts, folder, run, _no_picture), count * SHARDS)
    return {
        "instances": instances,
        "png_bytes": round(statistics.mean(map(len, pngs))),
        "row_bytes": round(len(part) / count),
        "coco_bytes": round((folder / COCO).stat().st_size / count / SHARDS),
        "png_ms": round(png_ms, 2),
        "row_ms": round(row_ms + part_ms, 2),
        "results_ms": round(results_ms, 2),
    }


def _no_picture(_: str) -> bytes:
    raise PictureError("NOT_FOUND", "no picture is stored here")


def measure_plan(folder: Path) -> dict[str, object]:
    """Bytes and time of the plan for each picture, as listed."""
    count = 200_000
    listed = (Picture(uri(number), 370_000, f'"{number:032x}"') for number in range(count))
    objects = open_objects(str(folder / "plan"))
    plan_ms, _ = cpu_ms(lambda: make_plan(objects, listed, DEFAULT_SHARD_PICTURES), count)
    size = sum(stored.size_bytes for stored in objects.list("plan/"))
    return {"plan_bytes": round(size / count), "plan_ms": round(plan_ms, 4)}


def measure_manifest(folder: Path) -> dict[str, object]:
    """Time of a picture of a Parquet manifest: read, compared with those before, and written to the plan."""
    manifest, objects = folder / "pictures.parquet", open_objects(str(folder / "manifest-plan"))
    count = 500_000
    pq.write_table(pa.table({"image": [uri(number) for number in range(count)]}), manifest)
    manifest_ms, _ = cpu_ms(
        lambda: make_plan(objects, list_pictures(str(manifest)), DEFAULT_SHARD_PICTURES), count
    )
    return {"manifest_ms": round(manifest_ms, 4)}


def measure_listing(folder: Path) -> dict[str, object]:
    """Time of a page of 1,000 names, and of this how much is this process's CPU."""
    with seaweedfs(folder) as service:
        os.environ |= {
            "AWS_ACCESS_KEY_ID": service.access_key_id,
            "AWS_SECRET_ACCESS_KEY": service.secret_access_key,
            "AWS_ENDPOINT_URL_S3": service.endpoint,
        }
        for number in range(LISTED):
            service.put(uri(number).removeprefix("s3://s3-images/"), b"")
        begun_s = time.perf_counter()
        listing_ms, names = cpu_ms(lambda: list(open_objects(f"s3://{BUCKET}").list()), LISTED // 1000)
        elapsed_ms = (time.perf_counter() - begun_s) * 1000 / (LISTED // 1000)
        assert len(names) == LISTED
    return {"page_ms": round(elapsed_ms, 1), "page_cpu_ms": round(listing_ms, 1)}


def measure_driver() -> dict[str, object]:
    """Memory of the two collections of shards that the command holds, by the shard."""
    process, count = psutil.Process(), 2_000_000
    before = process.memory_info().rss
    done = set(range(0, 2 * count, 2))
    todo = [shard for shard in range(2 * count) if shard not in done]
    grown = process.memory_info().rss - before
    return {"driver_bytes_per_shard": round(grown / (len(done) + len(todo)))}


def main() -> None:
    """Measure, print, and append to the CSV file if --record is given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", action="store_true", help=f"append to {RESULTS.name}")
    record_it = parser.parse_args().record
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        once = measure_driver() | measure_plan(folder) | measure_manifest(folder) | measure_listing(folder)
        for instances in INSTANCES:
            machine = {"measured": datetime.now(UTC).date().isoformat(), "machine": machine_name()}
            rows.append(machine | measure(instances, folder) | once)
            sys.stdout.write("  ".join(f"{name} {value}" for name, value in rows[-1].items()) + "\n")
    if record_it:
        record(RESULTS, rows)


if __name__ == "__main__":
    main()
