"""Draws what the command of docs/adapters/cvat.md uploads: the picture of that page.

.venv/bin/python -m tests.adapters.with_server .venv/annotation/bin/python -m tests.adapters.cvat_picture
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
from cvat_cli.__main__ import main as cvat_cli
from cvat_sdk.masks import decode_mask
from PIL import Image
from pycocotools import mask as coco_mask

from sam3_client import Instance
from sam3_client.overlay import draw_overlay
from tests.adapters.cvat_stand_in import LABELS, cvat_stand_in
from tests.adapters.label_studio_files import SAMPLE

ROOT = Path(__file__).parents[2]


def main() -> None:
    """Write docs/adapters/cvat.jpg."""
    with cvat_stand_in(SAMPLE.read_bytes(), LABELS) as cvat, tempfile.TemporaryDirectory() as cache:
        os.environ |= {"CVAT_ACCESS_TOKEN": "token", "XDG_CACHE_HOME": cache}
        cvat_cli(cvat.arguments())
        [uploaded] = cvat.uploaded
    names = {number: name for name, number in LABELS.items()}
    found = [
        _instance(names[shape["label_id"]], shape["points"], shape["score"]) for shape in uploaded["shapes"]
    ]
    with Image.open(SAMPLE) as image:
        drawn = draw_overlay(image.convert("RGB"), list(enumerate(found)), list(LABELS), 1024)
    drawn.save(ROOT / "docs" / "adapters" / "cvat.jpg", quality=88)


def _instance(label: str, points: list[float], score: float) -> Instance:
    mask = decode_mask(points, image_width=1280, image_height=720)
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    rows, columns = np.nonzero(mask)
    box = (float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1))
    return Instance(label, score, box, {"size": rle["size"], "counts": rle["counts"].decode()})


if __name__ == "__main__":
    main()
