"""Masks as the bits of their bounding rectangle."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sam3_runner import Instance, MaskCrop, PredictResult
from sam3_runner.instances import packed_union, union_mask

if TYPE_CHECKING:
    from sam3_runner.instances import Mask

EMPTY = MaskCrop(left=0, top=0, width=0, height=0, bits=b"")


def result(*crops: MaskCrop, width: int = 20, height: int = 10) -> PredictResult:
    instances = [
        Instance(score=0.9, box=(0.0, 0.0, 1.0, 1.0), area_px=int(crop.array().sum()), mask=crop, query=0)
        for crop in crops
    ]
    return PredictResult("cat", 0.9, width, height, instances)


def crop_of(mask: Mask) -> MaskCrop:
    """The crop of the whole of `mask`, whose outer rows and columns are not empty."""
    height, width = mask.shape
    return MaskCrop(0, 0, width, height, np.packbits(mask, axis=1).tobytes())


def test_union() -> None:
    """Overlapping instances count once in the union, also across prompts; no instances give all zeros."""
    left = MaskCrop(left=2, top=1, width=8, height=4, bits=b"\x3f\xc0" * 4)
    right = MaskCrop(left=6, top=3, width=8, height=4, bits=b"\x03\xfc" * 4)
    both = result(left, right).mask_array()
    assert both.sum() == 32 + 32 - 2 * 4
    assert np.array_equal(union_mask([result(left), result(right), result()]), both)
    assert result().mask_array().shape == (10, 20)
    assert not result(EMPTY).mask_array().any()


@given(
    left=st.integers(0, 20), width=st.integers(1, 20), beyond=st.integers(0, 20), seed=st.integers(0, 1000)
)
@settings(max_examples=100, deadline=None)
def test_crops_at_any_column(left: int, width: int, beyond: int, seed: int) -> None:
    """A crop is at its place in the image's mask and packed mask, whichever column it begins at."""
    mask = np.zeros((6, left + width + beyond), dtype=np.bool_)
    mask[2:5, left : left + width] = np.random.default_rng(seed).random((3, width)) < 0.5
    bits = np.packbits(mask[2:5], axis=1)[:, left // 8 : -(-(left + width) // 8)].tobytes()
    crop = MaskCrop(left, 2, width, 3, bits)
    assert np.array_equal(crop.array(), mask[crop.window])
    found = result(crop, EMPTY, width=mask.shape[1], height=6)
    assert np.array_equal(found.mask_array(), mask)
    assert np.array_equal(packed_union([found]), np.packbits(mask, axis=1))


def test_confidence() -> None:
    """The confidence is the highest score, and 0.0 when nothing was found."""
    assert result().confidence == 0.0
    assert result(EMPTY, EMPTY).confidence == 0.9


def test_values_cross_processes() -> None:
    """Results are equal after pickling, and a pickled mask has the size of its bits."""
    mask = np.ones((300, 400), dtype=np.bool_)
    found = result(crop_of(mask), width=400, height=300)
    pickled = pickle.dumps(found)
    assert pickle.loads(pickled) == found  # noqa: S301 - our own pickle
    assert len(pickled) < 300 * 400 / 8 + 1000
