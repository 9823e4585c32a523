"""Resizes images to the model's square on its device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F  # noqa: N812 - torch's own convention

if TYPE_CHECKING:
    from torch import Tensor


def to_square(pixels: Tensor, side_px: int, orientation: int = 1) -> Tensor:
    """The model's square of pixels on any device, (side, side, 3) uint8.

    Bilinear with antialias, in fp32, rounded once: what torchvision's resize does on a GPU, which the
    official processor calls. `sam3_runner.images.square` does the same in Pillow; where the two round a value
    near a half to different sides, they differ by one level.

    Args:
        pixels: (rows, columns, 1 or 3) uint8, as stored. A square is not changed but for its orientation.
        side_px: of the square.
        orientation: EXIF's, 1 to 8, of the stored pixels.
    """
    if pixels.shape[:2] != (side_px, side_px):
        planes = pixels.permute(2, 0, 1)[None].float()
        planes = F.interpolate(planes, (side_px, side_px), mode="bilinear", antialias=True)
        pixels = planes[0].round_().clamp_(0, 255).byte().permute(1, 2, 0)
    return _oriented(pixels, orientation).expand(-1, -1, 3).contiguous()


def _oriented(pixels: Tensor, orientation: int) -> Tensor:
    """As `images.square._oriented`."""
    if orientation >= 5:
        pixels = pixels.transpose(0, 1)
    flipped = [
        axis for axis, orientations in enumerate(((3, 4, 7, 8), (2, 3, 6, 7))) if orientation in orientations
    ]
    return pixels.flip(flipped) if flipped else pixels
