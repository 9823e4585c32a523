"""Draw a COCO-format folder that benchmarks.accuracy can score, if you do not have COCO.

The scenes are like those that the demo checkpoint was trained on, with seeds that its training did not use.

    python -m benchmarks.drawn_coco --out data/drawn --scenes 100
    python -m benchmarks.accuracy --images data/drawn --annotations data/drawn/annotations.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as rle
from tqdm import tqdm

from benchmarks.pictures import EVERY_PROMPT
from training.scenes import COLOURS, SHAPES, draw_scenes

FIRST_SEED = 9_500_000


def draw(folder: Path, *, scenes: int, side_px: int) -> Path:
    """Write `scenes` square PNGs and annotations.json; returns the path of annotations.json.

    An object that is mostly hidden is marked as a crowd: AP ignores it, and cgF1 counts it as absent.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in tqdm(range(1, scenes + 1), desc="drawing", disable=None):
        drawn, pictures = draw_scenes(1, FIRST_SEED + number, width=side_px, height=side_px)
        pixels = pictures.pixels[0].round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        name = f"{number:06}.png"
        Image.fromarray(np.ascontiguousarray(pixels)).save(folder / name)
        images.append({"id": number, "file_name": name, "width": side_px, "height": side_px})
        owner = pictures.owner[0].numpy()
        for index in pictures.visible[0].nonzero().flatten().tolist():
            encoded: Any = rle.encode(np.asfortranarray(owner == index + 1).astype(np.uint8))
            prompt = f"{list(COLOURS)[int(drawn.colour[0, index])]} {SHAPES[int(drawn.shape[0, index])]}"
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": EVERY_PROMPT.index(prompt) + 1,
                    "segmentation": {"size": encoded["size"], "counts": encoded["counts"].decode()},
                    "bbox": rle.toBbox(encoded).tolist(),
                    "area": int(rle.area(encoded)),
                    "iscrowd": int(not pictures.counted[0, index]),
                }
            )
    categories = [{"id": number, "name": name} for number, name in enumerate(EVERY_PROMPT, 1)]
    path = folder / "annotations.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def main() -> None:
    """Draw, and print the path of the annotations."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder; created if it is missing")
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--side", type=int, default=336, help="px")
    arguments = parser.parse_args()
    print(draw(arguments.out, scenes=arguments.scenes, side_px=arguments.side))  # noqa: T201 - a command


if __name__ == "__main__":
    main()
