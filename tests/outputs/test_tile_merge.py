"""Merging the instances of tiles, compared with what was drawn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outputs.tile_merge import MAX_INSTANCES, merge
from sam3_runner.images.tiles import tile_windows
from sam3_runner.instances import Instance, Mask, PredictResult, Window
from tests.outputs.masks import crop_of, whole

WIDTH, HEIGHT = 330, 250
GRID_PX = 40
"""Objects are drawn in cells of this size, so that they do not touch."""


def result(*found: tuple[Mask, float], width: int = WIDTH, height: int = HEIGHT) -> PredictResult:
    instances = []
    for query, (mask, score) in enumerate(found):
        crop = crop_of(mask)
        box = crop.left, crop.top, crop.left + crop.width, crop.top + crop.height
        instances.append(Instance(score, tuple(map(float, box)), int(mask.sum()), query, crop))  # type: ignore[arg-type]
    return PredictResult("cat", 0.5, width, height, instances)


def seen_in(window: Window, *found: tuple[Mask, float]) -> tuple[Window, PredictResult]:
    """What a perfect model finds in a window: of each object the part inside."""
    parts = [(mask[window.top : window.bottom, window.left : window.right], score) for mask, score in found]
    parts = [(mask, score) for mask, score in parts if mask.any()]
    return window, result(*parts, width=window.width, height=window.height)


def rectangle(left: int, top: int, width: int, height: int) -> Mask:
    mask = np.zeros((HEIGHT, WIDTH), np.bool_)
    mask[top : top + height, left : left + width] = True
    return mask


def masks_of(merged: PredictResult) -> list[Mask]:
    return [whole(each.mask, (HEIGHT, WIDTH)) for each in merged.instances]


@st.composite
def objects(draw: st.DrawFn) -> list[tuple[Mask, float]]:
    """Rectangles with scores, small enough to be whole in a tile."""
    cells = [(x, y) for x in range(WIDTH // GRID_PX) for y in range(HEIGHT // GRID_PX)]
    chosen = draw(st.lists(st.sampled_from(cells), unique=True, max_size=9))
    found = []
    for x, y in chosen:
        width, height = draw(st.integers(2, 7)), draw(st.integers(2, 7))
        left = x * GRID_PX + draw(st.integers(0, GRID_PX - width - 1))
        top = y * GRID_PX + draw(st.integers(0, GRID_PX - height - 1))
        found.append((rectangle(left, top, width, height), draw(st.floats(0.5, 1, width=32))))
    return found


@given(drawn=objects(), tiles=st.integers(2, 3), seen=st.data())
@settings(max_examples=150, deadline=None)
def test_each_object_once(drawn: list[tuple[Mask, float]], tiles: int, seen: st.DataObject) -> None:
    """A perfect model in every tile, some of the objects in the whole image too: each is found once."""
    in_whole = [each for each in drawn if seen.draw(st.booleans())]
    windows = tile_windows(WIDTH, HEIGHT, tiles, 100)
    merged = merge(result(*in_whole), [seen_in(window, *drawn) for window in windows])
    assert sorted(mask.tobytes() for mask in masks_of(merged)) == sorted(mask.tobytes() for mask, _ in drawn)
    scores = [each.score for each in merged.instances]
    assert scores == sorted((score for _, score in drawn), reverse=True)
    for instance in merged.instances:
        mask = instance.mask
        assert instance.area_px == whole(mask, (HEIGHT, WIDTH)).sum()
        assert instance.box == (mask.left, mask.top, mask.left + mask.width, mask.top + mask.height)


@given(drawn=objects())
@settings(max_examples=50, deadline=None)
def test_empty_tiles_change_nothing(drawn: list[tuple[Mask, float]]) -> None:
    """Tiles in which nothing is found leave the whole image's instances as they are."""
    before = result(*drawn)
    windows = tile_windows(WIDTH, HEIGHT, 2, 100)
    assert merge(before, [seen_in(window) for window in windows]) == before


