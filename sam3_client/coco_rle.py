"""Reads COCO's compressed run lengths with numpy alone.

The format is that of `rleToString` in the COCO API's maskApi.c. A mask is read column by column, as runs of
px that are in turn unset and set, unset first. From the fourth run on, the difference from the run two
places earlier is written. Each number is written in groups of 5 bits, lowest first, a character each:
48 + group, + 32 if more groups follow. The highest bit of the last group is the sign.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Mask = npt.NDArray[np.bool_]
    Runs = npt.NDArray[np.int64]

_FIRST_CHARACTER = 48
_GROUP_BITS = 5
_GROUP = 0b011111
_SIGN = 0b010000
_MORE = 0b100000
_MAX_GROUPS = 12
"""Of a number of 64 bits."""


class CocoRle(TypedDict):
    """One mask; pycocotools reads it too.

    Attributes:
        size: height and width of the image in px.
        counts: the run lengths as COCO's compressed ASCII text.
    """

    size: list[int]
    counts: str


def run_lengths(rle: CocoRle) -> Runs:
    """Lengths in px of the runs of unset and set px in turn, unset first.

    Raises:
        ValueError: the text is not of this format, or its runs do not fill the image.
    """
    height, width = rle["size"]
    try:
        characters = np.frombuffer(rle["counts"].encode("ascii"), np.uint8)
    except UnicodeEncodeError:
        raise ValueError("the run lengths are no ASCII text") from None
    groups = characters.astype(np.int64) - _FIRST_CHARACTER
    if ((groups < 0) | (groups > (_MORE | _GROUP))).any() or (len(groups) and groups[-1] & _MORE):
        raise ValueError("the run lengths are not in COCO's compressed format")
    runs = _numbers(groups)
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    if (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(f"the run lengths do not fill an image of {width} x {height} px")
    return runs


def _numbers(groups: Runs) -> Runs:
    """The signed numbers whose groups of bits follow one another."""
    ends = np.flatnonzero(groups & _MORE == 0)
    if not len(ends):
        return np.zeros(0, np.int64)
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if lengths.max() > _MAX_GROUPS:
        raise ValueError("a run length has too many digits")
    shifts = _GROUP_BITS * (np.arange(len(groups)) - np.repeat(starts, lengths))
    numbers: Runs = np.add.reduceat((groups & _GROUP) << shifts, starts)
    is_negative = groups[ends] & _SIGN != 0
    numbers[is_negative] -= np.int64(1) << (_GROUP_BITS * lengths[is_negative])
    return numbers


def decode(rle: CocoRle) -> Mask:
    """The mask, (height, width) bool. Raises ValueError as `run_lengths` does."""
    height, width = rle["size"]
    runs = run_lengths(rle)
    by_column = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return np.ascontiguousarray(by_column.reshape(width, height).T)


def area_px(rle: CocoRle) -> int:
    """How many px are set."""
    return int(run_lengths(rle)[1::2].sum())


def bounds(rle: CocoRle) -> tuple[int, int, int, int]:
    """Left, top, width and height in px of the smallest rectangle round the set px; zeros where none is."""
    height = rle["size"][0]
    ends = run_lengths(rle).cumsum()
    starts, lasts = ends[:-1:2], ends[1::2] - 1
    starts, lasts = starts[lasts >= starts], lasts[lasts >= starts]
    if not len(starts):
        return 0, 0, 0, 0
    left, right = starts[0] // height, lasts[-1] // height
    # A run that goes on in the next column has the last row of the one and the first row of the other.
    is_full = bool((starts // height != lasts // height).any())
    top = 0 if is_full else (starts % height).min()
    bottom = height - 1 if is_full else (lasts % height).max()
    return int(left), int(top), int(right - left + 1), int(bottom - top + 1)
