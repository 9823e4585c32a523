"""The resize on the model's device gives the same square as Pillow's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from sam3_runner.images.square import oriented_square
from sam3_runner.inference.resize import to_square

MAX_DIFFERING = 2e-3
"""Values of a square that may differ, by one level: those that lie near a half before they are rounded."""
LARGE, SMALL = (300, 200), (40, 31)


def differences(width: int, height: int, channels: int, orientation: int, side_px: int) -> np.ndarray:
    """Differences of levels between the square of random pixels here and Pillow's, (side, side, 3)."""
    generator = np.random.default_rng([width, height, channels, orientation, side_px])
    pixels = generator.integers(0, 256, (height, width, channels), dtype=np.uint8)
    image = Image.fromarray(pixels if channels == 3 else pixels[..., 0])
    expected = oriented_square(image, side_px, orientation=orientation, icc_profile=b"", size=image.size)
    square = to_square(torch.from_numpy(pixels), side_px, orientation)
    assert square.shape == (side_px, side_px, 3)
    assert square.dtype == torch.uint8
    assert square.is_contiguous()
    return np.abs(square.numpy().astype(int) - expected.pixels)


@pytest.mark.parametrize("size", [LARGE, LARGE[::-1], SMALL, (336, 20), (1, 500), (1, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_same_as_pillow(size: tuple[int, int], channels: int) -> None:
    """Reduced, enlarged and stretched, in all orientations: one level apart at most, and seldom."""
    found = np.stack([differences(*size, channels, orientation, 112) for orientation in range(1, 9)])
    assert found.max() <= 1
    assert (found > 0).mean() <= MAX_DIFFERING


@pytest.mark.parametrize(("size", "max_differing"), [((1920, 1080), 1.2e-3), ((640, 480), MAX_DIFFERING)])
def test_same_as_pillow_at_the_full_size(size: tuple[int, int], max_differing: float) -> None:
    """White noise, the worst case, at the square of SAM 3; more values differ where it is enlarged."""
    found = differences(*size, 3, 6, 1008)
    assert found.max() <= 1
    assert (found > 0).mean() <= max_differing


@pytest.mark.parametrize("channels", [1, 3])
def test_square_is_not_resized(channels: int) -> None:
    """An image of the square's size is kept level by level, in every orientation."""
    for orientation in range(1, 9):
        assert differences(112, 112, channels, orientation, 112).max() == 0
