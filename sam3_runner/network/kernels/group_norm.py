"""GroupNorm and ReLU of a channels-last map, and the sum with the next finer map, in two passes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

CHUNKS = 128
"""Parts of a map whose sums are computed side by side."""
SUMMED_ROWS, NORMED_ROWS = 16, 32
"""Cells of one step."""


@triton.jit
def _moments(
    x_ptr,
    bias_ptr,
    out_ptr,
    places,
    PER: tl.constexpr,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    BM: tl.constexpr,
):
    """Sum and sum of squares of each group over PER cells."""
    chunk = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, C)
    bias = tl.load(bias_ptr + column).to(tl.float32)[None, :]
    total = tl.zeros([BM, C], tl.float32)
    square = tl.zeros([BM, C], tl.float32)
    for step in range(0, PER, BM):
        row = chunk * PER + step + tl.arange(0, BM)[:, None]
        at = (batch * places + row) * C + column[None, :]
        x = tl.load(x_ptr + at, mask=row < places, other=0.0).to(tl.float32)
        x = tl.where(row < places, x + bias, 0.0)
        total += x
        square += x * x
    group = tl.arange(0, GROUPS)
    out = out_ptr + ((batch * tl.num_programs(0) + chunk) * GROUPS + group) * 2
    tl.store(out, tl.sum(tl.reshape(tl.sum(total, 0), (GROUPS, C // GROUPS)), 1))
    tl.store(out + 1, tl.sum(tl.reshape(tl.sum(square, 0), (GROUPS, C // GROUPS)), 1))


@triton.jit
def _group_norm(
    x_ptr,
    x_bias_ptr,
    moments_ptr,
    weight_ptr,
    bias_ptr,
    finer_ptr,
    out_ptr,
    height,
    width,
    eps,
    CHUNKS: tl.constexpr,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    BM: tl.constexpr,
    DOUBLED: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    places = height * width
    group = tl.arange(0, GROUPS)
    chunk = tl.arange(0, CHUNKS)
    at = ((batch * CHUNKS + chunk)[:, None] * GROUPS + group[None, :]) * 2
    count = places * (C // GROUPS)
    mean = tl.sum(tl.load(moments_ptr + at), 0) / count
    square = tl.sum(tl.load(moments_ptr + at + 1), 0) / count
    variance = square - mean * mean
    scale = tl.rsqrt(tl.where(variance < 0, 0.0, variance) + eps)  # rounding may make it less than 0
    column = tl.arange(0, C)
    mean = tl.reshape(tl.broadcast_to(mean[:, None], (GROUPS, C // GROUPS)), (C,))
    scale = tl.reshape(tl.broadcast_to(scale[:, None], (GROUPS, C // GROUPS)), (C,))
    scale *= tl.load(weight_ptr + column).to(tl.float32)
    shift = (tl.load(x_bias_ptr + column).to(tl.float32) - mean) * scale
    shift += tl.load(bias_ptr + column).to(tl.float32)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = (row < places)[:, None]
    at = (batch * places + row)[:, None] * C + column[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x = x * scale[None, :] + shift[None, :]
    x = tl.where(x < 0, 0.0, x)  # not tl.maximum, which turns NaN into 0
    if DOUBLED:
        corner = row // width * 2 * (width * 2) + row % width * 2
        for down in tl.static_range(2):
            for right in tl.static_range(2):
                at = (corner + down * width * 2 + right)[:, None] * C + column[None, :]
                at += batch * places * 4 * C
                finer = tl.load(finer_ptr + at, mask=inside, other=0.0).to(tl.float32)
                tl.store(out_ptr + at, x + finer, mask=inside)
    else:
        tl.store(out_ptr + at, x, mask=inside)


def group_norm_relu(
    x: Tensor,
    conv_bias: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    finer: Tensor | None,
) -> Tensor:
    """See `operations.convolve_and_norm`.

    `x` is the convolution without its bias; x and `finer` are channels last, D is a power of two.
    """
    batch, width, rows, columns = x.shape
    places = rows * columns
    per = triton.cdiv(triton.cdiv(places, CHUNKS), SUMMED_ROWS) * SUMMED_ROWS
    moments = torch.empty(batch, CHUNKS, groups, 2, device=x.device)
    _moments[CHUNKS, batch](
        x, conv_bias, moments, places, PER=per, C=width, GROUPS=groups, BM=SUMMED_ROWS, num_warps=8
    )
    shape = (batch, width, rows, columns) if finer is None else (batch, width, 2 * rows, 2 * columns)
    out = torch.empty(shape, device=x.device, dtype=x.dtype, memory_format=torch.channels_last)
    _group_norm[triton.cdiv(places, NORMED_ROWS), batch](
        x,
        conv_bias,
        moments,
        weight,
        bias,
        None if finer is None else finer.contiguous(memory_format=torch.channels_last),
        out,
        rows,
        columns,
        eps,
        CHUNKS=CHUNKS,
        C=width,
        GROUPS=groups,
        BM=NORMED_ROWS,
        DOUBLED=finer is not None,
        num_warps=8,
    )
    return out
