"""Polygons of a mask, with its parts and holes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import shapely

from outputs.rings import Part, Ring, trace

if TYPE_CHECKING:
    from sam3_runner.instances import MaskCrop

Point = tuple[int, int]
"""x, y: a corner of px. Px (0, 0) of the image spans x 0..1 and y 0..1."""

PolygonRing = list[Point]
"""Its first point is not repeated at the end."""


def polygons(mask: MaskCrop, tolerance_px: float = 0.0) -> list[list[PolygonRing]]:
    """The parts of a mask: for each its exterior ring, then one ring for each of its holes.

    A part is a set of px that share edges. In the image (y points down) exteriors run clockwise and holes run
    anticlockwise. Each part is a valid polygon of the OGC's Simple Features; [] is an empty mask.

    Args:
        mask: the mask.
        tolerance_px: 0 follows the edges of the px, so the polygons enclose exactly the mask. More leaves out
            points that are about so far from the line that remains, or nearer (Douglas and Peucker). All
            parts and holes are kept, however small, and the polygons stay valid.

    Returns:
        Points in px of the image; whole numbers also after the simplification, which moves no point.

    Raises:
        ValueError: `tolerance_px` is negative or not a number.
    """
    if not tolerance_px >= 0:
        raise ValueError(f"tolerance_px is {tolerance_px}; give 0 (exact) or a number of px above it")
    parts = trace(mask.array())
    if tolerance_px > 0:
        parts = _simplify(parts, tolerance_px)
    return [[_points(ring, mask) for ring in (part.exterior, *part.holes)] for part in parts]


def _simplify(parts: list[Part], tolerance_px: float) -> list[Part]:
    # All parts at once: that none crosses another one is a property of the whole.
    whole = shapely.MultiPolygon([(part.exterior, part.holes) for part in parts])
    simple = shapely.simplify(whole, tolerance_px, preserve_topology=True)
    return [
        Part(_corners(polygon.exterior), [_corners(hole) for hole in polygon.interiors])
        for polygon in shapely.get_parts(simple)
    ]


def _corners(ring: shapely.LinearRing) -> Ring:
    return np.asarray(shapely.get_coordinates(ring)[:-1], dtype=np.int64)


def _points(ring: Ring, mask: MaskCrop) -> PolygonRing:
    return list(zip((ring[:, 0] + mask.left).tolist(), (ring[:, 1] + mask.top).tolist(), strict=True))
