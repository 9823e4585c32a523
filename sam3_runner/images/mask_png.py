"""Encodes masks as PNG."""

from __future__ import annotations

import io
import zlib
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from sam3_runner.instances import PackedMask


def encode_png(mask: PackedMask, width: int) -> bytes:
    """PNG of bits (H, width / 8 rounded up): one 8-bit grey channel, 0 or 255."""
    buffer = io.BytesIO()
    # Masks are long runs of one level: zlib's run-length strategy halves the size in the same time.
    grey = Image.fromarray(np.unpackbits(mask, axis=1, count=width) * np.uint8(255))
    grey.save(buffer, format="PNG", compress_level=1, compress_type=zlib.Z_RLE)
    return buffer.getvalue()
