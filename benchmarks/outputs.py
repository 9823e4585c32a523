"""Measure the forms of an answer: time on one thread, and length.

The instances are discs and squares of about 90 px at random places of a 1920 x 1080 picture. Every row is the
median and the highest time of several calls, after one that is not counted.

    python -m benchmarks.outputs                      # table
    python -m benchmarks.outputs --out outputs.csv    # also appends to the CSV file
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from benchmarks.table import machine_name, record
from outputs.instance_png import instance_png
from outputs.label_map import label_map_png
from outputs.overlay import overlay_jpeg
from sam3_runner.instances import Instance, MaskCrop, PredictResult

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    Pixels = npt.NDArray[np.uint8]
    Results = Sequence[PredictResult]

WIDTH, HEIGHT = 1920, 1080
COUNTS = (1, 20, 200)
RADIUS_PX = 45.0
NOISE_LEVELS = 4.0
REPEATS = 9
SEED = 0

OUTPUTS: dict[str, Callable[[Image.Image, Results], Sequence[bytes]]] = {
    "label_map": lambda _, results: [label_map_png(results)],
    "instances": lambda _, results: [instance_png(each.mask) for each in results[0].instances],
    "overlay": lambda image, results: [overlay_jpeg(image, results)],
    "overlay, preview of 960 x 540": lambda image, results: [
        overlay_jpeg(image.resize((WIDTH // 2, HEIGHT // 2)), results)
    ],
}
"""Each form of an answer: its files, from the picture and the results."""


def scene(count: int) -> tuple[Image.Image, Results]:
    """A picture with `count` objects, and the answer that finds them all."""
    random = np.random.default_rng(SEED)
    y, x = np.ogrid[:HEIGHT, :WIDTH]
    pixels = np.full((HEIGHT, WIDTH, 3), 128) + random.normal(0, NOISE_LEVELS, (HEIGHT, WIDTH, 3))
    found = []
    for number in range(count):
        radius = RADIUS_PX * random.uniform(0.6, 1.4)
        left, top = random.uniform(radius, WIDTH - radius), random.uniform(radius, HEIGHT - radius)
        inside = np.maximum(abs(x - left), abs(y - top)) if number % 2 else np.hypot(x - left, y - top)
        pixels[inside < radius] = random.integers(20, 236, 3)
        score = 1 - 0.5 * number / count
        found.append(_instance(inside < radius, score, number))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return image, [PredictResult("red circle", 0.9, WIDTH, HEIGHT, found)]


def _instance(mask: npt.NDArray[np.bool_], score: float, query: int) -> Instance:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    left, top, right, bottom = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    bits = np.packbits(mask[top:bottom, left // 8 * 8 : right], axis=1).tobytes()
    crop = MaskCrop(left, top, right - left, bottom - top, bits)
    box = float(left), float(top), float(right), float(bottom)
    return Instance(score, box, int(mask.sum()), query, crop)


def measure(name: str, image: Image.Image, results: Results) -> dict[str, object]:
    """A row of the table."""
    make, times_ms = OUTPUTS[name], []
    files = make(image, results)  # Not counted: the first call loads what the others have.
    for _ in range(REPEATS):
        start_s = time.perf_counter()
        make(image, results)
        times_ms.append((time.perf_counter() - start_s) * 1000)
    return {
        "output": name,
        "instances": len(results[0].instances),
        "median_ms": round(statistics.median(times_ms), 2),
        "max_ms": round(max(times_ms), 2),
        "files": len(files),
        "bytes": sum(map(len, files)),
    }


def main() -> None:
    """Measure, print, and append to the CSV file if --out is given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="append to this CSV file")
    out: Path | None = parser.parse_args().out
    rows = []
    for count in COUNTS:
        image, results = scene(count)
        rows += [measure(name, image, results) for name in OUTPUTS]
    for row in rows:
        sys.stdout.write("  ".join(f"{key} {value}" for key, value in row.items()) + "\n")
    if out:
        about = {"measured": datetime.now(UTC).date(), "machine": machine_name()}
        record(out, [about | row for row in rows])


if __name__ == "__main__":
    main()
