"""COCO's run lengths of a mask: column by column, px that are not set first, as compressed text.

pycocotools' `mask.decode` takes it, and so does every tool that reads COCO's annotations. Run lengths by
other rules are in `outputs.converters`.
"""

from __future__ import annotations

from typing import TypedDict

import numpy as np
from pycocotools import mask as coco_mask

from sam3_runner.instances import MaskCrop


class CocoRle(TypedDict):
    """One mask.

    Attributes:
        size: height and width of the image in px.
        counts: the run lengths as COCO's compressed ASCII text.
    """

    size: list[int]
    counts: str


def coco_rle(mask: MaskCrop, width: int, height: int) -> CocoRle:
    """The mask in an image of `width` x `height` px; equal to pycocotools' `encode` of the whole image.

    Time and memory follow the crop, not the image.
    """
    # Column by column in memory, so that the changes are found in the order of the run lengths.
    columns = np.zeros((mask.width, mask.height + 2), np.bool_)
    columns[:, 1:-1] = mask.array().T
    places = np.flatnonzero(columns[:, 1:] ^ columns[:, :-1])
    column = places // (mask.height + 1)
    row = places - column * (mask.height + 1)
    changes = (mask.left + column) * height + mask.top + row
    # A run that reaches the image's last row may go on in the next column: two changes that are none.
    [pairs] = np.nonzero(changes[1:] == changes[:-1])
    changes = np.delete(changes, np.concatenate([pairs, pairs + 1]))
    counts = np.diff(changes, prepend=0, append=width * height)
    if len(counts) > 1 and counts[-1] == 0:
        counts = counts[:-1]
    compressed = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return CocoRle(size=[height, width], counts=compressed["counts"].decode("ascii"))


def mask_crop(rle: CocoRle) -> MaskCrop:
    """The mask again, within its tight rectangle. It needs a byte of memory for each px of the image."""
    left, top, width, height = (int(side) for side in coco_mask.toBbox(rle))
    if not width:
        return MaskCrop(0, 0, 0, 0, b"")
    rows, columns = slice(top, top + height), slice(left // 8 * 8, left + width)
    bits = np.packbits(coco_mask.decode(rle)[rows, columns], axis=1)
    return MaskCrop(left, top, width, height, bits.tobytes())
