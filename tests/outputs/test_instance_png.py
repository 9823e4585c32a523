"""The PNG of one instance, read back with Pillow."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from hypothesis import given, settings
from PIL import Image

from outputs.instance_png import instance_png
from sam3_runner.instances import MaskCrop
from tests.outputs.masks import crop_of, drawn_masks

if TYPE_CHECKING:
    from sam3_runner.instances import Mask


@given(mask=drawn_masks())
@settings(max_examples=200, deadline=None)
def test_pasted_at_its_offset(mask: Mask) -> None:
    """The PNG has the size of the crop; pasted at its offset into an empty picture it is the mask."""
    crop = crop_of(mask)
    with Image.open(io.BytesIO(instance_png(crop))) as image:
        assert (image.format, image.mode) == ("PNG", "L")
        assert image.size == (max(crop.width, 1), max(crop.height, 1))
        whole = Image.new("L", mask.shape[::-1])
        whole.paste(image, (crop.left, crop.top))
    assert np.array_equal(np.asarray(whole), np.where(mask, 255, 0))


def test_empty_mask() -> None:
    """A mask without px gives one px of 0."""
    with Image.open(io.BytesIO(instance_png(MaskCrop(0, 0, 0, 0, b"")))) as image:
        assert (image.size, image.getextrema()) == ((1, 1), (0, 0))
