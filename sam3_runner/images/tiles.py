"""Windows of an image that the model sees one by one, beside the whole image: overlapping tiles of a grid."""

from __future__ import annotations

from typing import Final, Literal

from sam3_runner.instances import Window

MAX_TILES_A_SIDE: Final = 4
"""16 tiles: of a picture of 4000 x 3000 px, SAM 3 sees 12 at about their own resolution."""
OVERLAP_SHARE: Final = 1 / 8
"""Of a tile's side: objects up to this size, less 7 px, are whole in one tile at least."""
MIN_TILE_PX: Final = 64
"""Of a side: smaller images get fewer tiles."""
ALIGNMENT_PX: Final = 8
"""Tiles begin at multiples of it, so that the bytes of a tile's masks are bytes of the image's masks."""

Tiles = int | Literal["auto"]
"""Tiles a side of the grid, 1: none; or `auto`, by the sizes of the image and of the model's square."""


def max_tiles(tiles: Tiles) -> int:
    """The most tiles that any image gets."""
    a_side = MAX_TILES_A_SIDE if tiles == "auto" else tiles
    return a_side**2 if a_side > 1 else 0


def tile_windows(width: int, height: int, tiles: Tiles, side_px: int) -> list[Window]:
    """The tiles of an image, row by row; none where one tile would be the whole image.

    They cover the image, and neighbours overlap by `OVERLAP_SHARE` of a side, or up to 7 px less.

    Args:
        width: px of the image as a viewer shows it.
        height: px.
        tiles: as asked for.
        side_px: of the model's square. With `auto` a side has as many tiles as it has such squares, rounded.
    """
    columns, rows = (_spans(length, _count(length, tiles, side_px)) for length in (width, height))
    if len(columns) * len(rows) == 1:
        return []
    return [Window(left, top, right - left, bottom - top) for top, bottom in rows for left, right in columns]


def stored_window(window: Window, size: tuple[int, int], orientation: int) -> Window:
    """The same window in px of the stored image: undoes `square.oriented`.

    Args:
        window: in px as a viewer shows the image.
        size: width and height of the image as a viewer shows it.
        orientation: EXIF's, 1 to 8.
    """
    left, top = window.left, window.top
    if orientation in {2, 3, 6, 7}:
        left = size[0] - window.right
    if orientation in {3, 4, 7, 8}:
        top = size[1] - window.bottom
    if orientation >= 5:
        return Window(top, left, window.height, window.width)
    return Window(left, top, window.width, window.height)


def _count(length: int, tiles: Tiles, side_px: int) -> int:
    wanted = round(length / side_px) if tiles == "auto" else tiles
    return max(1, min(wanted, MAX_TILES_A_SIDE, length // MIN_TILE_PX))


def _spans(length: int, count: int) -> list[tuple[int, int]]:
    """First and last px + 1 of the tiles along one side."""
    if count == 1:
        return [(0, length)]
    span = -int(-length // (count - (count - 1) * OVERLAP_SHARE))
    step = (length - span) / (count - 1)
    firsts = [int(index * step) // ALIGNMENT_PX * ALIGNMENT_PX for index in range(count)]
    return [(first, first + span) for first in firsts[:-1]] + [(firsts[-1], length)]
