"""Masks encoded as PNG."""

from __future__ import annotations

import io
import zlib
from typing import TYPE_CHECKING

import imagecodecs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from outputs.mask_png import encode_png
from outputs.png import BAND_PX

if TYPE_CHECKING:
    from sam3_runner.instances import Mask, PackedMask

ROW_KINDS = ["empty", "full", "like the row above", "random"]


def packed(mask: Mask, padding: int = 0) -> PackedMask:
    """`mask` as bits; `padding`: the bit right of the image, 0 or 1."""
    return np.packbits(np.pad(mask, ((0, 0), (0, -mask.shape[1] % 8)), constant_values=bool(padding)), axis=1)


def check(png: bytes, mask: Mask) -> None:
    """Two decoders read `mask` from `png`: one 8-bit grey channel of 0 and 255."""
    grey = np.where(mask, 255, 0)
    with Image.open(io.BytesIO(png)) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "L", mask.shape[::-1])
        assert np.array_equal(np.asarray(image), grey)
    decoded = imagecodecs.png_decode(png)
    assert decoded.dtype == np.uint8
    assert np.array_equal(decoded, grey)


@given(
    width=st.integers(1, 70),
    rows=st.lists(st.sampled_from(ROW_KINDS), min_size=1, max_size=20),
    padding=st.integers(0, 1),
    seed=st.integers(0, 100),
)
@settings(max_examples=200, deadline=None)
def test_mask_png(width: int, rows: list[str], padding: int, seed: int) -> None:
    """A mask is restored from its PNG without a difference, whatever the bits right of the image."""
    mask = np.random.default_rng(seed).random((len(rows), width)) < 0.5
    for row, kind in enumerate(rows):
        if kind in {"empty", "full"}:
            mask[row] = kind == "full"
        elif kind == "like the row above" and row > 0:
            mask[row] = mask[row - 1]
    check(encode_png(packed(mask, padding), width), mask)


@pytest.mark.parametrize("height", [1, 2, 3 * BAND_PX // 1919])
@pytest.mark.parametrize("width", [1, 7, 8, 9, 1919, BAND_PX + 1])
def test_sizes(width: int, height: int) -> None:
    """Masks of odd sizes, narrow ones, and ones that are encoded in several bands, are restored."""
    height = min(height, 4 * BAND_PX // width)
    mask = np.random.default_rng(0).random((height, width)) < 0.5
    check(encode_png(packed(mask), width), mask)


def test_file_is_short() -> None:
    """The PNG of a few objects is about as long as Pillow's with zlib's run-length strategy."""
    y, x = np.ogrid[:1080, :1920]
    discs = [np.hypot(x - 300 * number, y - 200 * number) < 50 for number in range(1, 6)]
    mask = np.logical_or.reduce(discs)
    reference = io.BytesIO()
    Image.fromarray(np.where(mask, np.uint8(255), np.uint8(0))).save(
        reference, format="PNG", compress_level=1, compress_type=zlib.Z_RLE
    )
    assert len(encode_png(packed(mask), 1920)) < 1.25 * len(reference.getvalue())
