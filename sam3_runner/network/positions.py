"""Position encodings, in fp32, by the official formulas (sam3's position_encoding.py and vitdet.py)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

TEMPERATURE = 10_000.0
_CPU = torch.device("cpu")
"""Tables are computed here even where the network is built on the meta device, without weights."""


def sine_periods(width: int) -> Tensor:
    """The periods of `width` waves, (width,): of each pair the first is for a sine, the second a cosine."""
    pair = torch.arange(width, device=_CPU) // 2
    periods: Tensor = TEMPERATURE ** (2 * pair / width)
    return periods


def sine_of_grid(side: int, width: int) -> Tensor:
    """The encoding of a square grid's cells, (side * side, width): of y, then of x, both in 0..2 pi."""
    line = torch.arange(1, side + 1, dtype=torch.float32, device=_CPU) / (side + 1e-6)
    waves = _waves(line, sine_periods(width // 2))
    rows, columns = waves[:, None].expand(side, side, -1), waves[None].expand(side, side, -1)
    return torch.cat((rows, columns), dim=-1).flatten(0, 1)


def cells(side: int) -> Tensor:
    """The position of each cell of a side in 0..1, (side,)."""
    return torch.arange(side, dtype=torch.float32, device=_CPU) / side


def sine_of_boxes(boxes: Tensor, periods: Tensor) -> Tensor:
    """The encoding of boxes (..., 4), cx cy w h in 0..1: (..., 4 * len(periods)), in the order y x w h."""
    x, y, width, height = (_waves(each, periods) for each in boxes.unbind(-1))
    return torch.cat((y, x, width, height), dim=-1)


def sine_of_centres(boxes: Tensor, periods: Tensor) -> Tensor:
    """The encoding of boxes (..., 4), cx cy w h in 0..1: waves of y, then of x, then h and w themselves.

    (..., 2 * len(periods) + 2), as `encode_boxes` of the official position encoding.
    """
    x, y, width, height = boxes.unbind(-1)
    sides = torch.stack((height, width), dim=-1)
    return torch.cat((_waves(y, periods), _waves(x, periods), sides), dim=-1)


def rotary_angles(side: int, head_width: int, theta: float, step: float) -> Tensor:
    """The angle of each pair of channels, (side * side, head_width / 2): half for x, half for y.

    Args:
        side: of the square grid.
        head_width: channels of one head.
        theta: of the rotary encoding.
        step: distance of neighbouring cells; 1 in a window, less where the grid is larger than a window.
    """
    quarter = torch.arange(0, head_width // 2, 2, dtype=torch.float32, device=_CPU) / (head_width // 2)
    frequencies = 1.0 / theta**quarter
    line = torch.arange(side, dtype=torch.float32, device=_CPU) * step
    columns, rows = line.repeat(side), line.repeat_interleave(side)
    return torch.cat((columns[:, None] * frequencies, rows[:, None] * frequencies), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of channels of x (B, heads, N, head width) by its angle, in fp32.

    Args:
        x: of any dtype, which the result has too.
        cos: (N, head width / 2) fp32, as `sin`.
        sin: of `rotary_angles`.
    """
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def _waves(position: Tensor, periods: Tensor) -> Tensor:
    """Sines and cosines of positions (...) in 0..1, in turn: (..., len(periods))."""
    phase = position[..., None] * (2 * math.pi) / periods
    return torch.stack((phase[..., 0::2].sin(), phase[..., 1::2].cos()), dim=-1).flatten(-2)
