"""Converts mask logits on the device to the instances of an image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from sam3_runner.instances import Instance, MaskCrop

if TYPE_CHECKING:
    from torch import Tensor

    from sam3_runner.instances import Mask

EMPTY = MaskCrop(left=0, top=0, width=0, height=0, bits=b"")


def to_instances(
    queries: Tensor, scores: Tensor, boxes: Tensor, mask_logits: Tensor, *, width: int, height: int
) -> list[Instance]:
    """Instances, highest score first.

    Args:
        queries: (K,) int64, indices of the decoder's kept queries.
        scores: (K,) fp32.
        boxes: (K, 4) fp32, x0 y0 x1 y1 in 0..1. They are clamped to the image: the box of an object at the
            edge may exceed it by some px, and annotation tools refuse such boxes.
        mask_logits: (K, h, w) fp32 on the model's mask grid. They are upsampled as logits (bilinear,
            align_corners=False) and thresholded at 0, as in the official processor.
        width: of the image in px.
        height: of the image in px.
    """
    order = scores.argsort(descending=True)
    scale = torch.tensor([width, height, width, height], dtype=torch.float32, device=boxes.device)
    pixel_boxes = (boxes.clamp(0.0, 1.0) * scale)[order].tolist()
    crops = _crops(mask_logits[order], width=width, height=height)
    return [
        Instance(score, (box[0], box[1], box[2], box[3]), area_px, crop, query)
        for query, score, box, (crop, area_px) in zip(
            queries[order].tolist(), scores[order].tolist(), pixel_boxes, crops, strict=True
        )
    ]


def _crops(mask_logits: Tensor, *, width: int, height: int) -> list[tuple[MaskCrop, int]]:
    """Each mask and its area in px.

    Only the part of the image that can be positive is upsampled, so time and memory depend on the size of
    the objects, not on that of the image, which may have 50 megapixels.
    """
    positive = mask_logits > 0
    # One transfer for the positive rows and columns of all masks.
    rows, columns = positive.any(dim=2).cpu().numpy(), positive.any(dim=1).cpu().numpy()
    crops = []
    for logits, mask_rows, mask_columns in zip(mask_logits, rows, columns, strict=True):
        if not mask_rows.any():
            crops.append((EMPTY, 0))
            continue
        top, bottom = _pixel_range(mask_rows, height)
        left, right = _pixel_range(mask_columns, width)
        upsampled_rows = _upsample_rows(logits, top, bottom, height)
        mask = _upsample_rows(upsampled_rows.T, left, right, width).T > 0
        crops.append(_crop(mask.cpu().numpy(), top=top, left=left))
    return crops


def _pixel_range(positive: Mask, size_px: int) -> tuple[int, int]:
    """First px and last px + 1 of an axis that are within one cell of the centre of a positive cell."""
    cells = np.flatnonzero(positive)
    px_per_cell = size_px / len(positive)
    first, last = (cells[0] - 0.5) * px_per_cell, (cells[-1] + 1.5) * px_per_cell
    return max(0, int(first)), min(size_px, int(last) + 1)


def _upsample_rows(logits: Tensor, first: int, last: int, size_px: int) -> Tensor:
    """Rows `first` to `last` of the (h, w) `logits` upsampled to `size_px` rows: (last - first, w)."""
    cells = len(logits)
    px = torch.arange(first, last, dtype=torch.float32, device=logits.device)
    position = ((px + 0.5) * (cells / size_px) - 0.5).clamp(min=0.0)
    above = position.long()
    below = (above + 1).clamp(max=cells - 1)
    return torch.lerp(logits[above], logits[below], (position - above)[:, None])


def _crop(mask: Mask, *, top: int, left: int) -> tuple[MaskCrop, int]:
    """The bounding rectangle of `mask`, whose first px is (top, left) of the image, and its area in px."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return EMPTY, 0
    inside = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    crop = MaskCrop(
        left=left + int(columns[0]),
        top=top + int(rows[0]),
        width=inside.shape[1],
        height=inside.shape[0],
        bits=np.packbits(inside).tobytes(),
    )
    return crop, int(inside.sum())
