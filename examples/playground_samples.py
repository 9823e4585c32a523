"""Draws the sample pictures of the playground, with what the demo checkpoint was trained on.

python -m examples.playground_samples                 # to data/playground
python -m examples.playground_samples --out playground/static
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import torch
from PIL import Image

from training.scenes import COLOURS, MAX_OBJECTS, SHAPES, SHORT_SIDE_PX, Scenes, render, sample_noise

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parent.parent
WIDTH_PX, HEIGHT_PX = 1280, 720
QUALITY = 85
BLOB_LEVEL: Final = 7.0


class Object(NamedTuple):
    """One shape: lengths in px of the picture, the angle in degrees."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float
    angle: float = 0.0


class Sample(NamedTuple):
    """One picture: the grey-ish colours of its background's two ends, and its objects from back to front."""

    background: tuple[tuple[int, int, int], tuple[int, int, int]]
    objects: Sequence[Object]


SAMPLES: Final = {
    "circles": Sample(
        ((198, 206, 204), (150, 166, 170)),
        (
            Object("red", "circle", 250, 245, 112),
            Object("red", "circle", 590, 500, 84),
            Object("red", "circle", 1130, 190, 62),
            Object("blue", "circle", 860, 300, 118),
            Object("blue", "circle", 300, 560, 70),
            Object("yellow", "star", 1050, 540, 108, 12),
            Object("green", "triangle", 560, 190, 84, 100),
        ),
    ),
    "stars": Sample(
        ((186, 176, 190), (212, 204, 196)),
        (
            Object("purple", "star", 240, 260, 124, 20),
            Object("purple", "star", 940, 470, 112, 50),
            Object("orange", "star", 520, 470, 118, 5),
            Object("orange", "star", 1120, 170, 80, 30),
            Object("white", "ring", 700, 220, 108),
            Object("black", "ring", 250, 560, 84),
            Object("green", "square", 1150, 590, 66, 25),
        ),
    ),
    "mixed": Sample(
        ((172, 184, 172), (206, 206, 190)),
        (
            Object("red", "triangle", 240, 230, 124, 80),
            Object("blue", "triangle", 640, 520, 122, 95),
            Object("yellow", "triangle", 1090, 200, 104, 150),
            Object("red", "cross", 620, 190, 92, 20),
            Object("purple", "cross", 1050, 530, 112, 40),
            Object("red", "square", 300, 560, 92, 10),
            Object("black", "circle", 860, 330, 64),
        ),
    ),
}


def main() -> None:
    """Draw and write the pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "playground", help="the folder")
    folder: Path = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for name, sample in SAMPLES.items():
        path = folder / f"sample-{name}.jpg"
        drawn(sample).save(path, quality=QUALITY, optimize=True)
        sys.stdout.write(f"{path}: {path.stat().st_size} bytes\n")


def drawn(sample: Sample) -> Image.Image:
    """The picture, by the code that draws the training's scenes."""
    generator = torch.Generator().manual_seed(len(sample.objects))
    smooth, noise = sample_noise(1, HEIGHT_PX, WIDTH_PX, generator)
    [pixels] = render(_scene_of(sample), smooth, torch.full_like(noise, 0.5)).pixels
    return Image.fromarray(pixels.permute(1, 2, 0).round().byte().numpy())


def _scene_of(sample: Sample) -> Scenes:
    scale = SHORT_SIDE_PX / HEIGHT_PX
    objects = sample.objects
    missing = MAX_OBJECTS - len(objects)
    padded = [*objects, *[objects[-1]] * missing]
    colours = [list(COLOURS).index(each.colour) for each in padded]
    return Scenes(
        frame=torch.tensor([[WIDTH_PX * scale, HEIGHT_PX * scale]]),
        exists=torch.tensor([[True] * len(objects) + [False] * missing]),
        shape=torch.tensor([[SHAPES.index(each.shape) for each in padded]]),
        colour=torch.tensor([colours]),
        rgb=torch.tensor([[list(COLOURS.values())[colour] for colour in colours]], dtype=torch.float32),
        center=torch.tensor([[(each.x * scale, each.y * scale) for each in padded]]),
        radius=torch.tensor([[each.radius * scale for each in padded]]),
        angle=torch.tensor([[math.radians(each.angle) for each in padded]]),
        background=torch.tensor([sample.background], dtype=torch.float32),
        direction=torch.tensor([math.pi / 3]),
        blob_level=torch.tensor([BLOB_LEVEL]),
        noise_level=torch.tensor([0.0]),
    )


if __name__ == "__main__":
    main()
