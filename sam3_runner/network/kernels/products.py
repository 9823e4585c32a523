"""A product whose epilogue is GELU, or the rotation of q and k."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

if TYPE_CHECKING:
    from torch import Tensor

TILE_ROWS, TILE_COLUMNS, TILE_INNER = 128, 256, 64
"""The fastest of those that an H100's shared memory holds."""
GROUP = 8
"""Rows of tiles that follow each other, so that they share the weights in the cache."""


@triton.jit
def _product(
    a_desc,
    b_desc,
    c_desc,
    bias_ptr,
    cos_ptr,
    sin_ptr,
    m,
    n,
    k,
    tokens,
    rotated,
    HALF: tl.constexpr,
    GELU: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Epilogue of a @ b.T + bias. Each program takes every PROGRAMS-th tile."""
    tiles_m = tl.cdiv(m, BM)
    tiles_n = tl.cdiv(n, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=True):
        first = tile // (GROUP * tiles_n) * GROUP
        size = min(tiles_m - first, GROUP)
        row = (first + (tile % (GROUP * tiles_n)) % size) * BM
        column = (tile % (GROUP * tiles_n)) // size * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for step in range(tl.cdiv(k, BK)):
            acc = tl.dot(a_desc.load([row, step * BK]), b_desc.load([column, step * BK]).T, acc)
        columns = column + tl.arange(0, BN)
        acc += tl.load(bias_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
        if GELU:
            # x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))), Hendrycks and Gimpel 2016.
            inner = 0.7978845608028654 * acc * (1 + 0.044715 * acc * acc)
            tanh = tl.inline_asm_elementwise(
                "tanh.approx.f32 $0, $1;", "=f,f", [inner], dtype=tl.float32, is_pure=True, pack=1
            )
            acc = 0.5 * acc * (1 + tanh)
        if HALF:
            position = (row + tl.arange(0, BM)) % tokens
            at = position[:, None] * HALF + tl.arange(0, HALF)[None, :]
            turned = column < rotated
            cos = tl.load(cos_ptr + at, mask=turned, other=1.0)[:, None, :]
            sin = tl.load(sin_ptr + at, mask=turned, other=0.0)[:, None, :]
            even, odd = tl.split(tl.reshape(acc, (BM, BN // (2 * HALF), HALF, 2)))
            acc = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (BM, BN))
        c_desc.store([row, column], acc.to(c_desc.dtype))


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    gelu: bool = False,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    rotated: int = 0,
) -> Tensor:
    """The product x @ weight.T + bias, then GELU in its tanh form, or the first columns rotated.

    Args:
        x: (..., K), in the dtype of the weight.
        weight: (N, K).
        bias: (N,).
        gelu: apply GELU.
        cos: of the rotary angles, (T, d / 2) fp32, where x has rows of T tokens.
        sin: likewise.
        rotated: columns that are rotated, a multiple of `TILE_COLUMNS`.
    """
    rows = x.reshape(-1, x.shape[-1])
    (m, k), n = rows.shape, len(weight)
    out = torch.empty(m, n, device=x.device, dtype=x.dtype)
    tiles = triton.cdiv(m, TILE_ROWS) * triton.cdiv(n, TILE_COLUMNS)
    programs = min(torch.cuda.get_device_properties(x.device).multi_processor_count, tiles)
    _product[programs,](
        TensorDescriptor.from_tensor(rows, [TILE_ROWS, TILE_INNER]),
        TensorDescriptor.from_tensor(weight, [TILE_COLUMNS, TILE_INNER]),
        TensorDescriptor.from_tensor(out, [TILE_ROWS, TILE_COLUMNS]),
        bias,
        cos,
        sin,
        m,
        n,
        k,
        1 if cos is None else len(cos),
        rotated,
        HALF=0 if cos is None else cos.shape[1],
        GELU=gelu,
        BM=TILE_ROWS,
        BN=TILE_COLUMNS,
        BK=TILE_INNER,
        GROUP=GROUP,
        PROGRAMS=programs,
        num_warps=8,
        num_stages=3,
    )
    return out.view(*x.shape[:-1], n)
