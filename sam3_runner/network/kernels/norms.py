"""LayerNorm in one pass, with the additions before and after it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 4
"""Of one program."""


@triton.jit
def _norm(
    x_ptr,
    add_ptr,
    shift_ptr,
    position_ptr,
    weight_ptr,
    bias_ptr,
    total_ptr,
    normed_ptr,
    positioned_ptr,
    rows,
    adds,
    places,
    eps,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    ADD: tl.constexpr,
    SHIFT: tl.constexpr,
    POSITION: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, C)
    at = row[:, None].to(tl.int64) * C + column[None, :]
    inside = (row < rows)[:, None]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        add = add_ptr + (row % adds)[:, None] * C + column[None, :]
        x += tl.load(add, mask=inside, other=0.0).to(tl.float32)
        tl.store(total_ptr + at, x, mask=inside)
    if SHIFT:
        x += tl.load(shift_ptr + column)[None, :]
    mean = tl.sum(x, 1) / C
    x -= mean[:, None]
    scale = tl.rsqrt(tl.sum(x * x, 1) / C + eps)
    x = x * scale[:, None] * tl.load(weight_ptr + column).to(tl.float32)[None, :]
    x += tl.load(bias_ptr + column).to(tl.float32)[None, :]
    tl.store(normed_ptr + at, x, mask=inside)
    if POSITION:
        position = position_ptr + (row % places)[:, None] * C + column[None, :]
        x += tl.load(position, mask=inside, other=0.0).to(tl.float32)
        tl.store(positioned_ptr + at, x, mask=inside)


def norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    add: Tensor | None,
    shift: Tensor | None,
    position: Tensor | None,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `operations.norm`; C is a power of two."""
    x = x.contiguous()
    width = x.shape[-1]
    rows = x.numel() // width
    normed = torch.empty_like(x, dtype=dtype or x.dtype)
    total = x if add is None else torch.empty_like(x)
    positioned = normed if position is None else torch.empty_like(normed)
    _norm[triton.cdiv(rows, ROWS),](
        x,
        None if add is None else add.contiguous(),
        shift,
        position,
        weight,
        bias,
        total,
        normed,
        positioned,
        rows,
        1 if add is None else add.numel() // width,
        1 if position is None else position.numel() // width,
        eps,
        C=width,
        ROWS=ROWS,
        ADD=add is not None,
        SHIFT=shift is not None,
        POSITION=position is not None,
        num_warps=4,
    )
    return total, normed, positioned
