"""Answers of the client as the values that `outputs.converters` take."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sam3_runner.instances import Instance, Mask, MaskCrop, PredictResult

if TYPE_CHECKING:
    from sam3_client import Instance as FoundInstance
    from sam3_client import Result


def predict_result(result: Result, prompt: str, label: str) -> PredictResult:
    """What was found for one prompt of `result`, under the name `label`.

    Args:
        result: of one image.
        prompt: as it was asked for; "visual" for boxes alone.
        label: what the annotation tool calls it.
    """
    found = [each for each in result.instances if each.label == prompt]
    return PredictResult(
        label,
        result.presence.get(prompt, 0.0),
        result.width,
        result.height,
        [instance_of(each, query) for query, each in enumerate(found)],
    )


def instance_of(found: FoundInstance, query: int = 0) -> Instance:
    """One object, with its mask cropped to the px that are set."""
    x0, y0, x1, y1 = (float(side) for side in found.box)
    return Instance(float(found.score), (x0, y0, x1, y1), int(found.area), query, mask_crop(found.mask))


def mask_crop(mask: Mask) -> MaskCrop:
    """The bounding rectangle of the px of an image's mask, (height, width) bool."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return MaskCrop(0, 0, 0, 0, b"")
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    left, right = int(columns[0]), int(columns[-1]) + 1
    # A byte of the crop holds px 8n to 8n + 7 of the image. Columns outside the rectangle are not set.
    bits = np.packbits(mask[top:bottom, left // 8 * 8 : right], axis=1)
    return MaskCrop(left, top, right - left, bottom - top, bits.tobytes())
