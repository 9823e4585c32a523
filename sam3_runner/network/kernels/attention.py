"""Attention with the online softmax of FlashAttention (Dao 2023), for heads of any strides."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

LOG2_E = 1.4426950408889634
KEYS = 64
"""Of one step."""
NARROW_HEAD = 32
MANY_ROWS = 16 * 5184
"""With so many rows of narrow heads a program takes 128 of them, else 64; measured on an H100."""


@triton.jit
def _attend_keys(
    q,
    peak,
    total,
    acc,
    k_ptr,
    v_ptr,
    valid_ptr,
    k_row,
    v_row,
    scale,
    first,
    last,
    N: tl.constexpr,
    D: tl.constexpr,
    BN: tl.constexpr,
    EDGE: tl.constexpr,
    MASK: tl.constexpr,
):
    """Keys `first` to `last` - 1; EDGE: some of the last step lie beyond N."""
    d = tl.arange(0, D)[None, :]
    for start in range(first, last, BN):
        n = start + tl.arange(0, BN)
        if EDGE:
            k = tl.load(k_ptr + n[:, None] * k_row + d, mask=n[:, None] < N, other=0.0)
            v = tl.load(v_ptr + n[:, None] * v_row + d, mask=n[:, None] < N, other=0.0)
        else:
            k = tl.load(k_ptr + n[:, None] * k_row + d)
            v = tl.load(v_ptr + n[:, None] * v_row + d)
        s = tl.dot(q, tl.trans(k))
        if MASK:
            s = tl.where(tl.load(valid_ptr + n, mask=n < N, other=0)[None, :] != 0, s, float("-inf"))
        elif EDGE:
            s = tl.where(n[None, :] < N, s, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - new_peak[:, None])
        fade = tl.exp2(peak - new_peak)
        total = total * fade + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None])
        peak = new_peak
    return peak, total, acc


@triton.jit
def _attend(
    q_ptr,
    k_ptr,
    v_ptr,
    valid_ptr,
    out_ptr,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    heads,
    rows,
    scale,
    N: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    MASK: tl.constexpr,
):
    head = tl.program_id(1) % heads
    batch = (tl.program_id(1) // heads).to(tl.int64)
    row = (tl.program_id(0) * BM + tl.arange(0, BM))[:, None]
    d = tl.arange(0, D)[None, :]
    q = tl.load(q_ptr + batch * q_batch + head * q_head + row * q_row + d, mask=row < rows, other=0.0)
    peak = tl.full([BM], -1e30, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    k_ptr += batch * k_batch + head * k_head
    v_ptr += batch * v_batch + head * v_head
    valid_ptr += batch * N
    whole: tl.constexpr = N // BN * BN
    peak, total, acc = _attend_keys(
        q, peak, total, acc, k_ptr, v_ptr, valid_ptr, k_row, v_row, scale, 0, whole, N, D, BN, False, MASK
    )
    if whole < N:
        peak, total, acc = _attend_keys(
            q, peak, total, acc, k_ptr, v_ptr, valid_ptr, k_row, v_row, scale, whole, N, N, D, BN, True, MASK
        )
    out = out_ptr + ((batch * rows + row) * heads + head) * D + d
    tl.store(out, acc / total[:, None], mask=row < rows)


def attend(query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None) -> Tensor:
    """(B, N, heads, d); see `operations.attend`. The last dimension of q, k and v is contiguous."""
    batch, heads, rows, width = query.shape
    out = torch.empty(batch, rows, heads, width, device=query.device, dtype=query.dtype)
    program_rows = 128 if width == NARROW_HEAD and batch * heads * rows > MANY_ROWS else 64
    _attend[triton.cdiv(rows, program_rows), batch * heads](
        query,
        key,
        value,
        query if valid is None else valid,
        out,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        heads,
        rows,
        width**-0.5 * LOG2_E,
        N=key.shape[2],
        D=width,
        BM=program_rows,
        BN=KEYS,
        MASK=valid is not None,
        num_warps=4,
        num_stages=3,
    )
    return out
