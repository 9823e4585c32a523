"""Encodes masks as PNG (W3C PNG, third edition)."""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np
from imagecodecs import zlibng_encode

from sam3_runner.images.png import SIGNATURE

if TYPE_CHECKING:
    import numpy.typing as npt

    from sam3_runner.instances import PackedMask

BIT_DEPTH = 8
GREY = 0
"""Colour type: one grey channel."""
UP = 2
"""Filter type: a row is stored as its difference from the row above. Type 0 stores its px."""

LEVEL = 2
"""Of zlib-ng: level 1 has fixed codes, with files ten times as long; higher levels take longer."""
BAND_PX = 2**18
"""Px that are expanded to bytes at once, so that they stay in the processor's cache."""


def encode_png(mask: PackedMask, width: int) -> bytes:
    """PNG of a mask: one 8-bit grey channel, 0 or 255.

    It needs a byte of memory per px, and a quarter of one for bits and the file. The GIL is free meanwhile.

    Args:
        mask: (height, width / 8 rounded up) uint8; the bits right of the image are ignored.
        width: of the image, in px.
    """
    header = struct.pack(">2I5B", width, len(mask), BIT_DEPTH, GREY, 0, 0, 0)
    rows = _filtered_rows(mask, width)
    pixels = zlibng_encode(rows, level=LEVEL)  # type: ignore[arg-type]  # the stub lacks arrays
    return SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def _filtered_rows(mask: PackedMask, width: int) -> npt.NDArray[np.uint8]:
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


def _chunk(kind: bytes, body: bytes | bytearray) -> bytes:
    checksum = zlib.crc32(body, zlib.crc32(kind))
    return b"".join([struct.pack(">I", len(body)), kind, body, struct.pack(">I", checksum)])
