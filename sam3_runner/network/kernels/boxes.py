"""Boxes between two decoder layers: their refinement, their sine encoding, and the bias by their sides."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

LOG2_TEMPERATURE = 13.287712379549449
"""log2(10,000), the temperature of the sine encoding."""
BIAS_ROWS = 128
MAX_HEADS = 16
"""Columns of the product; the smallest that it may have."""


@triton.jit
def _log_distance(distance):
    scaled = distance * 8
    return tl.where(scaled < 0, -1.0, 1.0) * tl.log2(tl.abs(scaled) + 1) / 3


@triton.jit
def _box_bias(
    boxes_ptr,
    w1x,
    b1x,
    w2x,
    b2x,
    w1y,
    b1y,
    w2y,
    b2y,
    out_ptr,
    total,
    queries,
    GRID: tl.constexpr,
    HIDDEN: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BM: tl.constexpr,
):
    """Both products for BM cells of rows (program 0 of the second axis) or of columns (program 1)."""
    axis = tl.program_id(1)
    w1, b1, w2, b2 = w1y, b1y, w2y, b2y
    if axis == 1:
        w1, b1, w2, b2 = w1x, b1x, w2x, b2x
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = row < total
    query = row // GRID
    place = (row % GRID).to(tl.float32) / GRID
    center = tl.load(boxes_ptr + query * 4 + 1 - axis, mask=inside, other=0.0)
    half = tl.load(boxes_ptr + query * 4 + 3 - axis, mask=inside, other=0.0) / 2
    near = _log_distance(place - (center - half))[:, None]
    far = _log_distance(place - (center + half))[:, None]
    unit = tl.arange(0, HIDDEN)
    hidden = near * tl.load(w1 + unit * 2).to(tl.float32)[None, :]
    hidden += far * tl.load(w1 + unit * 2 + 1).to(tl.float32)[None, :]
    hidden += tl.load(b1 + unit).to(tl.float32)[None, :]
    hidden = tl.where(hidden < 0, 0.0, hidden)  # not tl.maximum, which turns NaN into 0
    head = tl.arange(0, COLUMNS)
    real = head < HEADS
    weight = tl.load(w2 + head[None, :] * HIDDEN + unit[:, None], mask=real[None, :], other=0.0)
    out = tl.dot(hidden.to(weight.dtype), weight)
    out += tl.load(b2 + head, mask=real, other=0.0).to(tl.float32)[None, :]
    pair = query // queries
    at = ((axis * (total // GRID // queries) + pair)[:, None] * HEADS + head[None, :]) * (queries * GRID)
    at += ((query % queries) * GRID + row % GRID)[:, None]
    tl.store(out_ptr + at, out, mask=inside[:, None] & real[None, :])


def box_bias(
    boxes: Tensor, x_layers: Sequence[nn.Linear], y_layers: Sequence[nn.Linear], grid: int
) -> tuple[Tensor, Tensor]:
    """Of rows and of columns, each (P, heads, Q, g) fp32; see `operations.box_bias`."""
    pairs, queries, _ = boxes.shape
    heads, hidden = x_layers[1].weight.shape
    out = torch.empty(2, pairs, heads, queries, grid, device=boxes.device)
    total = pairs * queries * grid
    weights = [
        each for layers in (x_layers, y_layers) for layer in layers for each in (layer.weight, layer.bias)
    ]
    _box_bias[triton.cdiv(total, BIAS_ROWS), 2](
        boxes.contiguous(),
        *weights,
        out,
        total,
        queries,
        GRID=grid,
        HIDDEN=hidden,
        HEADS=heads,
        COLUMNS=MAX_HEADS,
        BM=BIAS_ROWS,
        num_warps=4,
    )
    return out[0], out[1]


@triton.jit
def _refined_boxes(
    offset_ptr,
    reference_ptr,
    boxes_ptr,
    sine_ptr,
    queries,
    COUNT: tl.constexpr,
    LOG2_TEMPERATURE: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """One box: its refinement, and its sine encoding of 4 x COUNT values."""
    box = tl.program_id(0)
    part = tl.arange(0, 4)
    value = tl.load(reference_ptr + box * 4 + part)
    if OFFSET:
        value = tl.minimum(tl.maximum(value, 0.0), 1.0)
        logit = tl.log(tl.maximum(value, 1e-3) / tl.maximum(1.0 - value, 1e-3))
        offset = tl.load(offset_ptr + (box + box // queries + 1) * 4 + part).to(tl.float32)
        value = tl.sigmoid(logit + offset)
        tl.store(boxes_ptr + box * 4 + part, value)
    wave = tl.arange(0, COUNT // 2).to(tl.float32)
    period = tl.exp2(wave * (2 * LOG2_TEMPERATURE / COUNT))
    phase = value[:, None] * 6.283185307179586 / period[None, :]
    waves = tl.reshape(tl.join(tl.sin(phase), tl.cos(phase)), (4, COUNT))
    order = tl.where(part == 0, 1, tl.where(part == 1, 0, part))  # y, x, w, h
    at = order[:, None] * COUNT + tl.arange(0, COUNT)[None, :]
    tl.store(sine_ptr + box * 4 * COUNT + at, waves)


def refined_boxes(
    offset: Tensor | None, reference: Tensor, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Boxes (P, Q, 4) and their encoding (P, Q, 2 * width) in `dtype`; see `operations.refined_boxes`."""
    reference = reference.contiguous()
    sine = torch.empty(*reference.shape[:-1], 2 * width, device=reference.device, dtype=dtype)
    boxes = reference if offset is None else torch.empty_like(reference)
    _refined_boxes[reference.numel() // 4,](
        offset,
        reference,
        boxes,
        sine,
        reference.shape[1],
        COUNT=width // 2,
        LOG2_TEMPERATURE=LOG2_TEMPERATURE,
        OFFSET=offset is not None,
        num_warps=4,
    )
    return boxes, sine
