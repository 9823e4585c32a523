"""Boundary rings: exact areas, valid polygons, holes and parts kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from scipy import ndimage

from outputs.rings import Part, ring_area, trace
from tests.outputs.masks import drawn_masks, mask_of

if TYPE_CHECKING:
    from sam3_runner.instances import Mask


def polygon_of(part: Part) -> shapely.Polygon:
    return shapely.Polygon(part.exterior, part.holes)


def centres_inside(polygon: shapely.Geometry, shape: tuple[int, int]) -> Mask:
    """The px of which the centre is inside a polygon."""
    y, x = np.indices(shape)
    inside: Mask = shapely.contains_xy(polygon, x + 0.5, y + 0.5)
    return inside


@given(mask=drawn_masks())
@settings(max_examples=400, deadline=None)
def test_parts_are_the_connected_px(mask: Mask) -> None:
    """Each part is a valid polygon of exactly the px of one 4-connected component, wherever px touch."""
    labels, count = ndimage.label(mask)
    parts = trace(mask)
    assert len(parts) == count
    for part in parts:
        polygon = polygon_of(part)
        assert polygon.is_valid, shapely.is_valid_reason(polygon)
        inside = centres_inside(polygon, mask.shape)
        (label,) = set(labels[inside])
        assert np.array_equal(inside, labels == label)
        assert part.area_px == polygon.area == inside.sum()


@given(mask=drawn_masks())
@settings(max_examples=100, deadline=None)
def test_rings_hold_only_corners_and_turn_one_way(mask: Mask) -> None:
    """Every point of a ring is a turn; exteriors run clockwise in the image, holes anticlockwise."""
    for part in trace(mask):
        for ring, clockwise in [(part.exterior, True), *((hole, False) for hole in part.holes)]:
            steps = np.roll(ring, -1, axis=0) - ring
            assert ((steps != 0).sum(axis=1) == 1).all()
            assert ((steps != 0) != (np.roll(steps, -1, axis=0) != 0)).all()
            # Shapely's axes point up, so what is clockwise in the image is anticlockwise to it.
            assert shapely.is_ccw(shapely.LinearRing(ring)) == clockwise
            assert ring_area(ring) > 0


@pytest.mark.parametrize(
    ("picture", "holes"),
    [
        ("###/#.#/###", [1]),
        ("##./#.#/###", [1]),  # the hole touches the outside in a point
        ("#./.#", [0, 0]),  # two parts touch in a point
        (".#./#.#/.#.", [0, 0, 0, 0]),
        ("####/#.##/##.#/####", [2]),  # two holes touch in a point
        ("#####/#...#/#.#.#/#...#/#####", [1, 0]),  # an island in the hole
        ("#######/#.....#/#.###.#/#.#.#.#/#.###.#/#.....#/#######", [1, 1]),
        ("##..#./#.#..#/###...", [1, 0, 0]),  # a hole touches the outside, and two parts each other
        ("###.#/#.#.#/###..", [1, 0]),
        ("###......../#.#.###.###/###.#.#.#.#/....###.###", [1, 1, 1]),
        ("#.#/#.#/###", [0]),
        ("...", []),
    ],
)
def test_holes_by_part(picture: str, holes: list[int]) -> None:
    """Each hole belongs to the part that encloses it."""
    assert [len(part.holes) for part in trace(mask_of(picture.replace("/", " ")))] == holes


def test_corners_of_a_px() -> None:
    """The corners lie at px edges: px (1, 2) spans 1..2 and 2..3."""
    mask = np.zeros((4, 3), np.bool_)
    mask[2, 1] = True
    ((exterior, holes),) = trace(mask)
    assert exterior.tolist() == [[1, 2], [2, 2], [2, 3], [1, 3]]
    assert holes == []
