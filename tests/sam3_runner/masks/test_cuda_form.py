"""The CUDA kernels for masks, against torch's operations on the CPU. Needs a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sam3_runner.masks import torch_form
from sam3_runner.masks.cuda_form import MaskKernels
from sam3_runner.masks.windows import DrawnMask, Ranges, windows
from tests.sam3_runner.masks.test_draw import disc, smooth_noise

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def kernels() -> MaskKernels:
    """The kernels on the first GPU."""
    return MaskKernels(torch.device("cuda"))


def check(kernels: MaskKernels, logits: torch.Tensor, sizes: list[tuple[int, int]]) -> None:
    """The kernels find the same ranges and draw the same masks, to the bit."""
    expected, ranges = torch_form.find_ranges(logits), kernels.find_ranges(logits.cuda())
    assert all(np.array_equal(*each) for each in zip(expected, ranges, strict=True))
    assert drawn(kernels, logits.cuda(), ranges, sizes) == drawn(torch_form, logits, ranges, sizes)


def drawn(
    form: Any, logits: torch.Tensor, ranges: Ranges, sizes: list[tuple[int, int]]
) -> dict[int, DrawnMask]:
    """The masks that are not empty."""
    grid = logits.shape[1], logits.shape[2]
    return dict(form.draw(logits, windows(ranges, grid, np.array(sizes).reshape(-1, 2))))


@pytest.mark.parametrize(
    ("width", "height"),
    [(1, 1), (7, 5000), (5000, 7), (1, 300), (1001, 701), (1920, 1080), (3840, 2160), (8160, 6144)],
)
def test_sizes_of_pictures(kernels: MaskKernels, width: int, height: int) -> None:
    """Masks of the whole picture are the same, for pictures of any size."""
    check(kernels, smooth_noise(3, 288), [(width, height)] * 3)


def test_any_size_and_position(kernels: MaskKernels) -> None:
    """Masks are the same for grids, pictures and objects of random size, also beside NaN and infinity."""
    rng = np.random.default_rng(0)
    for seed in range(200):
        logits = smooth_noise(4, int(rng.integers(2, 80)), seed, float(rng.choice([-2.0, -0.5, 0.5])))
        logits[3, 0, 1] = rng.choice([torch.nan, torch.inf, -torch.inf, 1.0])
        check(kernels, logits, [tuple(rng.integers(1, 700, 2).tolist()) for _ in range(4)])


def test_many_objects(kernels: MaskKernels) -> None:
    """Hundreds of objects, from some px to the whole picture, in several chunks, are the same."""
    generator = torch.Generator().manual_seed(2)
    places = torch.rand(200, 3, generator=generator).tolist()
    logits = torch.stack([disc(288, x, y, 0.7 * radius**4) for x, y, radius in places])
    check(kernels, logits, [(3840, 2160)] * 200)


def test_no_masks(kernels: MaskKernels) -> None:
    """No masks, and masks without a positive logit, give none."""
    check(kernels, torch.empty(0, 8, 8), [])
    check(kernels, torch.full((2, 8, 8), -1.0), [(10, 10), (5, 5)])
