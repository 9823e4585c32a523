"""What each form of an answer adds to a whole request, through the real server with the demo checkpoint.

    python -m benchmarks.served_outputs

One caller; the forms take turns. Every request is about another file: the sample picture at 1920 x 1080, with
another comment. The stores are the embedded ones.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

import httpx
from PIL import Image

from benchmarks.pictures import encode_jpeg
from benchmarks.table import machine_name
from commands.local_server import ROOT, LocalServer, local_server
from storage import LocalFolder

if TYPE_CHECKING:
    from collections.abc import Mapping

WIDTH_PX, HEIGHT_PX = 1920, 1080
PROMPT, USER_ID = "triangles", "benchmark"
REPEATS: Final = 10
FORMS: Final[dict[str, dict[str, Any]]] = {
    "nothing new": {},
    "instances": {"outputs": ["instances"]},
    "label_map": {"outputs": ["label_map"]},
    "overlay": {"outputs": ["overlay"]},
    "coco": {"outputs": ["coco"]},
    "coco_rle": {"segmentation": "coco_rle"},
    "polygons": {"segmentation": "polygons"},
    "polygons, 1 px": {"segmentation": "polygons", "polygon_tolerance": 1.0},
    "refinement": {"fill_holes": 50, "remove_islands": 50, "min_area": 100, "nms_iou": 0.7},
    "all of these": {
        "outputs": ["instances", "label_map", "overlay", "coco"],
        "segmentation": "polygons",
        "nms_iou": 0.7,
    },
}


STAGES: Final = ("refine", "preview", "render", "store")
"""Those that the forms add to, by `timings_ms`."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: its time, the time of each of `STAGES`, and what came back."""

    time_ms: float
    stages_ms: list[float]
    instances: int
    file_bytes: int
    answer_bytes: int


def main() -> None:
    """Measure and print a table."""
    with Image.open(ROOT / "examples" / "sample.jpg") as sample:
        picture = sample.resize((WIDTH_PX, HEIGHT_PX))
    samples: dict[str, list[Sample]] = {form: [] for form in FORMS}
    with (
        tempfile.TemporaryDirectory() as folder,
        local_server(Path(folder)) as server,
        httpx.Client(base_url=server.url, headers=server.headers, timeout=60) as client,
    ):
        for repeat in range(REPEATS + 1):
            for form, fields in FORMS.items():
                file = encode_jpeg(picture, 90, f"{form} {repeat}".encode())
                samples[form].append(ask(server, client, file, fields))
    columns = [
        "median_ms",
        "max_ms",
        *(f"{name}_ms" for name in STAGES),
        "instances",
        "bytes",
        "answer_bytes",
    ]
    sys.stdout.write(f"{machine_name()}\n{'':16}{''.join(f'{name:>13}' for name in columns)}\n")
    for form, each in samples.items():
        sys.stdout.write(f"{form:16}{''.join(f'{value:13.5g}' for value in row_of(each[1:]))}\n")


def row_of(samples: list[Sample]) -> list[float]:
    """Values of the columns; the first call is not among the samples, since it loads what others have."""
    times_ms, last = [each.time_ms for each in samples], samples[-1]
    stages_ms = zip(*(each.stages_ms for each in samples), strict=True)
    return [
        *(statistics.median(times_ms), max(times_ms), *map(statistics.median, stages_ms)),
        *(last.instances, last.file_bytes, last.answer_bytes),
    ]


def ask(server: LocalServer, client: httpx.Client, file: bytes, fields: Mapping[str, Any]) -> Sample:
    """One request about a file."""
    key, task_id = f"uploads/{USER_ID}/{uuid4()}", str(uuid4())
    LocalFolder(server.data_dir / "storage").put_upload(key, file)
    body = {"image_url": key, "user_id": USER_ID, "task_id": task_id, "text_prompt": PROMPT}
    start_s = time.perf_counter()
    response = client.post("/api/v1/predict", json=body | dict(fields)).raise_for_status()
    time_ms = (time.perf_counter() - start_s) * 1000
    answer = response.json()
    stored = (server.data_dir / "storage" / "masks" / USER_ID / task_id).iterdir()
    return Sample(
        time_ms,
        [answer["timings_ms"].get(name, 0.0) for name in STAGES],
        len(answer["instances"]),
        sum(path.stat().st_size for path in stored),
        len(response.content),
    )


if __name__ == "__main__":
    main()
