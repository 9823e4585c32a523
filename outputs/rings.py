"""Boundary rings of a binary mask, along the edges of its px.

A corner is a lattice point where the boundary turns. Around it an odd number of the four px is set, or two px
that touch only there: then two corners lie on the point. On each row of the lattice, the first corner and the
second bound one edge, the third and the fourth the next one, and so on; the same on each column. Every corner
ends one edge of its row and one of its column, so edges and corners form rings.

Px belong together when they share an edge (4-connected). No ring visits a point twice, although two rings may
touch in a point. This makes every part with its holes a valid polygon of the OGC's Simple Features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from sam3_runner.instances import Mask

Indices = npt.NDArray[np.int64]

Ring = Indices
"""Corners x, y, (corners, 2), in px from the mask's top left corner; the first is not repeated at the end."""


class Part(NamedTuple):
    """A 4-connected set of px: the ring around it, and one around each of its holes.

    As seen in the image, the exterior runs clockwise and the holes run anticlockwise.
    """

    exterior: Ring
    holes: list[Ring]

    @property
    def area_px(self) -> int:
        """Px of the part, without its holes."""
        return ring_area(self.exterior) - sum(map(ring_area, self.holes))


class _Corners(NamedTuple):
    """The corners of a mask, row by row; two on one point follow each other.

    Attributes:
        x, y: of each corner. Corners 2k and 2k + 1 are the ends of horizontal edge k.
        below_is_set: whether the px below horizontal edge k is set; otherwise the one above is.
        pinches: index of the first of two corners on one point. It ends the edge on the left.
        is_crossed: for each of them, whether it ends the edge below, not the one above.
    """

    x: Indices
    y: Indices
    below_is_set: Mask
    pinches: Indices
    is_crossed: Mask


class _Cycles(NamedTuple):
    """The corners joined to rings.

    Attributes:
        rings: indices of the corners of each ring, by their topmost, then leftmost edge.
        ring_of: number of the ring of each corner.
        by_column: all corners, column by column; 2k and 2k + 1 are the ends of a vertical edge.
    """

    rings: list[Indices]
    ring_of: Indices
    by_column: Indices


def ring_area(ring: Ring) -> int:
    """Px that the ring encloses, exact (the shoelace formula)."""
    x, y = ring[:, 0], ring[:, 1]
    return abs(int(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) // 2


def trace(mask: Mask) -> list[Part]:
    """The parts of `mask`, (height, width) bool, by their topmost, then leftmost edge.

    Their areas add up to the number of px that are set.
    """
    padded = np.pad(mask, 1)
    corners = _find_corners(padded)
    cycles = _join(corners, corners.is_crossed)
    # A ring that visits a point twice is divided there, by joining the point's edges the other way.
    # The set px are apart at all such points, so the cuts are independent.
    is_twice = cycles.ring_of[corners.pinches] == cycles.ring_of[corners.pinches + 1]
    if is_twice.any():
        cycles = _join(corners, corners.is_crossed ^ is_twice)
    return _nest(padded, corners, cycles)


def _find_corners(padded: Mask) -> _Corners:
    """The corners of a mask that has a margin of 1 px, which is not set."""
    edges = padded[1:] ^ padded[:-1]  # (lattice rows, columns of padded px): horizontal edges
    left, right = edges[:, :-1], edges[:, 1:]
    is_pinch = left & right & (padded[1:, :-1] ^ padded[1:, 1:])
    points = np.flatnonzero((left ^ right) | is_pinch)
    counts = 1 + is_pinch.reshape(-1)[points].astype(np.int64)
    y, x = np.divmod(np.repeat(points, counts), is_pinch.shape[1])
    pinches = (np.cumsum(counts) - counts)[counts == 2]
    return _Corners(
        x=x,
        y=y,
        below_is_set=padded[y[::2] + 1, x[::2] + 1],
        pinches=pinches,
        is_crossed=padded[y[pinches] + 1, x[pinches]],
    )


def _join(corners: _Corners, is_crossed: Mask) -> _Cycles:
    """Follow the edges from corner to corner, with the set px on the right-hand side."""
    # Of two corners on a point, the one that ends the edge above is first in its column.
    rank = np.zeros(len(corners.x), dtype=np.int64)
    rank[corners.pinches] = is_crossed
    rank[corners.pinches + 1] = ~is_crossed
    by_column = np.lexsort((rank, corners.y, corners.x))
    across = np.empty_like(by_column)
    across[by_column[::2]], across[by_column[1::2]] = by_column[1::2], by_column[::2]

    tails = 2 * np.arange(len(corners.below_is_set)) + ~corners.below_is_set
    heads = tails ^ 1
    following = (across[heads] // 2).tolist()
    rings: list[Indices] = []
    ring_of_edge = [-1] * len(following)
    for first in range(len(following)):
        if ring_of_edge[first] >= 0:
            continue
        ring, edge = [], first
        while ring_of_edge[edge] < 0:
            ring_of_edge[edge] = len(rings)
            ring.append(edge)
            edge = following[edge]
        rings.append(np.stack((tails[ring], heads[ring]), axis=1).reshape(-1))
    return _Cycles(rings, np.repeat(np.array(ring_of_edge, dtype=np.int64), 2), by_column)


def _nest(padded: Mask, corners: _Corners, cycles: _Cycles) -> list[Part]:
    """Give each hole to the part that it is in."""
    lattice_rows = len(padded) - 1
    tops = cycles.by_column[::2]  # the upper ends of all vertical edges
    top_keys = corners.x[tops] * lattice_rows + corners.y[tops]
    parts: list[Part] = []
    part_of_ring: list[Part] = []
    for ring in cycles.rings:
        corner_points = np.stack((corners.x[ring], corners.y[ring]), axis=1)
        if corners.below_is_set[ring[0] // 2]:
            part = Part(corner_points, [])
            parts.append(part)
        else:
            # The run of set px on the left of the hole's first px begins at an edge of the same part. That
            # edge's ring has an earlier first edge than this one.
            x, y = corner_points[1]
            start = x - padded[y + 1, x::-1].argmin()
            edge = np.searchsorted(top_keys, start * lattice_rows + y, side="right") - 1
            part = part_of_ring[cycles.ring_of[tops[edge]]]
            part.holes.append(corner_points)
        part_of_ring.append(part)
    return parts
