"""Encodes the mask of one instance as PNG."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from outputs.mask_png import encode_png

if TYPE_CHECKING:
    from sam3_runner.instances import MaskCrop

_NO_PX = np.zeros((1, 1), np.uint8)


def instance_png(mask: MaskCrop) -> bytes:
    """PNG of the bounding rectangle of a mask: one 8-bit grey channel, 0 or 255.

    Its first px is the px (`mask.left`, `mask.top`) of the image. PNG has no picture without px, so that an
    empty mask gives one px of 0.
    """
    if mask.width == 0:
        return encode_png(_NO_PX, 1)
    return encode_png(np.packbits(mask.array(), axis=1), mask.width)
