"""The client's reader of COCO's run lengths, compared with pycocotools."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from pycocotools import mask as coco_mask

from sam3_client import coco_rle
from tests.outputs.masks import drawn_masks

if TYPE_CHECKING:
    from sam3_client.coco_rle import CocoRle, Mask

# pycocotools 2.0.11 converts its arrays in the way of numpy 1.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def encode(mask: Mask) -> CocoRle:
    """The mask by pycocotools."""
    encoded = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode("ascii")}


@given(mask=drawn_masks())
@settings(max_examples=300, deadline=None)
def test_reads_what_pycocotools_writes(mask: Mask) -> None:
    """The mask, its area and its tight rectangle are those of pycocotools, px by px."""
    rle = encode(mask)
    decoded = coco_rle.decode(rle)
    assert decoded.flags.c_contiguous
    assert np.array_equal(decoded, mask)
    assert coco_rle.area_px(rle) == mask.sum()
    assert coco_rle.bounds(rle) == tuple(coco_mask.toBbox(rle))


def test_long_runs() -> None:
    """Run lengths of five groups of bits, and differences that are negative."""
    mask = np.zeros((5000, 7000), np.bool_)
    mask[10:4000, 3000:6990] = True
    mask[4999, 6999] = True
    assert np.array_equal(coco_rle.decode(encode(mask)), mask)


@pytest.mark.parametrize("counts", ["", "4", "5", "P", "0p", "04é", "N8", "~4", "P" * 20 + "0", "1N"])
def test_broken_text_is_refused(counts: str) -> None:
    """A text that is cut, has other characters, or does not fill the image, is a ValueError."""
    if counts == "4":
        assert not coco_rle.decode({"size": [2, 2], "counts": counts}).any()
        return
    with pytest.raises(ValueError, match="run length"):
        coco_rle.decode({"size": [2, 2], "counts": counts})
