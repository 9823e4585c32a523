"""Windows: the parts of an image that contain the positive px of its masks.

Only windows are upsampled, so time and memory depend on the size of the objects, not on that of the image,
which may have 50 megapixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from sam3_runner.instances import MaskCrop, PackedMask

if TYPE_CHECKING:
    from collections.abc import Iterable

BYTE_PX = 8


class Ranges(NamedTuple):
    """Where the positive logits of K masks lie on the mask grid.

    Attributes:
        first_row, last_row, first_column, last_column: (K,) int64, both included; the last ones are -1 for a
            mask without a positive logit.
        is_finite: (K,) bool, whether all logits of the mask are finite.
    """

    first_row: npt.NDArray[np.int64]
    last_row: npt.NDArray[np.int64]
    first_column: npt.NDArray[np.int64]
    last_column: npt.NDArray[np.int64]
    is_finite: npt.NDArray[np.bool_]


class Axis(NamedTuple):
    """The extent of a window along one axis.

    Attributes:
        start, end: its px. Columns start and end at multiples of 8, the end may lie outside the image.
        size: of the image in px.
        first, last: its cells of the mask grid, both included.
        cells: of the whole grid.
    """

    start: int
    end: int
    size: int
    first: int
    last: int
    cells: int

    @property
    def px(self) -> int:
        """Length of the window."""
        return self.end - self.start


class Window(NamedTuple):
    """The part of the image that contains the positive px of one mask."""

    mask: int
    rows: Axis
    columns: Axis


def windows(ranges: Ranges, grid: tuple[int, int], sizes: npt.NDArray[np.int64]) -> list[Window]:
    """The window of each mask that is not empty.

    Args:
        ranges: of the K masks.
        grid: rows and columns of the mask grid.
        sizes: (K, 2) int64, width and height of each mask's image in px.
    """
    # Rows and columns together: (2, K).
    first = np.stack([ranges.first_row, ranges.first_column])
    last = np.stack([ranges.last_row, ranges.last_column])
    cells, sizes, steps = np.array(grid)[:, None], sizes[:, ::-1].T, np.array([[1], [BYTE_PX]])
    # The px within one cell of the centre of a positive cell.
    px_per_cell = sizes / cells
    starts = np.maximum(((first - 0.5) * px_per_cell).astype(np.int64), 0) // steps * steps
    ends = -(-np.minimum(((last + 1.5) * px_per_cell).astype(np.int64) + 1, sizes) // steps) * steps
    # The cells before `first` and after `last` need not be known. They are not positive, nor are these two
    # unless they are the grid's, so a px that is interpolated from these two instead is not positive either.
    first, last = np.maximum(first - 1, 0), np.minimum(last + 1, cells - 1)
    axes = np.stack([starts, ends, sizes, first, last, np.broadcast_to(cells, first.shape)], axis=2).tolist()
    drawn = np.flatnonzero(ranges.last_row >= 0).tolist()
    return [Window(mask, Axis(*axes[0][mask]), Axis(*axes[1][mask])) for mask in drawn]


class Rectangle(NamedTuple):
    """A part of a window in its px; the ends are not included."""

    top: int
    bottom: int
    left: int
    right: int


class DrawnMask(NamedTuple):
    """A mask at the image's size, and its px."""

    area_px: int
    crop: MaskCrop


class Size(NamedTuple):
    """Of an image in px."""

    width: int
    height: int


class United(NamedTuple):
    """Masks that were united by image.

    Attributes:
        areas_px: positive px of each mask that is not empty.
        masks: of each image, the union of its masks, (height, width / 8 rounded up) bits.
    """

    areas_px: dict[int, int]
    masks: list[PackedMask]


EMPTY = DrawnMask(0, MaskCrop(left=0, top=0, width=0, height=0, bits=b""))


def drawn_mask(window: Window, area_px: int, inside: Rectangle, bands: Iterable[PackedMask]) -> DrawnMask:
    """The mask of a window, cut to the rectangle around its positive px.

    Args:
        window: of the mask.
        area_px: number of the positive px.
        inside: the rectangle; not read if there are none.
        bands: the packed rows of the window, in one or several parts.
    """
    if not area_px:
        return EMPTY
    columns = slice(inside.left // BYTE_PX, -(-inside.right // BYTE_PX))
    bits, first = [], 0
    for band in bands:
        bits.append(band[max(inside.top - first, 0) : max(inside.bottom - first, 0), columns].tobytes())
        first += len(band)
    crop = MaskCrop(
        left=window.columns.start + inside.left,
        top=window.rows.start + inside.top,
        width=inside.right - inside.left,
        height=inside.bottom - inside.top,
        bits=b"".join(bits),
    )
    return DrawnMask(area_px, crop)
