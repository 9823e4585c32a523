"""Encodes masks as PNG."""

from __future__ import annotations

import io
import zlib
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from sam3_runner.instances import Mask


def encode_png(mask: Mask) -> bytes:
    """PNG of `mask` (H, W) bool: one 8-bit grey channel, 0 or 255."""
    buffer = io.BytesIO()
    # Masks are long runs of one level: zlib's run-length strategy halves the size in the same time.
    grey = Image.fromarray(mask.view(np.uint8) * np.uint8(255))
    grey.save(buffer, format="PNG", compress_level=1, compress_type=zlib.Z_RLE)
    return buffer.getvalue()
