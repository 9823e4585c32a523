"""Polygons of masks: exact at tolerance 0, valid and complete above it."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from outputs.polygons import polygons
from sam3_runner.instances import Mask, MaskCrop
from tests.outputs.masks import crop_of, drawn_masks, mask_of


def shape_of(crop: MaskCrop, tolerance_px: float = 0.0) -> shapely.MultiPolygon:
    return shapely.MultiPolygon([(part[0], part[1:]) for part in polygons(crop, tolerance_px)])


@given(mask=drawn_masks())
@settings(max_examples=200, deadline=None)
def test_exact_without_tolerance(mask: Mask) -> None:
    """The polygons contain the centres of exactly the mask's px, at their place in the image."""
    shape = shape_of(crop_of(mask))
    assert shape.is_valid
    assert shape.area == mask.sum()
    y, x = np.indices(mask.shape)
    assert np.array_equal(shapely.contains_xy(shape, x + 0.5, y + 0.5), mask)


@given(mask=drawn_masks(max_side=20), tolerance_px=st.sampled_from([0.5, 1, 2.5, 10, 1000]))
@settings(max_examples=200, deadline=None)
def test_tolerance_keeps_parts_and_holes(mask: Mask, tolerance_px: float) -> None:
    """Simplified polygons are valid, have every part and hole, and only points of the exact ones."""
    exact, simple = polygons(crop_of(mask)), polygons(crop_of(mask), tolerance_px)
    assert shape_of(crop_of(mask), tolerance_px).is_valid
    assert [len(part) for part in simple] == [len(part) for part in exact]
    for exact_part, simple_part in zip(exact, simple, strict=True):
        for exact_ring, simple_ring in zip(exact_part, simple_part, strict=True):
            assert set(simple_ring) <= set(exact_ring)
            assert len(set(simple_ring)) == len(simple_ring)  # none repeats its first point
            assert shapely.is_ccw(shapely.LinearRing(simple_ring)) == (exact_ring is exact_part[0])


def test_parts_that_interlock_do_not_cross() -> None:
    """Two combs whose teeth lie between each other's: neither is simplified over the other."""
    mask = np.zeros((20, 41), np.bool_)
    mask[:2] = mask[-2:] = True
    mask[:-4, ::4] = mask[4:, 2::4] = True
    shape = shape_of(crop_of(mask), 3.0)
    assert len(shape.geoms) == 2
    assert shape.is_valid, shapely.is_valid_reason(shape)


def test_tolerance_leaves_points_out() -> None:
    """A disc needs few points at 2 px, and stays near: its IoU with the exact one is over 0.95."""
    y, x = np.ogrid[:200, :300]
    crop = crop_of(np.hypot(x - 150, y - 100) < 50)
    exact, simple = shape_of(crop), shape_of(crop, 2.0)
    assert shapely.get_num_coordinates(simple) < shapely.get_num_coordinates(exact) / 5
    assert exact.intersection(simple).area / exact.union(simple).area > 0.95


def test_form_for_json() -> None:
    """Points are whole numbers; no ring repeats its first point."""
    crop = crop_of(np.pad(mask_of("### #.# ###"), ((4, 0), (7, 0))))
    assert polygons(crop) == [
        [[(7, 4), (10, 4), (10, 7), (7, 7)], [(9, 5), (8, 5), (8, 6), (9, 6)]],
    ]
    assert type(polygons(crop, 0.5)[0][0][0][0]) is int
    assert polygons(MaskCrop(0, 0, 0, 0, b"")) == polygons(MaskCrop(0, 0, 0, 0, b""), 1.0) == []


@pytest.mark.parametrize("tolerance_px", [-1.0, float("nan")])
def test_wrong_tolerance(tolerance_px: float) -> None:
    """A tolerance below 0 is an error that names it."""
    with pytest.raises(ValueError, match="tolerance_px"):
        polygons(crop_of(mask_of("#")), tolerance_px)
