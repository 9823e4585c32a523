"""Finds places for labels beside boxes, so that labels hide neither each other nor what they name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from sam3_runner.instances import Mask

    Rectangles = npt.NDArray[np.int64]
    """(n, 4): x0, y0, x1, y1 in px; x1 and y1 are the first px outside."""

GAP_PX = 2
HIDDEN_DIVISOR = 3
"""A label hides at most one px in so many of any box."""
CELL_PX = 4
"""Px of objects are counted in one of so many rows and columns."""
_ORDER = np.array([0, 4, 8, 6, 7, 1, 5, 9, 10, 11, 2, 12, 13, 14, 15, 3, 16, 17, 18, 19, 20, 21, 22, 23, 24])
"""How late each candidate comes. Rows: above, below, inside at the top, inside at the bottom, in the middle.
Columns: at the left end, in the middle, at the right end, beside on the left, beside on the right."""


class LabelPlaces:
    """The places of a picture that are still free.

    Args:
        width, height: of the picture in px.
        boxes: (n, 4), of all instances.
        objects: (height, width), the px of all instances: labels rather stand elsewhere.
    """

    def __init__(
        self, width: int, height: int, boxes: Sequence[tuple[int, int, int, int]], objects: Mask
    ) -> None:
        self._size = np.array([width, height])
        self._boxes = np.array(boxes, np.int64).reshape(-1, 4)
        self._taken = np.empty((0, 4), np.int64)
        counts = objects[::CELL_PX, ::CELL_PX].cumsum(axis=0, dtype=np.int32).cumsum(axis=1, dtype=np.int32)
        self._counts = np.pad(counts, ((1, 0), (1, 0)))

    def place(self, box: tuple[int, int, int, int], width: int, height: int) -> tuple[int, int] | None:
        """Take a place for a label of one box; its left upper corner, or None where there is none."""
        if width > self._size[0] or height > self._size[1]:
            return None
        labels = self._candidates(box, width, height)
        is_free = ~(_intersections(labels, self._taken) > 0).any(axis=1)
        is_free &= (HIDDEN_DIVISOR * _intersections(labels, self._boxes) <= _areas(self._boxes)).all(axis=1)
        if not is_free.any():
            return None
        cost = self._covered_share(labels) + _ORDER / len(_ORDER) / 2
        best = labels[np.where(is_free, cost, np.inf).argmin()]
        self._taken = np.vstack([self._taken, best])
        return int(best[0]), int(best[1])

    def _candidates(self, box: tuple[int, int, int, int], width: int, height: int) -> Rectangles:
        """25 labels beside and in the box, moved into the picture."""
        x0, y0, x1, y1 = box
        lefts = (x0, (x0 + x1 - width) // 2, x1 - width, x0 - width - GAP_PX, x1 + GAP_PX)
        inside = (y0 + GAP_PX, y1 - height - GAP_PX, (y0 + y1 - height) // 2)
        tops = (y0 - height - GAP_PX, y1 + GAP_PX, *inside)
        corners = np.array([(left, top) for top in tops for left in lefts])
        corners = corners.clip(0, self._size - (width, height))
        return np.hstack([corners, corners + np.array([width, height])])

    def _covered_share(self, labels: Rectangles) -> npt.NDArray[np.float64]:
        """The share of each label that lies on objects, by the cells whose px are counted."""
        x0, y0, x1, y1 = -(-labels // CELL_PX).T
        counts = self._counts
        covered = counts[y1, x1] - counts[y0, x1] - counts[y1, x0] + counts[y0, x0]
        share: npt.NDArray[np.float64] = covered / np.maximum(1, (x1 - x0) * (y1 - y0))
        return share


def _areas(rectangles: Rectangles) -> Rectangles:
    return (rectangles[:, 2] - rectangles[:, 0]) * (rectangles[:, 3] - rectangles[:, 1])


def _intersections(ones: Rectangles, others: Rectangles) -> Rectangles:
    """The areas that every two share, (len(ones), len(others))."""
    start = np.maximum(ones[:, None, :2], others[None, :, :2])
    end = np.minimum(ones[:, None, 2:], others[None, :, 2:])
    sides = (end - start).clip(0)
    areas: Rectangles = sides[..., 0] * sides[..., 1]
    return areas
