"""Measure what each form of an answer costs: time on one thread, and bytes as JSON, by instances.

Scenes at 1920 x 1080: 1, 20 and 200 discs of 100 px at random places, and 1 and 20 full-frame masks (smooth
noise, half of each picture is positive, in many pieces). Every row is the median and the highest time
of several calls after a first one. No weights are needed.

    python -m benchmarks.output_shapes                      # table
    python -m benchmarks.output_shapes --out output_shapes.csv    # also appends to the CSV file
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from benchmarks.table import machine_name, record
from outputs.coco import coco_document
from outputs.coco_rle import coco_rle
from outputs.converters.geojson import geojson
from outputs.converters.yolo_seg import yolo_seg
from outputs.polygons import polygons
from outputs.refinement import Refinement, refine
from sam3_runner.instances import Instance, MaskCrop, PredictResult

if TYPE_CHECKING:
    from collections.abc import Callable

    from sam3_runner.instances import Mask

WIDTH, HEIGHT = 1920, 1080
OBJECT_PX = 100
NOISE_CELLS = 36
"""Cells of the noise along each side, as in benchmarks/masks.py."""

REPEATS = 7
SEED = 0


def discs(count: int) -> list[MaskCrop]:
    """Discs of OBJECT_PX at random places in the picture."""
    from_centre = np.arange(OBJECT_PX) + 0.5 - OBJECT_PX / 2
    disc = np.hypot(from_centre, from_centre[:, None]) < OBJECT_PX / 2
    corners = np.random.default_rng(SEED).integers(0, (WIDTH - OBJECT_PX, HEIGHT - OBJECT_PX), (count, 2))
    return [_crop(disc, left, top) for left, top in corners.tolist()]


def noise(count: int) -> list[MaskCrop]:
    """Full-frame masks of smooth noise."""
    cells = np.random.default_rng(SEED).standard_normal((count, NOISE_CELLS, NOISE_CELLS)).astype(np.float32)
    pictures = (Image.fromarray(each).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC) for each in cells)
    return [_crop(np.asarray(picture) > 0, 0, 0) for picture in pictures]


def _crop(mask: Mask, left: int, top: int) -> MaskCrop:
    height, width = mask.shape
    aligned = np.pad(mask, ((0, 0), (left % 8, 0)))
    return MaskCrop(left, top, width, height, np.packbits(aligned, axis=1).tobytes())


SCENES = [
    *(("discs", discs, count) for count in (1, 20, 200)),
    *(("full-frame", noise, count) for count in (1, 20)),
]


def results_of(crops: list[MaskCrop]) -> list[PredictResult]:
    """The masks as the answer of one prompt, best score first."""
    found = [
        Instance(
            score=1 - number / 1000,
            box=(crop.left, crop.top, crop.left + crop.width, crop.top + crop.height),
            area_px=int(crop.array().sum()),
            query=number,
            mask=crop,
        )
        for number, crop in enumerate(crops)
    ]
    return [PredictResult("disc", 0.9, WIDTH, HEIGHT, found)]


def _masks(results: list[PredictResult]) -> list[MaskCrop]:
    return [instance.mask for result in results for instance in result.instances]


def _refined(refinement: Refinement) -> Callable[[list[PredictResult]], None]:
    def run(results: list[PredictResult]) -> None:
        refine(results, refinement)

    return run


FORMS: dict[str, Callable[[list[PredictResult]], Any]] = {
    "coco_rle": lambda results: [coco_rle(mask, WIDTH, HEIGHT) for mask in _masks(results)],
    "polygons": lambda results: [polygons(mask) for mask in _masks(results)],
    "polygons, 1 px": lambda results: [polygons(mask, 1.0) for mask in _masks(results)],
    "polygons, 2 px": lambda results: [polygons(mask, 2.0) for mask in _masks(results)],
    "COCO document": lambda results: coco_document(results, file_name="picture.jpg"),
    "GeoJSON": geojson,
    "YOLO-seg": yolo_seg,
    "fill_holes, remove_islands": _refined(Refinement(fill_holes_px=100, remove_islands_px=100)),
    "nms 0.5": _refined(Refinement(nms_iou=0.5)),
    "nms 0.9": _refined(Refinement(nms_iou=0.9)),
}


def measure(form: Callable[[list[PredictResult]], Any], results: list[PredictResult]) -> dict[str, object]:
    """Times of a form, and its length as JSON; 0 for what only changes masks."""
    made = form(results)
    text = made if isinstance(made, str) else json.dumps(made, separators=(",", ":"))
    times_ms = []
    for _ in range(REPEATS):
        start_s = time.perf_counter()
        form(results)
        times_ms.append((time.perf_counter() - start_s) * 1000)
    return {
        "median_ms": round(statistics.median(times_ms), 2),
        "max_ms": round(max(times_ms), 2),
        "bytes": 0 if made is None else len(text.encode()),
    }


def main() -> None:
    """Measure, print, and append to the CSV file if --out is given."""
    arguments = _parse()
    machine = machine_name()
    sys.stdout.write(f"{machine}, {WIDTH} x {HEIGHT}\n")
    rows: list[dict[str, object]] = []
    for kind, draw, count in SCENES:
        results = results_of(draw(count))
        for name, form in FORMS.items():
            row: dict[str, object] = {"masks": kind, "instances": count, "form": name}
            row |= measure(form, results)
            sys.stdout.write(" ".join(f"{value!s:<12}" for value in row.values()) + "\n")
            rows.append({"measured": datetime.now(UTC).date(), "machine": machine} | row)
    if arguments.out:
        record(arguments.out, rows)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="append to this CSV file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
