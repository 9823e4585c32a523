"""Refinement, compared with slow definitions by scipy's labels and plain counting."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from outputs.refinement import Refinement, refine
from sam3_runner.instances import Mask, PredictResult
from tests.outputs.masks import crop_of, drawn_masks, mask_of, result_of, whole

LIMITS = st.sampled_from([0, 1, 2, 3, 5, 9, 30, 10_000])


def refined(mask: Mask, refinement: Refinement) -> Mask:
    """The mask of the only instance after the refinement; its fields agree."""
    (result,) = refine([result_of(mask)], refinement)
    (instance,) = result.instances
    after = whole(instance.mask, mask.shape)
    assert instance.mask == crop_of(after)
    assert instance.area_px == after.sum()
    return after


def with_holes_filled(mask: Mask, max_px: int) -> Mask:
    """For each part: regions that it separates from the border are its holes."""
    filled = mask.copy()
    parts, count = ndimage.label(np.pad(mask, 1))
    for part in range(1, count + 1):
        regions, _ = ndimage.label(parts != part)
        for region in range(1, regions.max() + 1):
            hole = (regions == region)[1:-1, 1:-1]
            if region != regions[0, 0] and hole.sum() <= max_px:
                filled |= hole
    return filled


def without_islands(mask: Mask, max_px: int) -> Mask:
    parts, count = ndimage.label(mask)
    areas = np.bincount(parts.reshape(-1), minlength=count + 1)
    areas[0] = 0
    largest = areas.argmax()
    kept: Mask = mask & ((areas[parts] > max_px) | (parts == largest))
    return kept


@given(mask=drawn_masks(), max_px=LIMITS)
@settings(max_examples=300, deadline=None)
def test_fill_holes(mask: Mask, max_px: int) -> None:
    """Holes up to the limit are filled, with the islands in them; the others stay."""
    after = refined(mask, Refinement(fill_holes_px=max_px))
    assert np.array_equal(after, with_holes_filled(mask, max_px))


@given(mask=drawn_masks(), max_px=LIMITS)
@settings(max_examples=300, deadline=None)
def test_remove_islands(mask: Mask, max_px: int) -> None:
    """Parts up to the limit are removed, except the largest one."""
    after = refined(mask, Refinement(remove_islands_px=max_px))
    assert np.array_equal(after, without_islands(mask, max_px))


def test_holes_before_islands() -> None:
    """A part whose hole is filled counts as a whole among the islands."""
    before, filled = (
        mask_of("##### ##### ..... ###.. #.#.. ###.."),
        mask_of("##### ##### ..... ###.. ###.. ###.."),
    )
    after = refined(before, Refinement(fill_holes_px=1, remove_islands_px=8))
    assert np.array_equal(after, filled)


def test_holes_of_every_part() -> None:
    """A hole is filled in whichever part it is."""
    after = refined(mask_of("###.### #.#.#.# ###.###"), Refinement(fill_holes_px=1))
    assert np.array_equal(after, mask_of("###.### ###.### ###.###"))


@pytest.mark.parametrize(
    "island",
    [
        "##. #.# ###",  # its hole touches the outside in a point
        "####. #.##. ##.#. #####",  # two holes touch
    ],
)
def test_islands_with_holes(island: str) -> None:
    """An island goes as a whole, whatever its form, and nothing else does."""
    shape = mask_of(island)
    mask = np.zeros((12, 20), np.bool_)
    mask[1 : 1 + shape.shape[0], 1 : 1 + shape.shape[1]] = shape
    rest = np.zeros_like(mask)
    rest[6:11, 8:18] = True
    assert np.array_equal(refined(mask | rest, Refinement(remove_islands_px=20)), rest)


def test_object_inside_an_island_stays() -> None:
    """Of a ring that is an island, the larger object inside is not a part."""
    ring, inner = np.ones((11, 11), np.bool_), np.zeros((11, 11), np.bool_)
    ring[1:10, 1:10] = False
    inner[2:9, 2:9] = True
    assert np.array_equal(refined(ring | inner, Refinement(remove_islands_px=40)), inner)


def test_box_and_score_stay_the_decoders() -> None:
    """A refined mask changes neither the box nor the score nor the query."""
    before = result_of(mask_of("###.. #.#.. ###.. ....#"))
    (after,) = refine([before], Refinement(fill_holes_px=1, remove_islands_px=1))
    one, other = before.instances[0], after.instances[0]
    assert (one.box, one.score, one.query) == (other.box, other.score, other.query)
    assert (one.area_px, other.area_px) == (9, 9)
    assert (after.prompt, after.presence, after.image_width) == (before.prompt, before.presence, 5)


@given(masks=st.lists(drawn_masks(), min_size=1, max_size=3))
@settings(max_examples=50, deadline=None)
def test_nothing_asked_nothing_changed(masks: list[Mask]) -> None:
    """The same objects come back where there is nothing to do."""
    results = [result_of(mask) for mask in masks]
    for refinement in (Refinement(), Refinement(nms_iou=1.0, max_instances=200)):
        assert all(
            before is after for before, after in zip(results, refine(results, refinement), strict=True)
        )


def test_nothing_found_nothing_changed() -> None:
    """A mask without a hole or an island is the same object."""
    result = result_of(mask_of("##.. .##."))
    (same,) = refine([result], Refinement(fill_holes_px=9, remove_islands_px=9))
    assert same is result


@st.composite
def crowds(draw: st.DrawFn) -> list[PredictResult]:
    """Up to three prompts with masks of one image; scores are often equal."""
    width = draw(st.sampled_from([3, 8, 70, 150]))
    left = draw(st.integers(0, width - 3))
    results = []
    for prompt in "abc"[: draw(st.integers(1, 3))]:
        count = draw(st.integers(0, 4))
        masks = np.zeros((max(count, 1), 3, width), np.bool_)
        masks[:, :, left : left + 3] = draw(arrays(np.bool_, (max(count, 1), 3, 3)))
        scores = sorted(draw(st.lists(st.sampled_from([0.2, 0.5, 0.7]), min_size=count, max_size=count)))
        found = result_of(*masks, prompt=prompt, scores=scores[::-1] if count else [0.5])
        results.append(found if count else PredictResult(prompt, 0.1, width, 3, []))
    return results


def kept_by_definition(results: list[PredictResult], limit: float) -> set[tuple[str, int]]:
    """Greedy suppression by whole masks: prompt and query of those kept."""
    shape = results[0].image_height, results[0].image_width
    entries = [
        (result.prompt, each.query, each.score, whole(each.mask, shape))
        for result in results
        for each in result.instances
    ]
    kept: list[tuple[str, int, float, Mask]] = []
    for entry in sorted(entries, key=lambda entry: -entry[2]):
        ious = [(entry[3] & other[3]).sum() / max((entry[3] | other[3]).sum(), 1) for other in kept]
        if all(iou <= limit for iou in ious):
            kept.append(entry)
    return {(prompt, query) for prompt, query, _, _ in kept}


@given(results=crowds(), limit=st.sampled_from([0.0, 0.2, 1 / 3, 0.5, 0.9, 1.0]))
@settings(max_examples=400, deadline=None)
def test_nms(results: list[PredictResult], limit: float) -> None:
    """Of two masks with a higher IoU than the limit the better one stays, also across prompts."""
    after = refine(results, Refinement(nms_iou=limit))
    kept = {(result.prompt, each.query) for result in after for each in result.instances}
    assert kept == kept_by_definition(results, limit)
    assert [result.prompt for result in after] == [result.prompt for result in results]
    for one, other in zip(results, after, strict=True):
        assert [each for each in one.instances if each in other.instances] == list(other.instances)


HALVES = [mask_of("####...."), mask_of("..####.."), mask_of("....####")]


@pytest.mark.parametrize(("nms_iou", "kept"), [(None, 3), (1.0, 3), (1 / 3, 3), (0.33, 2), (0.0, 2)])
def test_limits_of_nms(nms_iou: float | None, kept: int) -> None:
    """An IoU equal to the limit is kept (the neighbours here have 1/3), 0 is a limit, None is none."""
    (after,) = refine([result_of(*HALVES)], Refinement(nms_iou=nms_iou))
    assert len(after.instances) == kept


def test_limit_of_nms_between_masks() -> None:
    """So it is where the rectangles share more px than the masks: 1 of 5."""
    masks = mask_of("##. #.. ..."), mask_of(".## ..# ...")
    for nms_iou, kept in ((0.2, 2), (0.19, 1)):
        (after,) = refine([result_of(*masks)], Refinement(nms_iou=nms_iou))
        assert len(after.instances) == kept


@pytest.mark.parametrize(("max_instances", "kept"), [(None, [0, 1, 2]), (0, []), (1, [0]), (9, [0, 1, 2])])
def test_max_instances(max_instances: int | None, kept: list[int]) -> None:
    """Each prompt keeps its best; 0 keeps none."""
    for after in refine([result_of(*HALVES), result_of(*HALVES)], Refinement(max_instances=max_instances)):
        assert [each.query for each in after.instances] == kept


def test_min_area_counts_the_refined_mask() -> None:
    """An instance that is large enough only after its hole is filled stays, an empty mask does not."""
    ring = mask_of("### #.# ###")
    (after,) = refine([result_of(ring, ~ring)], Refinement(min_area_px=9, fill_holes_px=1))
    assert [each.area_px for each in after.instances] == [9]
    (after,) = refine([result_of(ring, ring & ~ring)], Refinement(min_area_px=1))
    assert len(after.instances) == 1


def test_duplicates_do_not_count_as_the_best() -> None:
    """Duplicates are left out before the best are counted."""
    one, other = HALVES[0], HALVES[2]
    (after,) = refine([result_of(one, one, other)], Refinement(nms_iou=0.5, max_instances=2))
    assert [each.query for each in after.instances] == [0, 2]


def test_small_instances_suppress_nothing() -> None:
    """What is too small is left out before duplicates are."""
    part = HALVES[0] & HALVES[1]
    (after,) = refine([result_of(part, HALVES[0])], Refinement(nms_iou=0.0, min_area_px=3))
    assert [each.query for each in after.instances] == [1]
