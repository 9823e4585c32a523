"""Finds objects with the demo checkpoint, in Python, and writes the answer in each form that is a picture,
and a pair of pictures for each control.

It makes the pictures of docs/outputs.md and docs/gallery.md.

    python -m examples.outputs                                   # to data/outputs
    python -m examples.outputs --out docs/outputs                # the pictures of the pages
    python -m examples.outputs --image my.jpg --prompt "stars"   # with another picture
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from examples.control_pictures import PAIRS, TEXT, drawn_scene, pair_picture, pair_results, polygon_pictures
from outputs.instance_png import instance_png
from outputs.label_map import label_map_png
from outputs.mask_png import encode_png
from outputs.overlay import overlay_jpeg
from outputs.palette import PALETTE
from sam3_runner import SAM3Predictor

ROOT = Path(__file__).parent.parent
PROMPTS = ("triangles", "purple circle", "red shape", "blue star")
PREVIEW_SIDE_PX = 1280


def main() -> None:
    """Predict and write the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image", type=Path, default=ROOT / "examples" / "sample.jpg")
    parser.add_argument("--prompt", action="append", help="repeat it for several; the default has four")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "outputs", help="the folder")
    arguments = parser.parse_args()
    folder: Path = arguments.out
    folder.mkdir(parents=True, exist_ok=True)

    predictor = SAM3Predictor("demo")
    predictor.load()
    image = ImageOps.exif_transpose(Image.open(arguments.image)).convert("RGB")
    results = [predictor.predict(image, prompt) for prompt in arguments.prompt or PROMPTS]

    preview = image.copy()
    preview.thumbnail((PREVIEW_SIDE_PX, PREVIEW_SIDE_PX))
    write(folder / "overlay.jpg", overlay_jpeg(preview, results))
    write(folder / "overlay-one-prompt.jpg", overlay_jpeg(preview, results[:1]))
    write(folder / "label-map.png", label_map_png(results))
    coloured_label_map(folder / "label-map.png").save(folder / "label-map-coloured.png")
    write(folder / "mask.png", encode_png(np.packbits(results[0].mask_array(), axis=1), image.width))
    if found := results[0].instances:
        write(folder / "instance.png", instance_png(found[0].mask))
        sys.stdout.write(f"instance.png starts at px {found[0].mask.left}, {found[0].mask.top}\n")

    scene = drawn_scene()
    for name, pair in PAIRS.items():
        both = pair_results(predictor, scene, pair)
        pair_picture(scene, both).save(folder / f"control-{name}.jpg", quality=85)
        counts = [[len(result.instances) for result in results] for results in both]
        areas = [[each.area_px for result in results for each in result.instances] for results in both]
        sys.stdout.write(f"control-{name}.jpg: instances of each prompt {counts}, areas {areas}\n")
    smallest = min(predictor.predict_batch(scene, [TEXT])[0].instances, key=lambda each: each.area_px)
    polygon_pictures(scene, smallest).save(folder / "polygon-tolerance.png", optimize=True)


def coloured_label_map(path: Path) -> Image.Image:
    """The label map in the colours of the overlay of one prompt, for people; 0 is black."""
    numbers = np.asarray(Image.open(path))
    colours = np.array(PALETTE, np.uint8)[(numbers.astype(int) - 1) % len(PALETTE)]
    return Image.fromarray(np.where(numbers[..., None] > 0, colours, np.uint8(0)))


def write(path: Path, content: bytes) -> None:
    """Write a file and report its length."""
    path.write_bytes(content)
    sys.stdout.write(f"{path}: {len(content)} bytes\n")


if __name__ == "__main__":
    main()
