"""Writes grey PNGs from filtered rows (W3C PNG, third edition)."""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING

from imagecodecs import zlibng_encode

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Rows = npt.NDArray[np.uint8]

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY = 0
"""Colour type: one grey channel."""
UP = 2
"""Filter type: a row is stored as its difference from the row above. Type 0 stores its px."""

LEVEL = 2
"""Of zlib-ng: level 1 has fixed codes, with files ten times as long; higher levels take longer."""
BAND_PX = 2**18
"""Px that are filtered at once, so that they stay in the processor's cache."""


def grey_png(rows: Rows, width: int, *, bit_depth: int = 8) -> bytes:
    """PNG of one grey channel. The GIL is free while it is compressed.

    Args:
        rows: (height, 1 + bytes of a row) uint8: the filter's type, the filtered px; 16-bit px have the
            high byte first.
        width: in px.
        bit_depth: bits of a px.
    """
    header = struct.pack(">2I5B", width, len(rows), bit_depth, GREY, 0, 0, 0)
    pixels = zlibng_encode(rows, level=LEVEL)  # type: ignore[arg-type]  # the stub lacks arrays
    return SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, body: bytes | bytearray) -> bytes:
    checksum = zlib.crc32(body, zlib.crc32(kind))
    return b"".join([struct.pack(">I", len(body)), kind, body, struct.pack(">I", checksum)])
