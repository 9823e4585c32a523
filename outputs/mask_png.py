"""Encodes masks as PNG."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from outputs.png import BAND_PX, UP, grey_png

if TYPE_CHECKING:
    from outputs.png import Rows
    from sam3_runner.instances import PackedMask


def encode_png(mask: PackedMask, width: int) -> bytes:
    """PNG of a mask: one 8-bit grey channel, 0 or 255.

    It needs a byte of memory per px, and a quarter of one for bits and the file. The GIL is free meanwhile.

    Args:
        mask: (height, width / 8 rounded up) uint8; the bits right of the image are ignored.
        width: of the image, in px.
    """
    return grey_png(_filtered_rows(mask, width), width)


def _filtered_rows(mask: PackedMask, width: int) -> Rows:
    """The rows as PNG compresses them, (height, 1 + width) uint8: the filter's type, the filtered px."""
    # The row above the first one counts as 0.
    padded = np.pad(mask, ((1, 0), (0, 0)))
    rows = np.empty((len(mask), 1 + width), np.uint8)
    # The zeros of empty rows make one run with the zeros of type 0, which would end at every other type.
    is_set = padded.max(axis=1) > 0
    rows[:, 0] = np.where(is_set[1:] | is_set[:-1], UP, 0)
    band_rows = -(-BAND_PX // width)
    for top in range(0, len(mask), band_rows):
        bits = np.unpackbits(padded[top : top + band_rows + 1], axis=1, count=width)
        # Px are 255 x bit, and 255 = -1 mod 256: their difference from the row above is that of the bits,
        # negated.
        np.subtract(bits[:-1], bits[1:], out=rows[top : top + band_rows, 1:])
    return rows
