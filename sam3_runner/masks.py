"""Mask logits on the device to the instances of an image. Knows tensors and image sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name that every PyTorch reader knows

from sam3_runner.instances import Instance, MaskCrop

if TYPE_CHECKING:
    from torch import Tensor

    from sam3_runner.instances import Mask

CHUNK_PIXELS = 64_000_000
"""Mask pixels upsampled at a time: 256 MB of fp32, however many instances and however large the image."""


def to_instances(
    scores: Tensor, boxes: Tensor, mask_logits: Tensor, *, width: int, height: int
) -> list[Instance]:
    """Instances, best score first.

    Args:
        scores: (K,) fp32.
        boxes: (K, 4) fp32, x0 y0 x1 y1 in 0..1.
        mask_logits: (K, h, w) fp32 on the model's mask grid. They are upsampled as logits (bilinear,
            corners not aligned) and cut at 0, as the official processor does.
        width: of the image in px.
        height: of the image in px.
    """
    order = scores.argsort(descending=True)
    scale = torch.tensor([width, height, width, height], dtype=torch.float32, device=boxes.device)
    pixel_boxes = (boxes * scale)[order].tolist()
    crops: list[MaskCrop] = []
    for chunk in torch.split(mask_logits[order], max(1, CHUNK_PIXELS // (width * height))):
        crops += [_crop(mask) for mask in _upsample(chunk, width=width, height=height)]
    return [
        Instance(score=score, box=(box[0], box[1], box[2], box[3]), area_px=_area(crop), mask=crop)
        for score, box, crop in zip(scores[order].tolist(), pixel_boxes, crops, strict=True)
    ]


def _upsample(mask_logits: Tensor, *, width: int, height: int) -> list[Mask]:
    size = (height, width)
    upsampled = F.interpolate(mask_logits[:, None], size=size, mode="bilinear", align_corners=False)
    return list((upsampled[:, 0] > 0).cpu().numpy())


def _crop(mask: Mask) -> MaskCrop:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return MaskCrop(left=0, top=0, width=0, height=0, bits=b"")
    top, left = int(rows[0]), int(columns[0])
    inside = mask[top : rows[-1] + 1, left : columns[-1] + 1]
    height, width = inside.shape
    return MaskCrop(left=left, top=top, width=width, height=height, bits=np.packbits(inside).tobytes())


def _area(crop: MaskCrop) -> int:
    return int(crop.array().sum())
