"""Masks encoded as PNG."""

from __future__ import annotations

import io

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sam3_runner.images.mask_png import encode_png


@given(width=st.integers(1, 70), height=st.integers(1, 70), seed=st.integers(0, 100))
@settings(max_examples=50, deadline=None)
def test_mask_png(width: int, height: int, seed: int) -> None:
    """A mask is restored from its PNG without a difference; it has one grey channel of 0 and 255."""
    mask = np.random.default_rng(seed).random((height, width)) < 0.5
    with Image.open(io.BytesIO(encode_png(mask))) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "L", (width, height))
        assert np.array_equal(np.asarray(image), np.where(mask, 255, 0))
