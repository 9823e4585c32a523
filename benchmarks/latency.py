"""Measure the latency of lone requests on this machine, with the demo checkpoint.

Starts the real server and sends whole requests over HTTP, one at a time. Each
round sends one prompt and then ten prompts for the same 1280 x 720 JPEG, so that their ratio comes from one
run. Reports medians over all rounds of all runs, the time to ready, the resident memory of all processes
after the requests, and the IoU of the masks with the drawn objects.

    python -m benchmarks.latency            # table, and one line of JSON last
    python -m benchmarks.latency --record   # also appends to benchmarks/results.csv
"""

from __future__ import annotations

import argparse
import json
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
from PIL import Image
from tqdm import tqdm

from benchmarks.pictures import FIRST_SEED, Scene
from benchmarks.process_tree import call_each, process_tree
from benchmarks.table import machine_name, record
from commands.local_server import LocalServer, local_server
from storage import LocalFolder

if TYPE_CHECKING:
    import numpy.typing as npt

USER_ID = "bench"
RESULTS = Path(__file__).parent / "results.csv"


def main() -> int:
    """Measure, print, and append to the CSV file if --record is given."""
    arguments = _parse()
    scenes = [scene for seed in range(FIRST_SEED, FIRST_SEED + 24) if (scene := Scene(seed)).masks]
    runs = [_run(scenes, arguments.rounds) for _ in range(arguments.runs)]
    one_ms = [ms for run in runs for ms in run["one_ms"]]
    ten_ms = [ms for run in runs for ms in run["ten_ms"]]
    report: dict[str, object] = {
        "measured": datetime.now(UTC).date().isoformat(),
        "machine": machine_name(),
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
            one, answer = _request(client, "/api/v1/predict", key, text_prompt=prompt)
            ten, _ = _request(client, "/api/v1/predict/batch", key, prompts=scene.ten_prompts)
            if number >= 0:  # negative rounds are the warm-up
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


def _request(client: httpx.Client, path: str, key: str, **prompts: object) -> tuple[float, dict[str, Any]]:
    body = {"image_url": key, "user_id": USER_ID, "task_id": str(uuid.uuid4()), **prompts}
    started_s = time.perf_counter()
    response = client.post(path, json=body)
    elapsed_ms = (time.perf_counter() - started_s) * 1000
    return elapsed_ms, response.raise_for_status().json()


def _iou(mask_url: str, truth: npt.NDArray[np.bool_]) -> float:
    mask = np.asarray(Image.open(url2pathname(urlparse(mask_url).path))) > 0
    return float((mask & truth).sum() / (mask | truth).sum())


def _resident_mb(pid: int) -> float:
    """Sum of the resident memory of the server's processes; shared pages count once for each process."""
    return sum(call_each(process_tree(pid), lambda each: float(each.memory_info().rss))) / 1e6


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
