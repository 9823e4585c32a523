"""COCO's run lengths, compared with pycocotools' own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from pycocotools import mask as coco_mask

from outputs.coco_rle import coco_rle, mask_crop
from sam3_runner.instances import MaskCrop
from tests.outputs.masks import crop_of, drawn_masks, mask_of

if TYPE_CHECKING:
    from sam3_runner.instances import Mask

# pycocotools 2.0.11 converts its arrays in the way of numpy 1.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def encode(mask: Mask) -> dict[str, object]:
    """The whole mask by pycocotools."""
    encoded = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode("ascii")}


@given(mask=drawn_masks())
@settings(max_examples=500, deadline=None)
def test_equals_pycocotools(mask: Mask) -> None:
    """The text is the one that pycocotools makes of the whole image, wherever the crop lies."""
    height, width = mask.shape
    encoded = coco_rle(crop_of(mask), width, height)
    assert encoded == encode(mask)
    assert np.array_equal(coco_mask.decode(encoded), mask)


@given(mask=drawn_masks())
@settings(max_examples=500, deadline=None)
def test_back_to_a_crop(mask: Mask) -> None:
    """The crop of the run lengths is the tight crop of the mask, bit by bit."""
    height, width = mask.shape
    assert mask_crop(coco_rle(crop_of(mask), width, height)) == crop_of(mask)


@pytest.mark.parametrize(
    "picture", ["###", "##/##", ".##/.##", "##./##.", "#./.#", ".#/#.", ".../...", "..#"]
)
def test_edges_of_the_image(picture: str) -> None:
    """Runs that continue in the next column, and masks that fill the image or reach its last px."""
    mask = mask_of(picture.replace("/", " "))
    assert coco_rle(crop_of(mask), mask.shape[1], mask.shape[0]) == encode(mask)


def test_crop_with_empty_margins() -> None:
    """A crop wider than its px gives the same text as the tight one."""
    mask = np.zeros((9, 20), np.bool_)
    mask[3:5, 6:9] = True
    loose = MaskCrop(2, 1, 16, 8, np.packbits(mask[1:], axis=1).tobytes())
    assert coco_rle(loose, 20, 9) == encode(mask)


def test_image_of_64_megapixels() -> None:
    """The largest image that is accepted has run lengths over 2^25."""
    side = 8192
    mask = MaskCrop(side - 8, side - 1, 8, 1, b"\xff")
    assert coco_mask.area(coco_rle(mask, side, side)) == 8
    assert coco_mask.toBbox(coco_rle(mask, side, side)).tolist() == [side - 8, side - 1, 8, 1]
