"""Masks as the bits of their bounding rectangle."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's usual alias
from hypothesis import given, settings
from hypothesis import strategies as st

from sam3_runner import Instance, MaskCrop, PredictResult
from sam3_runner.inference.masks import _crop, to_instances
from sam3_runner.instances import union_mask

EMPTY = MaskCrop(left=0, top=0, width=0, height=0, bits=b"")


def result(*crops: MaskCrop, width: int = 20, height: int = 10) -> PredictResult:
    instances = [
        Instance(score=0.9, box=(0.0, 0.0, 1.0, 1.0), area_px=int(crop.array().sum()), mask=crop, query=0)
        for crop in crops
    ]
    return PredictResult("cat", 0.9, width, height, instances)


@given(
    width=st.integers(1, 40),
    height=st.integers(1, 40),
    density=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_round_trip(width: int, height: int, density: float, seed: int) -> None:
    """A mask is restored from its crop without a difference; the crop is the bounding rectangle."""
    mask = np.random.default_rng(seed).random((height, width)) < density
    crop, area_px = _crop(mask, top=0, left=0)
    assert area_px == mask.sum()
    assert np.array_equal(result(crop, width=width, height=height).mask_array(), mask)
    assert len(crop.bits) == (crop.width * crop.height + 7) // 8
    if mask.any():
        inside = crop.array()
        assert inside[0].any()
        assert inside[-1].any()
        assert inside[:, 0].any()
        assert inside[:, -1].any()
    else:
        assert crop == EMPTY


def test_union() -> None:
    """Overlapping instances count once in the union, also across prompts; no instances give all zeros."""
    left = MaskCrop(left=2, top=1, width=8, height=4, bits=b"\xff" * 4)
    right = MaskCrop(left=6, top=3, width=8, height=4, bits=b"\xff" * 4)
    both = result(left, right).mask_array()
    assert both.sum() == 32 + 32 - 2 * 4
    assert np.array_equal(union_mask([result(left), result(right), result()]), both)
    assert result().mask_array().shape == (10, 20)
    assert not result(EMPTY).mask_array().any()


def test_confidence() -> None:
    """The confidence is the highest score, and 0.0 when nothing was found."""
    assert result().confidence == 0.0
    assert result(EMPTY, EMPTY).confidence == 0.9


def test_values_cross_processes() -> None:
    """Results are equal after pickling, and a pickled mask has the size of its bits."""
    mask = np.ones((300, 400), dtype=np.bool_)
    found = result(_crop(mask, top=0, left=0)[0], width=400, height=300)
    pickled = pickle.dumps(found)
    assert pickle.loads(pickled) == found  # noqa: S301 - our own pickle
    assert len(pickled) < 300 * 400 / 8 + 1000


def test_best_score_is_first() -> None:
    """Instances are ordered by score, with boxes in pixels and the areas of their masks."""
    logits = torch.full((2, 4, 4), -1.0)
    logits[0, :2] = 1.0
    boxes = torch.tensor([[0.0, 0.0, 1.0, 0.5], [0.1, 0.2, 0.3, 0.4]])
    first, second = to_instances(
        torch.tensor([3, 7]), torch.tensor([0.6, 0.8]), boxes, logits, width=100, height=40
    )
    assert (first.query, second.query) == (7, 3)
    assert [first.score, second.score] == pytest.approx([0.8, 0.6])
    assert first.box == pytest.approx((10, 8, 30, 16))
    assert (first.area_px, first.mask) == (0, EMPTY)
    assert second.area_px == 100 * 20
    assert (second.mask.left, second.mask.top, second.mask.width, second.mask.height) == (0, 0, 100, 20)


@given(
    width=st.integers(1, 700),
    height=st.integers(1, 700),
    cells=st.integers(2, 80),
    seed=st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_only_the_positive_part_is_upsampled(width: int, height: int, cells: int, seed: int) -> None:
    """Masks equal those of upsampling the whole grid, for any size and position of the object."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(3, 1, max(2, cells // 6), max(2, cells // 6), generator=generator) - 0.5
    logits = F.interpolate(coarse, (cells, cells), mode="bicubic")[:, 0]
    whole = F.interpolate(logits[:, None], (height, width), mode="bilinear")[:, 0] > 0
    scores = torch.tensor([0.9, 0.8, 0.7])
    found = to_instances(torch.arange(3), scores, torch.rand(3, 4), logits, width=width, height=height)
    for instance, truth in zip(found, whole.numpy(), strict=True):
        mask = result(instance.mask, width=width, height=height).mask_array()
        # Rounding may change a pixel whose logit is zero.
        assert (mask != truth).sum() <= 1
        assert instance.area_px == mask.sum()
