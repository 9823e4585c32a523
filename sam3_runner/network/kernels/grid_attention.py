"""Attention from queries to the cells of a grid, with a bias that is a sum over rows and columns.

The bias of one layer, Q x g x g values a head, is never written to memory: the keys are read in patches of
8 x 8 cells, whose bias is 8 values of rows plus 8 of columns a query.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from sam3_runner.network.kernels.attention import LOG2_E

if TYPE_CHECKING:
    from torch import Tensor

PATCH = 8
QUERIES, MERGED_QUERIES = 64, 32
"""Of one program."""
FEW_PAIRS = 4
"""For fewer pairs the keys are split among more programs, which would otherwise not fill the GPU."""


@triton.jit
def _attend_grid(
    q_ptr,
    k_ptr,
    v_ptr,
    y_ptr,
    x_ptr,
    out_ptr,
    sums_ptr,
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
    PATCHES: tl.constexpr,
    GRID: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    SPLITS: tl.constexpr,
    LOG2_E: tl.constexpr,
):
    pair = tl.program_id(1)
    split = tl.program_id(2)
    head = pair % heads
    batch = (pair // heads).to(tl.int64)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = (row < rows)[:, None]
    d = tl.arange(0, D)[None, :]
    q = tl.load(q_ptr + batch * q_batch + head * q_head + row[:, None] * q_row + d, mask=inside, other=0.0)
    peak = tl.full([BM], -1e30, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    k_ptr += batch * k_batch + head * k_head
    v_ptr += batch * v_batch + head * v_head
    side = tl.arange(0, 8)
    place = tl.arange(0, 64)
    biased = inside & (row > 0)[:, None]  # row 0 is the presence token
    at = (pair * (rows - 1) + row - 1)[:, None] * GRID + side[None, :]
    for step in range(PATCHES):
        patch = split * PATCHES + step
        top = patch // (GRID // 8) * 8
        left = patch % (GRID // 8) * 8
        n = (top + place // 8) * GRID + left + place % 8
        k = tl.load(k_ptr + n[:, None] * k_row + d)
        v = tl.load(v_ptr + n[:, None] * v_row + d)
        y = tl.load(y_ptr + at + top, mask=biased, other=0.0)
        x = tl.load(x_ptr + at + left, mask=biased, other=0.0)
        bias = tl.reshape(y[:, :, None] + x[:, None, :], (BM, 64))
        s = tl.dot(q, tl.trans(k)) * scale + bias * LOG2_E
        new_peak = tl.maximum(peak, tl.max(s, 1))
        p = tl.exp2(s - new_peak[:, None])
        fade = tl.exp2(peak - new_peak)
        total = total * fade + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None])
        peak = new_peak
    if SPLITS == 1:
        out = out_ptr + ((batch * rows + row[:, None]) * heads + head) * D + d
        tl.store(out, acc / total[:, None], mask=inside)
    else:
        part = (pair * SPLITS + split) * rows + row
        tl.store(out_ptr + part[:, None] * D + d, acc, mask=inside)
        tl.store(sums_ptr + part * 2, peak, mask=row < rows)
        tl.store(sums_ptr + part * 2 + 1, total, mask=row < rows)


@triton.jit
def _merge(part_ptr, sums_ptr, out_ptr, heads, rows, D: tl.constexpr, SPLITS: tl.constexpr, BM: tl.constexpr):
    """The softmax over all splits, from the peak and the sums of each."""
    pair = tl.program_id(1)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = row < rows
    d = tl.arange(0, D)[None, :]
    peak = tl.full([BM], -1e30, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    for split in tl.static_range(SPLITS):
        part = (pair * SPLITS + split) * rows + row
        split_peak = tl.load(sums_ptr + part * 2, mask=inside, other=0.0)
        split_total = tl.load(sums_ptr + part * 2 + 1, mask=inside, other=1.0)
        values = tl.load(part_ptr + part[:, None] * D + d, mask=inside[:, None], other=0.0)
        new_peak = tl.maximum(peak, split_peak)
        before, now = tl.exp2(peak - new_peak), tl.exp2(split_peak - new_peak)
        acc = acc * before[:, None] + now[:, None] * values
        total = total * before + split_total * now
        peak = new_peak
    out = out_ptr + (((pair // heads) * rows + row[:, None]) * heads + pair % heads) * D + d
    tl.store(out, acc / total[:, None], mask=inside[:, None])


def attend_grid(query: Tensor, key: Tensor, value: Tensor, along_y: Tensor, along_x: Tensor) -> Tensor:
    """(P, 1 + Q, heads, d); see `operations.attend_grid`."""
    batch, heads, rows, width = query.shape
    grid = along_y.shape[-1]
    patches = (grid // PATCH) ** 2
    splits = next(each for each in ((9, 3, 1) if batch < FEW_PAIRS else (3, 1)) if patches % each == 0)
    along_y, along_x = along_y.float().contiguous(), along_x.float().contiguous()
    out = torch.empty(batch, rows, heads, width, device=query.device, dtype=query.dtype)
    part, sums = out, out
    if splits > 1:
        part = torch.empty(batch * heads * splits * rows * width, device=query.device)
        sums = torch.empty(batch * heads * splits * rows * 2, device=query.device)
    _attend_grid[triton.cdiv(rows, QUERIES), batch * heads, splits](
        query,
        key,
        value,
        along_y,
        along_x,
        part,
        sums,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        heads,
        rows,
        width**-0.5 * LOG2_E,
        PATCHES=patches // splits,
        GRID=grid,
        D=width,
        BM=QUERIES,
        SPLITS=splits,
        LOG2_E=LOG2_E,
        num_warps=4,
        num_stages=3,
    )
    if splits > 1:
        _merge[triton.cdiv(rows, MERGED_QUERIES), batch * heads](
            part, sums, out, heads, rows, D=width, SPLITS=splits, BM=MERGED_QUERIES, num_warps=4
        )
    return out
