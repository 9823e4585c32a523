"""The files that are written for a picture, and the one for all pictures."""

from __future__ import annotations

import io
import json
import re
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from PIL import Image

from sam3_client.command_line.out_folder import write_whole

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from sam3_client.result import Result

FORMATS: Final = {
    "json": "NAME.result.json: every instance with score, box, area and mask (COCO's run lengths)",
    "mask": "NAME.mask.png: 255 where any instance is",
    "label_map": "NAME.label_map.png: of each px the number of its instance, 0 for none; 16 bits beyond 255",
    "instances": "NAME.instances/001.png and so on: one mask of the picture's size an instance",
    "overlay": "NAME.overlay.jpg: the picture with outlines, boxes and scores, at most 1600 px a side",
    "coco": "coco.json: one COCO document of all pictures",
}
COCO_FILE: Final = "coco.json"
OVERLAY_SIDE_PX: Final = 1600
MAX_OF_8_BITS: Final = 255
_NUMBERED = re.compile(r"\d{3,}\.png")


def write_formats(result: Result, name: str, formats: Sequence[str], folder: Path) -> list[str]:
    """Write a picture's own files; returns their names in the folder.

    Args:
        result: of the picture.
        name: of the picture, with its ending, so that a.jpg and a.png have files of their own.
        formats: of `FORMATS`.
        folder: of all outputs.

    Raises:
        OSError: a file cannot be written.
        BadImage: an overlay needs the picture, which Pillow cannot decode.
    """
    if "instances" in formats:
        # Of an earlier state of the picture there may be more.
        for old in (folder / f"{name}.instances").glob("*.png"):
            if _NUMBERED.fullmatch(old.name):
                old.unlink()
    written = []
    for output, data in _files(result, name, formats):
        write_whole(folder / output, data)
        written.append(output)
    return written


def _files(result: Result, name: str, formats: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    if "mask" in formats:
        yield f"{name}.mask.png", _png(_as_grey(result.union()))
    if "label_map" in formats:
        numbers = result.label_map()
        is_small = len(result.instances) <= MAX_OF_8_BITS
        yield f"{name}.label_map.png", _png(numbers.astype(np.uint8) if is_small else numbers)
    if "instances" in formats:
        for number, instance in enumerate(result.instances, 1):
            yield f"{name}.instances/{number:03}.png", _png(_as_grey(instance.mask))
    if "overlay" in formats:
        file = io.BytesIO()
        result.overlay(OVERLAY_SIDE_PX).save(file, "JPEG", quality=90)
        yield f"{name}.overlay.jpg", file.getvalue()
    if "json" in formats:
        yield f"{name}.result.json", json.dumps(_document(result, name)).encode()


def _document(result: Result, name: str) -> dict[str, Any]:
    return {
        "file": name,
        "width": result.width,
        "height": result.height,
        "prompts": result.prompts,
        "presence": result.presence,
        "model": result.model,
        "timings_ms": result.timings_ms,
        "instances": [
            {
                "number": number,
                "label": each.label,
                "score": each.score,
                "box": each.box,
                "area": each.area,
                "coco_rle": each.coco_rle,
            }
            for number, each in enumerate(result.instances, 1)
        ],
    }


def _as_grey(mask: np.ndarray[Any, np.dtype[np.bool_]]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return mask.astype(np.uint8) * 255


def _png(pixels: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_coco(documents: Iterable[dict[str, Any]], folder: Path) -> None:
    """Write one COCO document of all pictures' own: their ids are numbered anew, in this order."""
    merged: dict[str, Any] = {}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, document in enumerate(documents, 1):
        merged = merged or document
        images += ({**image, "id": image_id} for image in document["images"])
        for annotation in document["annotations"]:
            annotations.append({**annotation, "id": len(annotations) + 1, "image_id": image_id})
    merged = {**merged, "images": images, "annotations": annotations}
    write_whole(folder / COCO_FILE, json.dumps(merged).encode())
