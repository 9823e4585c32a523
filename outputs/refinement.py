"""Refine what was found: fill holes, remove islands, drop small instances and duplicates, keep the best."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from outputs.overlap import MaskWords, rectangles_of, shared_px, words_of
from outputs.rings import Ring, ring_area, trace
from sam3_runner.instances import MaskCrop

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sam3_runner.instances import Instance, Mask, PredictResult


@dataclass(frozen=True, slots=True)
class Refinement:
    """What to refine; the defaults change nothing.

    Attributes:
        nms_iou: of two instances whose masks have a higher IoU, only that with the higher score is kept,
            across all prompts: one object, one label. 0 keeps none that share a px; None is off.
        max_instances: of each prompt, those with the best scores; None is no limit.
        min_area_px: instances whose mask has fewer px are dropped.
        fill_holes_px: holes that enclose at most so many px are filled, with what is inside them.
        remove_islands_px: parts of at most so many px are removed, but for the largest one.
    """

    nms_iou: float | None = None
    max_instances: int | None = None
    min_area_px: int = 0
    fill_holes_px: int = 0
    remove_islands_px: int = 0


def refine(results: Sequence[PredictResult], refinement: Refinement) -> list[PredictResult]:
    """The results with their instances refined: holes, islands, `min_area_px`, `nms_iou`, `max_instances`.

    Parts are px that share an
    edge; a hole is a region that one part encloses, whose px share edges. `mask` and `area_px` change with
    the px; `box` and `score` remain the decoder's. What does not change is the same object as before.

    Args:
        results: of the prompts of one image.
        refinement: what to do.
    """
    found = [[_refine_mask(instance, refinement) for instance in result.instances] for result in results]
    found = [[each for each in group if each.area_px >= refinement.min_area_px] for group in found]
    if refinement.nms_iou is not None:
        found = _suppress(found, refinement.nms_iou)
    found = [group[: refinement.max_instances] for group in found]
    return [
        result if _are_same(result.instances, group) else replace(result, instances=group)
        for result, group in zip(results, found, strict=True)
    ]


def _are_same(before: Sequence[Instance], after: Sequence[Instance]) -> bool:
    return len(before) == len(after) and all(map(lambda one, other: one is other, before, after))


def _refine_mask(instance: Instance, refinement: Refinement) -> Instance:
    """The instance without its small holes and islands."""
    before = mask = instance.mask.array()
    if refinement.fill_holes_px > 0:
        mask = _fill_holes(mask, refinement.fill_holes_px)
    if refinement.remove_islands_px > 0:
        mask = _remove_islands(mask, refinement.remove_islands_px)
    if mask is before:
        return instance
    crop = _crop(mask, instance.mask.left, instance.mask.top)
    return replace(instance, mask=crop, area_px=int(np.count_nonzero(mask)))


def _fill_holes(mask: Mask, max_px: int) -> Mask:
    """`mask` with its holes of at most `max_px` filled; itself when it has none."""
    holes = [hole for part in trace(mask) for hole in part.holes if ring_area(hole) <= max_px]
    if not holes:
        return mask
    filled = mask.copy()
    for hole in holes:
        window, inside = _inside([hole])
        filled[window] |= inside
    return filled


def _remove_islands(mask: Mask, max_px: int) -> Mask:
    """`mask` without its parts of at most `max_px`; itself when none is removed.

    The largest part is kept (of equal ones the first): an object that is small as a whole is not an island.
    Meta's segment_anything does the same (`remove_small_regions`).
    """
    parts = sorted(trace(mask), key=lambda part: part.area_px, reverse=True)
    islands = [part for part in parts[1:] if part.area_px <= max_px]
    if not islands:
        return mask
    remaining = mask.copy()
    for island in islands:
        window, inside = _inside([island.exterior, *island.holes])
        remaining[window] &= ~inside
    return remaining


def _inside(rings: Sequence[Ring]) -> tuple[tuple[slice, slice], Mask]:
    """The px between the first ring and the others, inside it: their window in the mask, and the px in it.

    A px is inside when an odd number of corners lies above and left of it.
    """
    corners = np.concatenate(rings)
    left, top = rings[0].min(axis=0)
    width, height = rings[0].max(axis=0) - (left, top)
    is_inside = np.zeros((height + 1, width + 1), np.bool_)
    # Where two rings touch, two corners lie on one point.
    np.logical_xor.at(is_inside, (corners[:, 1] - top, corners[:, 0] - left), np.True_)
    np.logical_xor.accumulate(is_inside, axis=0, out=is_inside)
    np.logical_xor.accumulate(is_inside, axis=1, out=is_inside)
    return (slice(top, top + height), slice(left, left + width)), is_inside[:-1, :-1]


def _crop(mask: Mask, left: int, top: int) -> MaskCrop:
    """The tight crop of the set px of `mask`, at least one; its px (0, 0) is at `left`, `top`."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    tight = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = tight.shape
    left, top = left + int(columns[0]), top + int(rows[0])
    # Its bytes are those of the image's rows.
    aligned = np.pad(tight, ((0, 0), (left % 8, 0)))
    return MaskCrop(left, top, width, height, np.packbits(aligned, axis=1).tobytes())


def _suppress(found: Sequence[Sequence[Instance]], nms_iou: float) -> list[list[Instance]]:
    """Greedy non-maximum suppression over all groups; of equal scores the first instance wins."""
    instances = list(chain.from_iterable(found))
    areas = np.array([instance.area_px for instance in instances], dtype=np.int64)
    corners = rectangles_of([instance.mask for instance in instances])
    words = [words_of(instance.mask) for instance in instances]
    is_kept = np.zeros(len(instances), np.bool_)
    for index in sorted(range(len(instances)), key=lambda index: instances[index].score, reverse=True):
        better = np.flatnonzero(is_kept)
        # Two masks share at most their rectangles' intersection and at most the smaller mask.
        sides = np.minimum(corners[better, 1], corners[index, 1]) - np.maximum(
            corners[better, 0], corners[index, 0]
        )
        most_px = np.minimum(sides.clip(min=0).prod(axis=1), np.minimum(areas[better], areas[index]))
        total_px = areas[better] + areas[index]
        near = better[most_px > nms_iou * (total_px - most_px)]
        is_kept[index] = not any(
            _iou(words[index], words[other], int(areas[index] + areas[other])) > nms_iou for other in near
        )
    kept = iter(is_kept.tolist())
    return [[instance for instance in group if next(kept)] for group in found]


def _iou(one: MaskWords, other: MaskWords, total_px: int) -> float:
    """Intersection over union of two masks, of which the areas add up to `total_px` > 0; exact."""
    both_px = shared_px(one, other)
    return both_px / (total_px - both_px)
