"""The instances of mask logits, against upsampling the whole picture."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's usual alias
from hypothesis import given, settings
from hypothesis import strategies as st

from sam3_runner import Instance, MaskCrop, PredictResult
from sam3_runner.instances import packed_union
from sam3_runner.masks.draw import Found, KeptMasks, find_instances
from sam3_runner.masks.windows import Size

EMPTY = MaskCrop(left=0, top=0, width=0, height=0, bits=b"")


def find(
    logits: torch.Tensor,
    pairs: list[tuple[int, int, int]],
    scores: np.ndarray | None = None,
    boxes: np.ndarray | None = None,
) -> list[Found]:
    """The answers for pairs of so many masks on a picture of so many px; the scores fall if none are given.

    Checks that the masks, united by pair, are the same.
    """
    kept = KeptMasks(
        range(len(logits)),
        np.linspace(0.9, 0.6, len(logits), dtype=np.float32) if scores is None else scores,
        np.zeros((len(logits), 4), dtype=np.float32) if boxes is None else boxes,
        logits,
        [masks for masks, _, _ in pairs],
        [Size(width, height) for _, width, height in pairs],
    )
    found, united = (find_instances(kept, [masks] * len(pairs)) for masks in (True, False))
    for each, union, (_, width, height) in zip(found, united, pairs, strict=True):
        instances = [instance for instance in each.instances if isinstance(instance, Instance)]
        assert union.union is not None
        assert np.array_equal(union.union, packed_union([PredictResult("", 1.0, width, height, instances)]))
        assert [(instance.query, instance.area_px) for instance in union.instances] == [
            (instance.query, instance.area_px) for instance in instances
        ]
        assert union.is_finite == each.is_finite
    return found


def found(logits: torch.Tensor, pairs: list[tuple[int, int, int]]) -> list[list[Instance]]:
    """The instances of `logits`, whose scores fall, so that they keep their order."""
    return [
        [instance for instance in pair.instances if isinstance(instance, Instance)]
        for pair in find(logits, pairs)
    ]


def one_pair(logits: torch.Tensor, width: int, height: int) -> list[Instance]:
    """The instances of one picture."""
    [instances] = found(logits, [(len(logits), width, height)])
    return instances


def upsampled(logits: torch.Tensor, width: int, height: int) -> np.ndarray:
    """The masks (K, height, width) by the same arithmetic over the whole picture: rows first."""
    rows = _upsampled_rows(logits, height)
    whole = _upsampled_rows(rows.transpose(1, 2), width).transpose(1, 2) > 0
    by_torch = F.interpolate(logits[:, None], (height, width), mode="bilinear", align_corners=False)[:, 0]
    # Rounding may change a pixel whose logit is zero.
    assert not (((by_torch > 0) != whole) & (by_torch.abs() > 1e-4)).any()
    return whole.numpy()


def _upsampled_rows(logits: torch.Tensor, size_px: int) -> torch.Tensor:
    cells = logits.shape[1]
    position = ((torch.arange(size_px) + 0.5) * (cells / size_px) - 0.5).clamp(min=0.0)
    above = position.long()
    below = (above + 1).clamp(max=cells - 1)
    return torch.lerp(logits[:, above], logits[:, below], (position - above)[:, None])


def smooth_noise(masks: int, cells: int, seed: int = 0, level: float = 0.0) -> torch.Tensor:
    """Logits with objects of any shape and size."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(masks, 1, max(2, cells // 6), max(2, cells // 6), generator=generator) + level
    return F.interpolate(coarse, (cells, cells), mode="bicubic")[:, 0]


def disc(cells: int, x: float, y: float, radius: float) -> torch.Tensor:
    """Logits of a disc; all in shares of the picture."""
    at = (torch.arange(cells) + 0.5) / cells
    return radius - torch.hypot(at[None, :] - x, at[:, None] - y)


