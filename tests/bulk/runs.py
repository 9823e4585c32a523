"""Runs of `sam3 bulk` in processes of their own, over drawn pictures in a bucket."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from PIL import Image

from benchmarks.process_tree import call_each, process_tree
from bulk.rows import read_rows
from tests.services.processes import wait_until
from training.scenes import draw_scenes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bulk.rows import PictureRow
    from tests.services.objects import S3Service

ROOT = Path(__file__).parents[2]
PROMPTS = ("red circle", "star")
RUN_TIMEOUT_S = 300.0


@cache
def picture(seed: int) -> bytes:
    """A drawn picture as JPEG; each seed draws another."""
    _, drawn = draw_scenes(1, seed, width=160, height=120)
    pixels = drawn.pixels[0].round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


@dataclass(frozen=True)
class BulkRuns:
    """A place in a bucket: its pictures below `in/`, its runs below `out/`.

    Attributes:
        endpoint: of the S3 API that the command uses; a proxy's, or the store's own.
        stderr: what the commands have written, each to a file.
    """

    store: S3Service
    prefix: str
    endpoint: str
    folder: Path
    pictures: dict[str, bytes] = field(default_factory=dict, repr=False)

    @property
    def uri(self) -> str:
        return f"s3://{self.store.bucket}/{self.prefix}"

    def put(self, name: str, data: bytes) -> None:
        """Store a picture."""
        self.store.put(f"{self.prefix}/in/{name}", data)
        self.pictures[f"{self.uri}/in/{name}"] = data

    def put_drawn(self, count: int, first_seed: int = 0) -> None:
        """Store drawn pictures."""
        for seed in range(first_seed, first_seed + count):
            self.put(f"{seed:05}.jpg", picture(seed))

    @contextmanager
    def command(self, *options: str) -> Iterator[BulkProcess]:
        """Run the command; at the end of the block it and its processes are killed if they still run."""
        log = self.folder / f"{len(list(self.folder.iterdir()))}.log"
        arguments = [
            *("--images", f"{self.uri}/in", "--prompts", *PROMPTS, "--out", f"{self.uri}/out"),
            *("--weights", "demo", "--shard-pictures", "12", *options),
        ]
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "sam3_client", "bulk", *arguments],
                cwd=ROOT,
                env=self._environment(),
                stdout=stderr,
                stderr=stderr,
                start_new_session=True,
            )
        running = BulkProcess(process, log)
        try:
            yield running
        finally:
            running.kill()

    def _environment(self) -> dict[str, str]:
        return os.environ | {
            "AWS_ACCESS_KEY_ID": self.store.access_key_id,
            "AWS_SECRET_ACCESS_KEY": self.store.secret_access_key,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
        }

    def stored(self, folder: str = "") -> dict[str, tuple[str, str]]:
        """What is below `out/<run>/<folder>`: ETag and time of each object, by its name in the run."""
        pages = self.store.client.get_paginator("list_objects_v2").paginate(
            Bucket=self.store.bucket, Prefix=f"{self.prefix}/out/"
        )
        found = {}
        for page in pages:
            for entry in page.get("Contents", []):
                name = entry["Key"].removeprefix(f"{self.prefix}/out/").partition("/")[2]
                if name.startswith(folder):
                    found[name] = entry["ETag"], entry["LastModified"].isoformat()
        return found

    def read(self, name: str) -> bytes:
        """An object of the only run."""
        [key] = [
            key
            for key in self.store.keys(f"{self.prefix}/out/")
            if key.removeprefix(f"{self.prefix}/out/").partition("/")[2] == name
        ]
        return self.store.get(key)

    def rows(self) -> list[PictureRow]:
        """All rows that are stored."""
        return [row for name in sorted(self.stored("rows/")) for row in read_rows(self.read(name))]

    def wait_for_rows(self, files: int, process: BulkProcess) -> None:
        """Wait until so many shards are stored, while the command runs."""

        def is_there() -> bool:
            assert process.is_running, process.output()
            return len(self.stored("rows/")) >= files

        wait_until(is_there, RUN_TIMEOUT_S)

    def check_each_picture_once(self) -> None:
        """Every picture has one row, and every mask that is stored belongs to one."""
        rows = self.rows()
        assert Counter(row.image for row in rows) == Counter(self.pictures.keys())
        named = {prompt.mask for row in rows for prompt in row.prompts if prompt.mask}
        assert named == self.stored("masks/").keys()


class BulkProcess:
    """A command that runs."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process, self._log = process, log
        self._seen: dict[int, psutil.Process] = {}

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def output(self) -> str:
        """What it has printed."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def exit_code(self) -> int:
        """Wait for its end."""
        return self._process.wait(RUN_TIMEOUT_S)

    def interrupt(self) -> None:
        """Ctrl-C."""
        self._process.send_signal(signal.SIGINT)

    def kill_ray(self) -> None:
        """Kill Ray's raylet, which manages its other processes."""
        self.workers()
        names = call_each(self._seen.values(), lambda each: (each.name(), each))
        [raylet] = [each for name, each in names if name == "raylet"]
        raylet.kill()

    def workers(self, stage: str = "") -> list[psutil.Process]:
        """The processes of Ray's that run this stage, or any."""
        self._seen |= {each.pid: each for each in process_tree(self._process.pid)}
        return [each for each in self._seen.values() if f"MapBatches({stage}" in _title(each)]

    def kill(self) -> None:
        """Kill the command alone, as by kill -9, and wait until Ray has noticed."""
        self.workers()
        self._process.kill()
        self._process.wait()
        wait_until(lambda: not any(_title(each) for each in self.workers()), 60)
        call_each(self._seen.values(), psutil.Process.kill)


def _title(process: psutil.Process) -> str:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return ""
        title = " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""
    return title if title.startswith("ray::MapWorker") else ""
