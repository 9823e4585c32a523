"""How many px two masks share, exactly and fast."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from sam3_runner.instances import MaskCrop


class MaskWords(NamedTuple):
    """A mask in words of 64 px of the image's rows, so that two masks are compared word by word.

    Attributes:
        top, left: row and word of the image where it begins.
        words: (rows, words) uint64.
    """

    top: int
    left: int
    words: npt.NDArray[np.uint64]


def words_of(mask: MaskCrop) -> MaskWords:
    """The mask in words."""
    packed, first_byte = mask.packed(), mask.packed_window[1].start
    before = first_byte % 8
    aligned = np.pad(packed, ((0, 0), (before, -(before + packed.shape[1]) % 8)))
    return MaskWords(mask.top, first_byte // 8, aligned.view(np.uint64))


def shared_px(one: MaskWords, other: MaskWords) -> int:
    """The px that are in both masks. The rectangles of the masks must share a px."""
    top, left = max(one.top, other.top), max(one.left, other.left)
    bottom = min(one.top + one.words.shape[0], other.top + other.words.shape[0])
    right = min(one.left + one.words.shape[1], other.left + other.words.shape[1])
    shared = (
        one.words[top - one.top : bottom - one.top, left - one.left : right - one.left]
        & other.words[top - other.top : bottom - other.top, left - other.left : right - other.left]
    )
    return int(np.bitwise_count(shared).sum())


def rectangles_of(masks: list[MaskCrop]) -> npt.NDArray[np.int64]:
    """First and last px + 1 of each mask's rectangle, (N, 2, 2): corner, then x and y."""
    corners = [((mask.left, mask.top), (mask.left + mask.width, mask.top + mask.height)) for mask in masks]
    return np.array(corners, dtype=np.int64).reshape(-1, 2, 2)