LARGE = rectangle(60, 50, 220, 150)
"""In all four tiles, and whole in none."""


def test_parts_are_dropped_for_their_whole() -> None:
    """An object larger than a tile, found in the whole image, remains alone."""
    windows = tile_windows(WIDTH, HEIGHT, 2, 100)
    merged = merge(result((LARGE, 0.6)), [seen_in(window, (LARGE, 0.9)) for window in windows])
    (instance,) = merged.instances
    assert np.array_equal(masks_of(merged)[0], LARGE)
    assert instance.score == 0.6


def test_parts_are_kept_without_a_whole() -> None:
    """The same object, missed in the whole image: its parts cover it."""
    windows = tile_windows(WIDTH, HEIGHT, 2, 100)
    merged = merge(result(), [seen_in(window, (LARGE, 0.9)) for window in windows])
    assert np.array_equal(np.any(masks_of(merged), axis=0), LARGE)


@pytest.mark.parametrize(
    ("found", "score", "kept"),
    [
        (rectangle(101, 101, 18, 18), 0.6, "found"),  # IoU 0.81
        (rectangle(102, 102, 16, 16), 0.95, "found"),  # IoU 0.64, the better score
        (rectangle(102, 102, 16, 16), 0.6, "coarse"),  # the worse score: a part
        (rectangle(101, 101, 12, 12), 0.95, "found"),  # inside, 0.36 of its area
        (rectangle(101, 101, 12, 12), 0.6, "coarse"),
        (rectangle(101, 101, 9, 9), 0.6, "both"),  # inside, 0.2 of its area
        (rectangle(112, 100, 20, 20), 0.6, "both"),  # IoU 0.25, beside
    ],
)
def test_what_is_the_same_object(found: Mask, score: float, kept: str) -> None:
    """A finer mask of a tile replaces the whole image's; a part or another object does not."""
    (window,) = [each for each in tile_windows(WIDTH, HEIGHT, 2, 100) if each.left == 0 == each.top]
    coarse = rectangle(100, 100, 20, 20)
    merged = merge(result((coarse, 0.9)), [seen_in(window, (found, score))])
    assert len(merged.instances) == (2 if kept == "both" else 1)
    if kept != "both":
        assert merged.instances[0].score == max(score, 0.9)
        assert np.array_equal(masks_of(merged)[0], {"found": found, "coarse": coarse}[kept])


def test_two_of_one_source_stay_two() -> None:
    """The model says that they are two, in the whole image or in a tile."""
    pair = (rectangle(20, 20, 20, 20), 0.9), (rectangle(22, 20, 20, 20), 0.8)
    window = tile_windows(WIDTH, HEIGHT, 2, 100)[0]
    assert len(merge(result(*pair), [seen_in(window)]).instances) == 2
    assert len(merge(result(), [seen_in(window, *pair)]).instances) == 2


def test_bounds() -> None:
    """The best 200 remain; presence is the highest; instances of tiles without px are dropped."""
    drawn = [(rectangle(x * 5, y * 5, 3, 3), 0.5 + (x * 50 + y) / 5000) for x in range(60) for y in range(5)]
    windows = tile_windows(WIDTH, HEIGHT, 2, 100)
    tiles = [seen_in(window, *drawn, (np.zeros((HEIGHT, WIDTH), np.bool_), 0.9)) for window in windows]
    empty = Instance(0.99, (0.0, 0.0, 1.0, 1.0), 0, 0, crop_of(np.zeros((1, 1), np.bool_)))
    tiles[1] = tiles[1][0], replace(tiles[1][1], presence=0.8, instances=[*tiles[1][1].instances, empty])
    merged = merge(result(), tiles)
    assert merged.presence == 0.8
    best = sorted((score for _, score in drawn), reverse=True)[:MAX_INSTANCES]
    assert [each.score for each in merged.instances] == best
