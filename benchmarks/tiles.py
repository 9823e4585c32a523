"""Measure what tiles find: recall, precision and time on drawn scenes of 4000 x 3000 px with small objects.

A scene has red circles of one size to find, beside blue circles and red squares, on a soft background.
An object is found when an instance has an IoU of 0.5 with it; each instance counts once.

    python -m benchmarks.tiles                                         # table
    python -m benchmarks.tiles --out tiles.csv --picture tiles.jpg     # also the CSV file, and a picture
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from benchmarks.table import machine_name, record
from outputs.overlay import overlay_jpeg
from outputs.tile_merge import merge
from sam3_runner import SAM3Predictor
from sam3_runner.images.decode import decode_windows
from sam3_runner.images.read import read_image_file
from sam3_runner.images.tiles import Tiles, tile_windows
from sam3_runner.instances import PredictResult, Window
from sam3_runner.prompts import ConceptPrompt

if TYPE_CHECKING:
    import numpy.typing as npt

    Mask = npt.NDArray[np.bool_]

WIDTH, HEIGHT = 4000, 3000
COLUMNS, ROWS = 6, 4
"""A cell for each object."""
SIZES_PX = (12, 48, 96, 144, 288)
"""Diameters. The demo checkpoint learned 28 to 120 px on its square of 336: 333 px and more of the image."""
GRIDS: tuple[Tiles, ...] = (1, 2, "auto")
PROMPT = "red circle"
RED, BLUE = (220, 40, 40), (50, 80, 220)
HIT_IOU = 0.5
PICTURE_SIZE_PX = 96
SEED = 0


class Scene:
    """One drawn scene.

    Args:
        seed: of the drawing.
        size_px: diameter of its objects.

    Attributes:
        image: the drawing.
        targets: place and mask of each red circle.
    """

    def __init__(self, seed: int, size_px: int) -> None:
        random = np.random.default_rng(seed)
        ends = random.uniform(110, 190, (2, 1, 1, 3))
        across = np.linspace(0, 1, WIDTH)[None, :, None]
        pixels = np.broadcast_to(ends[0] * (1 - across) + ends[1] * across, (HEIGHT, WIDTH, 3)).copy()
        pixels += random.normal(0, 3, (HEIGHT, WIDTH, 1))
        self.targets: list[tuple[tuple[slice, slice], Mask]] = []
        y, x = np.mgrid[:size_px, :size_px] + 0.5 - size_px / 2
        disc, square = np.hypot(x, y) < size_px / 2, np.ones((size_px, size_px), np.bool_)
        cells = [(column, row) for column in range(COLUMNS) for row in range(ROWS)]
        for number, (column, row) in enumerate(cells):
            left = column * WIDTH // COLUMNS + int(random.integers(0, WIDTH // COLUMNS - size_px))
            top = row * HEIGHT // ROWS + int(random.integers(0, HEIGHT // ROWS - size_px))
            place = slice(top, top + size_px), slice(left, left + size_px)
            kind = int(random.integers(0, 4))
            mask, colour = [(disc, RED), (disc, RED), (disc, BLUE), (square, RED)][kind if number else 0]
            pixels[place][mask] = colour
            if mask is disc and colour is RED:
                self.targets.append((place, mask))
        self.image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def find(predictor: SAM3Predictor, image: Image.Image, tiles: Tiles) -> tuple[PredictResult, int, float]:
    """The result, its tiles, and the time in s from the file to it, one window after another."""
    assert predictor.checkpoint is not None
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    side_px = predictor.checkpoint.input_side_px
    begun_s = time.perf_counter()
    file = read_image_file(buffer.getvalue(), max_pixels=WIDTH * HEIGHT)
    windows = [Window(0, 0, WIDTH, HEIGHT), *tile_windows(WIDTH, HEIGHT, tiles, side_px)]
    found = [
        predictor.segment([(square, [ConceptPrompt(PROMPT)])])[0][0]
        for square in decode_windows(file, side_px, windows)
    ]
    merged = merge(found[0], list(zip(windows[1:], found[1:], strict=True)))
    return merged, len(windows) - 1, time.perf_counter() - begun_s


def hits_of(result: PredictResult, scene: Scene) -> int:
    """Targets that are found; each instance counts for one."""
    left_over, hits = list(result.instances), 0
    for place, mask in scene.targets:
        for instance in left_over:
            whole = np.zeros((HEIGHT, WIDTH), np.bool_)
            whole[instance.mask.window] = instance.mask.array()
            shared = int((whole[place] & mask).sum())
            if shared >= HIT_IOU * (instance.area_px + int(mask.sum()) - shared) and shared:
                left_over.remove(instance)
                hits += 1
                break
    return hits


def picture_of(image: Image.Image, results: list[PredictResult]) -> Image.Image:
    """The overlays of results, side by side."""
    preview = image.resize((WIDTH // 5, HEIGHT // 5))
    overlays = [Image.open(io.BytesIO(overlay_jpeg(preview, [result]))) for result in results]
    joined = Image.new("RGB", (len(overlays) * (preview.width + 8) - 8, preview.height), "white")
    for number, overlay in enumerate(overlays):
        joined.paste(overlay, (number * (preview.width + 8), 0))
    return joined


def main() -> None:
    """Draw, find, count."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=int, default=2, help="of each size")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    predictor = SAM3Predictor("demo", "cpu")
    predictor.load()
    find(predictor, Scene(SEED, SIZES_PX[0]).image, 1)  # the first pass is slower
    rows: list[dict[str, object]] = []
    for size_px in SIZES_PX:
        scenes = [Scene(SEED + number, size_px) for number in range(arguments.scenes)]
        of_first: list[PredictResult] = []
        for grid in GRIDS:
            found = [find(predictor, scene.image, grid) for scene in scenes]
            of_first.append(found[0][0])
            hits = sum(hits_of(result, scene) for (result, _, _), scene in zip(found, scenes, strict=True))
            targets = sum(len(scene.targets) for scene in scenes)
            instances = sum(len(result.instances) for result, _, _ in found)
            row: dict[str, object] = {
                "date": datetime.now(UTC).date().isoformat(),
                "machine": machine_name(),
                "size_px": size_px,
                "tiles": grid,
                "tiles_made": found[0][1],
                "scenes": len(scenes),
                "targets": targets,
                "recall": round(hits / targets, 3),
                "precision": round(hits / instances, 3) if instances else "",
                "seconds": round(statistics.median(seconds for _, _, seconds in found), 2),
            }
            rows.append(row)
            sys.stdout.write(" ".join(f"{name}={value}" for name, value in row.items()) + "\n")
            sys.stdout.flush()
        if arguments.picture and size_px == PICTURE_SIZE_PX:
            picture_of(scenes[0].image, [of_first[0], of_first[-1]]).save(arguments.picture, quality=85)
    if arguments.out:
        record(arguments.out, rows)


if __name__ == "__main__":
    main()
