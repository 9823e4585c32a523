"""What does a caller wait for, on this machine, with the demo checkpoint?

Starts the real server (two API workers, one runner) and asks it one request at a time over HTTP, from
upload's key to settled row. Each round asks one prompt and then ten prompts of the same 1280 x 720 JPEG,
so that their ratio comes from one run. Reports medians over all rounds of all runs, the time to ready, the
resident memory of all processes after the load, and the mask IoU with the drawn truth beside the times.

    python -m benchmarks.serve            # table, and one line of JSON last
    python -m benchmarks.serve --record   # also appends to benchmarks/results.csv
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import uuid
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import httpx
import numpy as np
import psutil
from PIL import Image
from tqdm import tqdm

from local_server import LocalServer, local_server
from storage import LocalFolder
from training.scenes import COLOURS, SHAPES, draw_scenes

if TYPE_CHECKING:
    import numpy.typing as npt

WIDTH_PX, HEIGHT_PX = 1280, 720
FIRST_SEED = 9_000_000
USER_ID = "bench"
RESULTS = Path(__file__).parent / "results.csv"
EVERY_PROMPT = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]


class Scene:
    """One drawn picture: `jpeg`, and for each prompt the union of what it means, (H, W) bool."""

    def __init__(self, seed: int) -> None:
        scenes, pictures = draw_scenes(1, seed, width=WIDTH_PX, height=HEIGHT_PX)
        buffer = io.BytesIO()
        pixels = pictures.pixels[0].round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(buffer, format="JPEG", quality=90)
        self.jpeg = buffer.getvalue()
        self.masks: dict[str, npt.NDArray[np.bool_]] = {}
        owner = pictures.owner[0].numpy()
        for index in pictures.counted[0].nonzero().flatten().tolist():
            colour, shape = int(scenes.colour[0, index]), int(scenes.shape[0, index])
            prompt = f"{list(COLOURS)[colour]} {SHAPES[shape]}"
            self.masks[prompt] = self.masks.get(prompt, np.zeros_like(owner, dtype=bool)) | (
                owner == index + 1
            )

    @property
    def ten_prompts(self) -> list[str]:
        """What the scene shows, then things that it does not."""
        absent = [prompt for prompt in EVERY_PROMPT if prompt not in self.masks]
        return [*self.masks, *absent][:10]


def main() -> int:
    """Measure, print, and record if asked."""
    arguments = _parse()
    scenes = [scene for seed in range(FIRST_SEED, FIRST_SEED + 24) if (scene := Scene(seed)).masks]
    runs = [_run(scenes, arguments.rounds) for _ in range(arguments.runs)]
    one_ms = [ms for run in runs for ms in run["one_ms"]]
    ten_ms = [ms for run in runs for ms in run["ten_ms"]]
    report: dict[str, object] = {
        "measured": datetime.now(UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} x {processor()}",
        "python": platform.python_version(),
        "torch": version("torch"),
        "runs": arguments.runs,
        "requests": len(one_ms),
        "one_prompt_p50_ms": round(statistics.median(one_ms), 1),
        "one_prompt_p95_ms": round(float(np.percentile(one_ms, 95)), 1),
        "ten_prompts_p50_ms": round(statistics.median(ten_ms), 1),
        "ten_to_one": round(statistics.median(ten_ms) / statistics.median(one_ms), 2),
        "ready_s": round(statistics.median(run["ready_s"] for run in runs), 1),
        "resident_mb": round(max(run["resident_mb"] for run in runs)),
        "mask_iou": round(statistics.mean(iou for run in runs for iou in run["ious"]), 4),
    }
    for name, value in report.items():
        sys.stdout.write(f"{name:20} {value}\n")
    if arguments.record:
        record(RESULTS, [report])
    sys.stdout.write(json.dumps(report) + "\n")
    return 0


def _run(scenes: list[Scene], rounds: int) -> dict[str, Any]:
    with (
        tempfile.TemporaryDirectory() as folder,
        local_server(Path(folder)) as server,
        httpx.Client(base_url=server.url, headers=server.headers, timeout=60) as client,
    ):
        keys = [_upload(server, scene.jpeg) for scene in scenes]
        one_ms, ten_ms, ious = [], [], []
        for number in tqdm(range(-5, rounds), desc="rounds", disable=None):
            scene, key = scenes[number % len(scenes)], keys[number % len(scenes)]
            prompt = next(iter(scene.masks))
            one, answer = _ask(client, "/api/v1/predict", key, text_prompt=prompt)
            ten, _ = _ask(client, "/api/v1/predict/batch", key, prompts=scene.ten_prompts)
            if number >= 0:  # the rounds before are the warm-up
                one_ms.append(one)
                ten_ms.append(ten)
                ious.append(_iou(answer["mask_url"], scene.masks[prompt]))
        return {
            "one_ms": one_ms,
            "ten_ms": ten_ms,
            "ious": ious,
            "ready_s": server.ready_s,
            "resident_mb": _resident_mb(server.pid),
        }


def _upload(server: LocalServer, jpeg: bytes) -> str:
    key = f"uploads/{USER_ID}/{uuid.uuid4()}"
    LocalFolder(server.data_dir / "storage").put_upload(key, jpeg)
    return key


def _ask(client: httpx.Client, path: str, key: str, **prompts: object) -> tuple[float, dict[str, Any]]:
    body = {"image_url": key, "user_id": USER_ID, "task_id": str(uuid.uuid4()), **prompts}
    started_s = time.perf_counter()
    response = client.post(path, json=body)
    elapsed_ms = (time.perf_counter() - started_s) * 1000
    return elapsed_ms, response.raise_for_status().json()


def _iou(mask_url: str, truth: npt.NDArray[np.bool_]) -> float:
    mask = np.asarray(Image.open(url2pathname(urlparse(mask_url).path))) > 0
    return float((mask & truth).sum() / (mask | truth).sum())


def _resident_mb(pid: int) -> float:
    """Resident memory of the server's processes, added up: pages that they share count each time."""
    parent = psutil.Process(pid)
    return sum(float(each.memory_info().rss) for each in (parent, *parent.children(recursive=True))) / 1e6


def processor() -> str:
    """The name of this machine's processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def record(path: Path, rows: list[dict[str, object]]) -> None:
    """Append `rows`, which have the same names, to the CSV file at `path`."""
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3, help="server starts")
    parser.add_argument("--rounds", type=int, default=40, help="per run")
    parser.add_argument("--record", action="store_true", help=f"append to {RESULTS.name}")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
