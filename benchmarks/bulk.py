r"""Measure `sam3 bulk` beside the bare predictor, and kill it.

    python -m benchmarks.bulk --pictures 2000 --record
    python -m benchmarks.bulk --pictures 20000 --kills 10 --record
    python -m benchmarks.bulk --weights random --kept 1 --size 1920 1080 --pictures 9000 --distinct 16 \
        --store folder --gpus 1 2 --record

Draws pictures, stores them in SeaweedFS's S3 API on this machine or in a folder, and runs the command over
them with one prompt. Above --distinct the scenes repeat, in files with a comment of their own: each is read,
decoded and stored. Beside it, the bare loop, 8 pictures at a time, nothing written, before and after the run;
the mean counts, since other programs of the machine come and go:

- On CPUs: the predictor over the same files, with all threads in one process and with a process for each
  core; the faster one counts.
- On GPUs: the predictor over pictures that are decoded already, which is the engine's rate, on one GPU;
  "share" is of that times the number of GPUs.

Random weights score everything alike: --kept sets the threshold so that so many instances of a picture are
kept on average. Their masks are noise over the whole picture: at 1920 x 1080 the run lengths of one take as
much time as those of 20 objects.

- "rate" is of the run between the ends of its first and its last shard; "whole" includes the list, Ray's
  start, the load of the model, COCO and the report.
- Memory: PSS of all processes of the command, in which a page that several share counts once, read every few
  seconds; the store's own processes are left out. Growth is the mean of the run's last quarter against its
  second.
- Kills: by kill -9, at random times from a seed, of the command, of Ray's raylet, or of a process of a stage.
  After the first two the command is started again. At the end every picture must have one row, and no object
  that was stored at a kill may have changed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from PIL import Image
from tqdm import tqdm

from benchmarks.pictures import FIRST_SEED, encode_jpeg, with_comment
from benchmarks.process_tree import call_each, process_tree
from benchmarks.table import machine_name, record
from bulk.objects import Objects, open_objects
from bulk.rows import read_rows
from commands.local_server import ROOT
from sam3_runner import SAM3Predictor
from sam3_runner.images.decode import decode_square
from sam3_runner.images.read import read_image_file
from sam3_runner.prompts import ConceptPrompt
from sam3_runner.serving.cpu_share import cpu_share
from tests.services import objects
from training.scenes import draw_scenes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sam3_runner.images.decoded import DecodedImage

RESULTS = Path(__file__).parent / "bulk.csv"
PROMPT = "red circle"
BATCH = 8
DRAWN_AT_ONCE = 16
BARE_S = 20.0
MAX_DECODED = 64
"""Scenes that a bare loop on a GPU has decoded, 3 MB each, and that the threshold is set by."""
STORE_VOLUMES = 64
"""4 GB: 20,000 drawn pictures are 0.9."""
MEMORY_INTERVAL_S = 5.0
KILLED = ("command", "raylet", "Fetch", "Segment", "Write")


@dataclass(frozen=True, slots=True)
class Options:
    """Of the command line."""

    pictures: int
    distinct: int
    size: tuple[int, int]
    weights: str
    kept: int
    store: str
    gpus: list[int]
    kills: int
    seed: int
    record: bool
    bulk: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Ended:
    """One row."""

    image: str
    instances: int
    finished_at: datetime


def main() -> int:
    """Measure, print, and append to the CSV file if --record is given."""
    options = _parse()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sam3-bulk-benchmark-")))
        weights = _weights(options.weights, folder)
        drawn = folder / "in"
        _draw(options, drawn)
        images, out, environment = _stored(options, folder, drawn, stack)
        scenes = sorted(drawn.iterdir())[: min(options.distinct, MAX_DECODED)]
        threshold = _in_process(_threshold, options.kept, scenes, weights) if options.kept else None
        arguments = ["--images", images, "--weights", weights, *options.bulk]
        if threshold is not None:
            arguments += ["--score-threshold", str(threshold)]
        before = _bare_rate(drawn, weights, threshold)
        runs = []
        for gpus in options.gpus or [torch.cuda.device_count()]:
            visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(gpus)))}
            run = BulkRun(f"{out}/{gpus}", arguments, environment | visible, options)
            run.to_its_end()
            runs.append((gpus, run, run.check()))
        bare = [before, _bare_rate(drawn, weights, threshold)]
    rows = [_row(options, gpus, bare, run, ended) for gpus, run, ended in runs]
    print(json.dumps(rows, indent=1))  # noqa: T201 - the result
    if options.record:
        record(RESULTS, rows)
    return int(any(row["lost"] or row["twice"] or row["changed"] for row in rows))


def _row(
    options: Options, gpus: int, bare: Sequence[float], run: BulkRun, rows: Sequence[Ended]
) -> dict[str, Any]:
    rate, names = _rate(rows), {row.image for row in rows}
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine_name(),
        "gpus": gpus,
        "weights": options.weights,
        "pictures": options.pictures,
        "size": "x".join(map(str, options.size)),
        "store": options.store,
        "kept": options.kept,
        "instances": round(statistics.mean(row.instances for row in rows), 2),
        "options": " ".join(options.bulk),
        "bare_before": round(bare[0], 2),
        "bare_after": round(bare[1], 2),
        "rate": round(rate, 2),
        "share": round(rate / statistics.mean(bare) / max(1, gpus), 3),
        "whole_s": round(run.time_s, 1),
        "memory_mb": round(max(run.memory_mb)),
        "memory_growth": round(run.memory_growth, 3),
        "kills": " ".join(run.killed),
        "lost": options.pictures - len(names),
        "twice": len(rows) - len(names),
        "changed": run.changed,
    }


def _parse() -> Options:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--distinct", type=int, default=500, help="scenes; further files repeat them")
    parser.add_argument("--size", nargs=2, type=int, default=(640, 480), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--weights", default="demo", help="demo, random (full size), or a path")
    parser.add_argument("--kept", type=int, default=0, help="instances a picture; 0: the model's threshold")
    parser.add_argument("--store", choices=("s3", "folder"), default="s3")
    parser.add_argument("--gpus", type=int, nargs="+", default=[], help="a run for each number; default: all")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1, help="of the kills")
    parser.add_argument("--record", action="store_true", help=f"append to {RESULTS.name}")
    parser.add_argument("bulk", nargs="*", help="after --: further options of sam3 bulk")
    given = parser.parse_args()
    return Options(**{**vars(given), "size": tuple(given.size), "bulk": tuple(given.bulk)})


def _weights(name: str, folder: Path) -> str:
    if name != "random":
        return name
    from benchmarks.parity import random_transformers_folder  # noqa: PLC0415 - loads torch

    weights = folder / "weights"
    weights.mkdir()
    return str(random_transformers_folder(weights))


def _draw(options: Options, folder: Path) -> None:
    folder.mkdir()
    torch.set_num_threads(1)  # a second thread takes longer here: the operations are small
    width, height = options.size
    distinct = min(options.distinct, options.pictures)
    for start in tqdm(range(0, distinct, DRAWN_AT_ONCE), "drawing", unit_scale=DRAWN_AT_ONCE):
        _, scenes = draw_scenes(DRAWN_AT_ONCE, FIRST_SEED + start, width=width, height=height)
        pixels = scenes.pixels.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        for number in range(start, min(start + DRAWN_AT_ONCE, distinct)):
            jpeg = encode_jpeg(Image.fromarray(pixels[number - start]), 90)
            (folder / f"{number:07}.jpg").write_bytes(jpeg)
    for number in range(distinct, options.pictures):
        jpeg = (folder / f"{number % distinct:07}.jpg").read_bytes()
        (folder / f"{number:07}.jpg").write_bytes(with_comment(jpeg, f"{number:07}".encode()))


def _stored(options: Options, folder: Path, drawn: Path, stack: ExitStack) -> tuple[str, str, dict[str, str]]:
    """Where the pictures and the results are, and the environment of the command."""
    if options.store == "folder":
        return str(drawn), str(folder / "out"), {}
    store = stack.enter_context(objects.seaweedfs(folder, STORE_VOLUMES))
    environment = {
        "AWS_ENDPOINT_URL": store.endpoint,
        "AWS_ACCESS_KEY_ID": store.access_key_id,
        "AWS_SECRET_ACCESS_KEY": store.secret_access_key,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    os.environ.update(environment)
    for file in tqdm(sorted(drawn.iterdir()), "storing"):
        store.put(f"in/{file.name}", file.read_bytes(), "image/jpeg")
    return f"s3://{store.bucket}/in", f"s3://{store.bucket}/out", environment


def _in_process(work: Callable[..., Any], *arguments: object) -> Any:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def _threshold(kept: int, scenes: Sequence[Path], weights: str) -> float:
    """That keeps so many instances of a scene on average."""
    predictor = _predictor(weights)
    prompts = [ConceptPrompt(PROMPT, score_threshold=0.0)]
    scores = []
    for start in range(0, len(scenes), BATCH):
        batch = _squares(scenes[start : start + BATCH], predictor)
        for [result] in predictor.segment([(square, prompts) for square in batch]):
            scores += [each.score for each in result.instances]
    return sorted(scores, reverse=True)[kept * len(scenes)]


def _bare_rate(folder: Path, weights: str, threshold: float | None) -> float:
    """Pictures a second of the bare loop; the best of its arrangements."""
    if torch.cuda.is_available():
        rates = [float(_in_process(_bare_loop, folder, weights, threshold))]
    else:
        cores = cpu_share().threads
        rates = []
        for processes, threads in dict.fromkeys([(1, cores), (cores, 1)]):
            with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
                runs = [
                    pool.submit(_bare_loop, folder, weights, threshold, threads, (number, processes))
                    for number in range(processes)
                ]
                rates.append(sum(run.result() for run in runs))
    print(f"bare loop: {[round(rate, 2) for rate in rates]} pictures/s", file=sys.stderr)  # noqa: T201
    return max(rates)


def _bare_loop(
    folder: Path, weights: str, threshold: float | None, threads: int = 1, part: tuple[int, int] = (0, 1)
) -> float:
    """Pictures a second of one process, which takes every n-th file: `part` is the first one, and n."""
    torch.set_num_threads(threads)
    predictor = _predictor(weights)
    prompts = [ConceptPrompt(PROMPT, score_threshold=threshold)]
    files = sorted(folder.iterdir())[part[0] :: part[1]]
    decoded = _squares(files[:MAX_DECODED], predictor) if torch.cuda.is_available() else []
    done, started_s = 0, time.perf_counter()
    while time.perf_counter() - started_s < BARE_S:
        places = range(done, done + BATCH)
        if decoded:
            batch = [decoded[place % len(decoded)] for place in places]
        else:
            batch = _squares([files[place % len(files)] for place in places], predictor)
        predictor.segment([(square, prompts) for square in batch])
        done += BATCH
    return done / (time.perf_counter() - started_s)


def _predictor(weights: str) -> SAM3Predictor:
    predictor = SAM3Predictor(weights, max_images=BATCH)
    predictor.load()
    predictor.warm_up(BATCH)
    return predictor


def _squares(files: Sequence[Path], predictor: SAM3Predictor) -> list[DecodedImage]:
    assert predictor.checkpoint is not None
    side_px = predictor.checkpoint.input_side_px
    return [decode_square(read_image_file(file.read_bytes(), max_pixels=2**26), side_px) for file in files]


class BulkRun:
    """The command over all pictures, started again after each kill that ends it.

    Attributes:
        memory_mb: of all its processes, at intervals.
        killed: what was killed.
        changed: objects that were stored at a kill and differed later.
        time_s: of the whole run.
    """

    def __init__(
        self, out: str, arguments: Sequence[str], environment: dict[str, str], options: Options
    ) -> None:
        self._command = [sys.executable, "-m", "sam3_client", "bulk", "--prompts", PROMPT, "--out", out]
        self._command += arguments
        self._environment = os.environ | environment
        self._options = options
        self._out = out
        self._random = random.Random(options.seed)  # noqa: S311 - for a reproducible choice
        self._stored: dict[str, str | None] = {}
        self.memory_mb: list[float] = []
        self.killed: list[str] = []
        self.changed = 0
        self.time_s = 0.0

    def to_its_end(self) -> None:
        """Run; raises RuntimeError if the command fails by itself."""
        started_s = time.monotonic()
        shards = -(-self._options.pictures // 64)
        kills = sorted(self._random.uniform(0.02, 0.98) * shards for _ in range(self._options.kills))
        while True:
            process = subprocess.Popen(self._command, cwd=ROOT, env=self._environment)  # noqa: S603 - ours
            is_killed = self._watch(process, kills)
            if not is_killed:
                break
        if process.returncode:
            raise RuntimeError(f"sam3 bulk has ended with exit code {process.returncode}")
        self.time_s = time.monotonic() - started_s

    def _watch(self, process: subprocess.Popen[bytes], kills: list[float]) -> bool:
        """Read the memory and kill until the command ends; returns whether that was a kill."""
        seen: dict[int, psutil.Process] = {}
        while process.poll() is None:
            running = process_tree(process.pid)
            seen |= {each.pid: each for each in running}
            self.memory_mb.append(sum(call_each(running, lambda each: each.memory_full_info().pss)) / 1e6)
            if kills and self._done_shards() >= kills[0]:
                kills.pop(0)
                if self._kill(process, seen):
                    process.wait()
                    psutil.wait_procs(list(seen.values()), timeout=60)
                    return True
            try:
                process.wait(MEMORY_INTERVAL_S)
            except subprocess.TimeoutExpired:
                continue
        return False

    def _kill(self, process: subprocess.Popen[bytes], seen: dict[int, psutil.Process]) -> bool:
        """Kill something; returns whether the command has ended by it."""
        self._look_for_changes()
        what = self._random.choice(KILLED)
        titles = call_each(seen.values(), lambda each: (f"{each.name()} {' '.join(each.cmdline())}", each))
        self.killed.append(what)
        print(f"kill -9 of {what}", file=sys.stderr)  # noqa: T201 - progress
        if what == "command":
            process.kill()
        call_each([each for title, each in titles if what in title], psutil.Process.kill)
        if what == "raylet":
            process.kill()  # as an operator does, whose command says nothing any more
        return what in {"command", "raylet"}

    def _folder(self) -> Objects:
        [run] = {stored.name.partition("/")[0] for stored in open_objects(self._out).list()}
        return open_objects(f"{self._out}/{run}")

    def _done_shards(self) -> int:
        try:
            return sum(1 for _ in self._folder().list("rows/"))
        except ValueError:  # there is no run yet
            return 0

    def _look_for_changes(self) -> None:
        """Compare what is stored with what was stored before, by its ETag or content."""
        folder = self._folder()
        found: dict[str, str | None] = {}
        for stored in folder.list():
            if stored.name.startswith(("rows/", "masks/", "plan")):
                found[stored.name] = stored.etag or str(hash(folder.read(stored.name)))
        self.changed += sum(found.get(name) != etag for name, etag in self._stored.items())
        self._stored = found

    def check(self) -> list[Ended]:
        """The rows, after a last look for changes."""
        self._look_for_changes()
        folder = self._folder()
        rows = [row for stored in folder.list("rows/") for row in read_rows(folder.read(stored.name))]
        codes = Counter(row.error_code for row in rows if row.status != "done")
        print(f"{len(rows)} rows, error rows: {dict(codes)}", file=sys.stderr)  # noqa: T201
        return [Ended(row.image, len(row.instances), row.finished_at) for row in rows]

    @property
    def memory_growth(self) -> float:
        """Of the last quarter against the second, as a share."""
        quarter = max(1, len(self.memory_mb) // 4)
        second = statistics.mean(self.memory_mb[quarter : 2 * quarter] or self.memory_mb)
        return statistics.mean(self.memory_mb[-quarter:]) / second - 1


def _rate(rows: Sequence[Ended]) -> float:
    """Pictures a second after the first shard."""
    times = sorted(row.finished_at for row in rows)
    first = times[min(63, len(times) - 1)]
    return max(0, len(times) - 64) / max((times[-1] - first).total_seconds(), 1e-3)


if __name__ == "__main__":
    sys.exit(main())
