"""Pixels to patches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def _patches(
    pixels_ptr,
    out_ptr,
    GRID: tl.constexpr,
    WINDOW: tl.constexpr,
    SIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One patch a program."""
    token = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    window, inner = token // (WINDOW * WINDOW), token % (WINDOW * WINDOW)
    top = (window // (GRID // WINDOW) * WINDOW + inner // WINDOW) * SIDE
    left = (window % (GRID // WINDOW) * WINDOW + inner % WINDOW) * SIDE
    at = tl.arange(0, BLOCK)
    channel, y, x = at // (SIDE * SIDE), at // SIDE % SIDE, at % SIDE
    pixel = ((image * 3 + channel) * (GRID * SIDE) + top + y) * (GRID * SIDE) + left + x
    real = channel < 3
    value = tl.load(pixels_ptr + pixel, mask=real, other=0).to(tl.float32) / 127.5 - 1.0
    tl.store(
        out_ptr + (image * GRID * GRID + token) * WIDTH + at, tl.where(real, value, 0.0), mask=at < WIDTH
    )


def patches(pixels: Tensor, grid: int, window: int, side: int, dtype: torch.dtype) -> Tensor:
    """See `operations.patches`; `side` of a patch in px."""
    width = -(-3 * side * side // 8) * 8
    out = torch.empty(len(pixels), grid * grid, width, device=pixels.device, dtype=dtype)
    _patches[grid * grid, len(pixels)](
        pixels.contiguous(),
        out,
        GRID=grid,
        WINDOW=window,
        SIDE=side,
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        num_warps=4,
    )
    return out
