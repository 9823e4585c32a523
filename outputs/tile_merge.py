"""One result of an image, from those of the whole image and of its tiles."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from outputs.overlap import MaskWords, rectangles_of, shared_px, words_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from sam3_runner.instances import Instance, PredictResult, Window

MAX_INSTANCES: Final = 200
"""Of one prompt, as without tiles: answers, files and rows are bounded for so many."""
BORDER_SHARE: Final = 1 / 100
"""Of a tile's side: a mask that ends so near to its border is of an object that the border cuts. Masks have
288 cells a side in SAM 3, 96 in the demo checkpoint."""
SAME_IOU: Final = 0.5
CONTAINED_SHARE: Final = 0.8
MIN_AREA_RATIO: Final = 0.25
"""A mask that lies in another is the same object, seen more coarsely, unless it is smaller than this part:
then it is an object of its own, as a window in a house."""

PART_IOU: Final = 0.7
"""A mask of a tile that lies in one of the whole image with a lower IoU and a better score is a part of it:
the model may end the mask of a cut object before the border."""

_WHOLE: Final = -1
"""The whole image, among the numbers of tiles."""


@dataclass(frozen=True, slots=True)
class _Candidate:
    """An instance in px of the image.

    Attributes:
        source: number of the tile; `_WHOLE`.
        is_cut: it is a part of an object: it touches a border of its tile that lies inside the image, or the
            whole image shows more of it.
    """

    instance: Instance
    source: int
    is_cut: bool

    @property
    def order(self) -> tuple[int, float]:
        """Sorts: whole in a tile, where masks are finest; of the whole image; parts, the largest first."""
        if self.is_cut:
            return 2, -self.instance.area_px
        return int(self.source == _WHOLE), -self.instance.score


def merge(whole: PredictResult, tiles: Sequence[tuple[Window, PredictResult]]) -> PredictResult:
    """The instances of one prompt, each object once.

    - Two instances of different sources are the same object when their masks' IoU is `SAME_IOU`, or
      `CONTAINED_SHARE` of the smaller mask lies in the larger one, and it is not much smaller. Of these
      the one of a tile is kept, with the better of both scores.
    - An instance that touches an inner border of its tile is a part of something larger, and so is one that
      lies in an instance of the whole image with a better score and an IoU below `PART_IOU`. It is dropped
      where `CONTAINED_SHARE` of it lies in an instance that is kept; else it is kept.
    - Instances of one source are never merged: the model says that they are two.

    At most `MAX_INSTANCES` remain, best score first; of equal scores those of the whole image first.
    `presence` is the highest one. `query` is that of the source's pass, and so not unique. Instances of tiles
    without px are dropped.

    Args:
        whole: of the whole image.
        tiles: each window and its result, in px of the window.
    """
    candidates = [_Candidate(each, _WHOLE, is_cut=False) for each in whole.instances]
    for number, (window, result) in enumerate(tiles):
        candidates += [
            _Candidate(_moved(each, window), number, _is_cut(each, window, whole))
            for each in result.instances
            if each.area_px
        ]
    if len(candidates) == len(whole.instances):
        kept = list(whole.instances)
    else:
        kept = sorted(_each_once(candidates), key=lambda each: each.score, reverse=True)
    presence = max([whole.presence, *(result.presence for _, result in tiles)])
    return replace(whole, presence=presence, instances=kept[:MAX_INSTANCES])


def _moved(instance: Instance, window: Window) -> Instance:
    """The instance of a window in px of the image. No bit moves: windows begin at multiples of 8 px."""
    x0, y0, x1, y1 = instance.box
    box = x0 + window.left, y0 + window.top, x1 + window.left, y1 + window.top
    mask = instance.mask
    mask = replace(mask, left=mask.left + window.left, top=mask.top + window.top)
    return replace(instance, box=box, mask=mask)


def _is_cut(instance: Instance, window: Window, whole: PredictResult) -> bool:
    mask, across, down = instance.mask, window.width * BORDER_SHARE, window.height * BORDER_SHARE
    return (
        (window.left > 0 and mask.left <= across)
        or (window.top > 0 and mask.top <= down)
        or (window.right < whole.image_width and mask.left + mask.width >= window.width - across)
        or (window.bottom < whole.image_height and mask.top + mask.height >= window.height - down)
    )


def _each_once(candidates: list[_Candidate]) -> list[Instance]:
    """The instances that are kept, in the order of the candidates."""
    corners = rectangles_of([each.instance.mask for each in candidates])
    words = [words_of(each.instance.mask) for each in candidates]
    whole = np.array([index for index, each in enumerate(candidates) if each.source == _WHOLE], np.int64)
    candidates = [
        replace(
            each,
            is_cut=each.is_cut
            or any(_is_part(candidates, words, index, other) for other in _near(corners, index, whole)),
        )
        for index, each in enumerate(candidates)
    ]
    is_kept = np.zeros(len(candidates), np.bool_)
    scores = [each.instance.score for each in candidates]
    for index in sorted(range(len(candidates)), key=lambda index: candidates[index].order):
        near = _near(corners, index, np.flatnonzero(is_kept))
        same = [other for other in near if _is_dropped_for(candidates, words, index, other)]
        is_kept[index] = not same
        if not candidates[index].is_cut:
            for other in same[:1]:
                scores[other] = max(scores[other], scores[index])
    return [
        each.instance if score == each.instance.score else replace(each.instance, score=score)
        for each, score, kept in zip(candidates, scores, is_kept.tolist(), strict=True)
        if kept
    ]


def _near(corners: npt.NDArray[np.int64], index: int, others: npt.NDArray[np.int64]) -> list[int]:
    """Those of the others whose rectangles share a px with that of `index`."""
    found: list[int] = others[
        (corners[others, 0] < corners[index, 1]).all(axis=1)
        & (corners[index, 0] < corners[others, 1]).all(axis=1)
    ].tolist()
    return found


def _is_part(candidates: list[_Candidate], words: list[MaskWords], index: int, other: int) -> bool:
    """Whether a tile shows a part of an object that the whole image shows better."""
    part, whole = candidates[index], candidates[other]
    if part.source == _WHOLE or part.instance.score >= whole.instance.score:
        return False
    part_px, whole_px = part.instance.area_px, whole.instance.area_px
    if not MIN_AREA_RATIO * whole_px <= part_px < whole_px:
        return False
    both_px = shared_px(words[index], words[other])
    return CONTAINED_SHARE * part_px <= both_px < PART_IOU * (part_px + whole_px - both_px)


def _is_dropped_for(candidates: list[_Candidate], words: list[MaskWords], index: int, other: int) -> bool:
    """Whether an instance is a part of one that is kept, or the same object."""
    one, kept = candidates[index], candidates[other]
    if one.source == kept.source:
        return False
    both_px = shared_px(words[index], words[other])
    area_px, kept_px = one.instance.area_px, kept.instance.area_px
    if one.is_cut and both_px >= CONTAINED_SHARE * area_px:
        return True
    small_px, large_px = sorted((area_px, kept_px))
    is_inside = both_px >= CONTAINED_SHARE * small_px and small_px >= MIN_AREA_RATIO * large_px
    return is_inside or both_px >= SAME_IOU * (small_px + large_px - both_px)