def check(instances: list[Instance], masks: np.ndarray) -> None:
    """Area, rectangle and bits of each instance are those of its mask, to the pixel."""
    assert len(instances) == len(masks)
    for instance, mask in zip(instances, masks, strict=True):
        crop = instance.mask
        assert instance.area_px == mask.sum()
        if not mask.any():
            assert crop == EMPTY
            continue
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        rectangle = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        assert crop.window == rectangle
        assert np.array_equal(crop.array(), mask[rectangle])
        first_byte, last_byte = columns[0] // 8, columns[-1] // 8
        bits = np.packbits(mask[rectangle[0]], axis=1)[:, first_byte : last_byte + 1]
        assert crop.bits == bits.tobytes()


@given(
    width=st.integers(1, 700),
    height=st.integers(1, 700),
    cells=st.integers(2, 80),
    level=st.sampled_from([-2.0, -0.5, 0.5]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_only_the_positive_part_is_upsampled(
    width: int, height: int, cells: int, level: float, seed: int
) -> None:
    """Masks equal those of upsampling the whole grid, for any size and position of the object."""
    logits = smooth_noise(5, cells, seed, level)
    check(one_pair(logits, width, height), upsampled(logits, width, height))


@pytest.mark.parametrize(
    ("width", "height"), [(1, 1), (7, 5000), (5000, 7), (1, 300), (1001, 701), (2047, 1023), (288, 288)]
)
def test_sizes_of_pictures(width: int, height: int) -> None:
    """Masks are exact at the full grid for narrow, odd and large pictures, whose masks take several bands."""
    logits = smooth_noise(4, 288)
    logits[3] = 1.0
    check(one_pair(logits, width, height), upsampled(logits, width, height))


@given(
    width=st.integers(1, 40),
    height=st.integers(1, 40),
    density=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_any_pattern(width: int, height: int, density: float, seed: int) -> None:
    """On a picture of the grid's own size a mask is the positive cells: none, one, all, or any pattern."""
    masks = np.random.default_rng(seed).random((4, height, width)) < density
    logits = torch.from_numpy(np.where(masks, np.float32(1.0), np.float32(-1.0)))
    check(one_pair(logits, width, height), masks)


@pytest.mark.parametrize("row", [0, 8, 15])
@pytest.mark.parametrize("column", [0, 3, 8, 15])
def test_one_pixel(row: int, column: int) -> None:
    """A mask of one pixel, at the borders, in a corner or inside, is that pixel."""
    logits = torch.full((1, 16, 16), -1.0)
    logits[0, row, column] = 1.0
    [instance] = one_pair(logits, 16, 16)
    assert (instance.area_px, instance.mask.window) == (1, (slice(row, row + 1), slice(column, column + 1)))
    assert instance.mask.bits == bytes([128 >> column % 8])


@pytest.mark.parametrize(("x", "y"), [(0.0, 0.5), (1.0, 0.5), (0.5, 0.0), (0.5, 1.0), (1.0, 1.0)])
def test_objects_at_the_borders(x: float, y: float) -> None:
    """An object that the picture's border cuts ends there; no pixel outside the picture counts."""
    logits = disc(72, x, y, 0.2)[None]
    masks = upsampled(logits, 333, 251)
    instances = one_pair(logits, 333, 251)
    check(instances, masks)
    result = PredictResult("cat", 0.9, 333, 251, instances)
    assert np.array_equal(result.mask_array(), masks[0])
    assert np.array_equal(packed_union([result]), np.packbits(masks[0], axis=1))


def test_objects_of_many_sizes() -> None:
    """Objects that share chunks, from some px to the whole picture, keep their masks."""
    generator = torch.Generator().manual_seed(2)
    places = torch.rand(60, 3, generator=generator).tolist()
    logits = torch.stack([disc(144, x, y, 0.7 * radius**4) for x, y, radius in places])
    check(one_pair(logits, 1280, 720), upsampled(logits, 1280, 720))


def test_several_pairs() -> None:
    """Each pair has its own instances, at the size of its picture, also if it has none."""
    logits = smooth_noise(7, 48)
    sizes = [(3, 640, 480), (0, 30, 30), (1, 33, 501), (3, 100, 100)]
    by_pair = found(logits, sizes)
    assert [len(instances) for instances in by_pair] == [3, 0, 1, 3]
    assert [instance.query for instances in by_pair for instance in instances] == list(range(7))
    for instances, (masks, width, height), first in zip(by_pair, sizes, (0, 3, 3, 4), strict=True):
        if masks:
            check(instances, upsampled(logits[first : first + masks], width, height))


def test_best_score_is_first() -> None:
    """Instances are ordered by score, equal ones by query; boxes are in pixels and within the image."""
    logits = torch.full((3, 4, 4), -1.0)
    logits[0, :2] = 1.0
    boxes = np.array([[0.0, 0.0, 1.0, 0.5], [0.1, 0.2, 0.3, 0.4], [-0.1, 0.5, 1.2, 1.1]], dtype=np.float32)
    scores = np.array([0.6, 0.8, 0.6], dtype=np.float32)
    [answer] = find(logits, [(3, 100, 40)], scores, boxes)
    first, second, third = (each for each in answer.instances if isinstance(each, Instance))
    assert [instance.query for instance in answer.instances] == [1, 0, 2]
    assert [instance.score for instance in answer.instances] == pytest.approx([0.8, 0.6, 0.6])
    assert first.box == pytest.approx((10, 8, 30, 16))
    assert third.box == pytest.approx((0, 20, 100, 40), abs=0.0)
    assert (first.area_px, first.mask) == (0, EMPTY)
    assert second.area_px == 100 * 20
    assert second.mask == MaskCrop(0, 0, 100, 20, bytes([255] * 12 + [240]) * 20)


def test_no_positive_cell() -> None:
    """Masks without a positive cell are empty, beside NaN and infinite logits too."""
    logits = torch.stack([torch.full((8, 8), value) for value in (-1.0, 0.0, torch.nan, -torch.inf)])
    assert [(each.area_px, each.mask) for each in one_pair(logits, 50, 50)] == [(0, EMPTY)] * 4


def test_nan_does_not_spread() -> None:
    """A NaN removes the pixels that are interpolated from it, and no other."""
    logits = smooth_noise(2, 24, level=1.0)
    logits[0, 5, 7] = torch.nan
    logits[1] = -1.0
    logits[1, 9] = 1.0
    logits[1, 9, 3] = torch.nan
    masks = upsampled(logits, 240, 240)
    assert masks[1].any()
    check(one_pair(logits, 240, 240), masks)


@pytest.mark.parametrize("fault", [torch.nan, torch.inf, -torch.inf])
def test_overflow_is_reported(fault: float) -> None:
    """A pair is not finite if any of its logits is not; other pairs are."""
    logits = smooth_noise(5, 24)
    logits[2, 3, 4] = fault
    pairs = [(masks, 60, 50) for masks in (2, 2, 0, 1)]
    assert [pair.is_finite for pair in find(logits, pairs)] == [True, False, True, True]


def resident_mib(key: str) -> float:
    """Resident memory of this process: `VmRSS` now, `VmHWM` at its peak."""
    measured = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert measured
    return int(measured[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the resident memory from /proc")
@pytest.mark.parametrize(
    "logits",
    [torch.stack([disc(288, x / 20, 0.5, 0.01) for x in range(20)]), smooth_noise(1, 288)],
    ids=["small objects", "one mask of the whole picture"],
)
def test_memory_at_50_megapixels(logits: torch.Tensor) -> None:
    """Masks on a picture of 50 megapixels, 200 MB as fp32, take less than 80 MiB."""
    before_mib = resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # 5 resets VmHWM.
    instances = one_pair(logits, 8160, 6144)
    assert resident_mib("VmHWM") - before_mib < 80
    assert all(instance.area_px > 5000 for instance in instances)
