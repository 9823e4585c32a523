"""Measure what each form of an answer costs: time on one thread, and bytes as stored or as JSON.

Scenes at 1920 x 1080: 1, 20 and 200 discs of 100 px at random places, and 1 and 20 full-frame masks (smooth
noise, half of each picture is positive, in many pieces). Every row is the median and the highest time of
several calls after a first one. No weights are needed.

    python -m benchmarks.outputs                                 # table
    python -m benchmarks.outputs --out benchmarks/outputs.csv    # also appends to the CSV file
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from benchmarks.table import machine_name, parse_out, record
from outputs.coco import coco_document
from outputs.coco_rle import coco_rle
from outputs.converters.geojson import geojson
from outputs.converters.yolo_seg import yolo_seg
from outputs.instance_png import instance_png
from outputs.label_map import label_map_png
from outputs.overlay import overlay_jpeg
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
GREY, GREY_NOISE = 128, 4.0
"""Of the picture under the objects."""

REPEATS = 7
SEED = 0


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture with objects, and the answer of one prompt that finds them all, best score first."""

    image: Image.Image
    results: list[PredictResult]

    @property
    def masks(self) -> list[MaskCrop]:
        """Of all instances."""
        return [instance.mask for instance in self.results[0].instances]


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


def scene_of(crops: list[MaskCrop]) -> Scene:
    """The masks as objects of a colour each, on grey with noise."""
    random = np.random.default_rng(SEED)
    pixels = GREY + random.normal(0, GREY_NOISE, (HEIGHT, WIDTH, 3))
    found = []
    for number, crop in enumerate(crops):
        pixels[crop.window][crop.array()] = random.integers(20, 236, 3)
        score, area_px = 1 - 0.5 * number / len(crops), int(crop.array().sum())
        box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
        found.append(Instance(score, box, area_px, number, crop))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return Scene(image, [PredictResult("disc", 0.9, WIDTH, HEIGHT, found)])


SCENES = [
    *(("discs", discs, count) for count in (1, 20, 200)),
    *(("full-frame", noise, count) for count in (1, 20)),
]
"""Kind, function and number of masks."""


def _small(image: Image.Image) -> Image.Image:
    return image.resize((WIDTH // 2, HEIGHT // 2))


def _refined(refinement: Refinement) -> Callable[[Scene], None]:
    def run(scene: Scene) -> None:
        refine(scene.results, refinement)

    return run


FORMS: dict[str, Callable[[Scene], Any]] = {
    "label_map": lambda scene: [label_map_png(scene.results)],
    "instances": lambda scene: [instance_png(mask) for mask in scene.masks],
    "overlay": lambda scene: [overlay_jpeg(scene.image, scene.results)],
    "overlay, preview of 960 x 540": lambda scene: [overlay_jpeg(_small(scene.image), scene.results)],
    "coco_rle": lambda scene: [coco_rle(mask, WIDTH, HEIGHT) for mask in scene.masks],
    "polygons": lambda scene: [polygons(mask) for mask in scene.masks],
    "polygons, 1 px": lambda scene: [polygons(mask, 1.0) for mask in scene.masks],
    "polygons, 2 px": lambda scene: [polygons(mask, 2.0) for mask in scene.masks],
    "COCO document": lambda scene: coco_document(scene.results, file_name="picture.jpg"),
    "GeoJSON": lambda scene: geojson(scene.results),
    "YOLO-seg": lambda scene: yolo_seg(scene.results),
    "fill_holes, remove_islands": _refined(Refinement(fill_holes_px=100, remove_islands_px=100)),
    "nms 0.5": _refined(Refinement(nms_iou=0.5)),
    "nms 0.9": _refined(Refinement(nms_iou=0.9)),
}
"""Files, text, or what the answer holds as JSON; None of what only changes masks."""


def measure(form: Callable[[Scene], Any], scene: Scene) -> dict[str, object]:
    """Times of a form, and its length."""
    made = form(scene)  # Not counted: the first call loads what the others have.
    times_ms = []
    for _ in range(REPEATS):
        start_s = time.perf_counter()
        form(scene)
        times_ms.append((time.perf_counter() - start_s) * 1000)
    return {
        "median_ms": round(statistics.median(times_ms), 2),
        "max_ms": round(max(times_ms), 2),
        "bytes": _bytes_of(made),
    }


def _bytes_of(made: Any) -> int:
    """Of all files, of the text, or of the JSON; 0 of nothing."""
    if made is None:
        return 0
    if isinstance(made, str):
        return len(made.encode())
    if isinstance(made, list) and isinstance(made[0], bytes):
        return sum(map(len, made))
    return len(json.dumps(made, separators=(",", ":")).encode())


def main() -> None:
    """Measure, print, and append to the CSV file if --out is given."""
    out, machine = parse_out(__doc__), machine_name()
    sys.stdout.write(f"{machine}, {WIDTH} x {HEIGHT}\n")
    rows: list[dict[str, object]] = []
    for kind, draw, count in SCENES:
        scene = scene_of(draw(count))
        for name, form in FORMS.items():
            row: dict[str, object] = {"masks": kind, "instances": count, "form": name}
            row |= measure(form, scene)
            sys.stdout.write(" ".join(f"{value!s:<12}" for value in row.values()) + "\n")
            rows.append({"measured": datetime.now(UTC).date(), "machine": machine} | row)
    if out:
        record(out, rows)


if __name__ == "__main__":
    main()
