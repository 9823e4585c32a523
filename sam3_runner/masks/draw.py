"""Converts mask logits on the device to the instances of images.

All kept masks are processed together. Where their logits are positive goes to the host in one transfer, and
bounds each mask's window: the part of the image that can be positive. The windows are upsampled, thresholded
and packed to bits on the device, in chunks bounded in memory. Each chunk goes to the host in one transfer.
"""

from __future__ import annotations

import logging
from functools import cache
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from sam3_runner.instances import Instance
from sam3_runner.masks import torch_form
from sam3_runner.masks.cuda_form import MaskKernels
from sam3_runner.masks.nvrtc import KernelsUnavailable
from sam3_runner.masks.windows import EMPTY, windows

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

logger = logging.getLogger(__name__)


class KeptMasks(NamedTuple):
    """The kept masks of one (image, prompt) pair: their number, and the size of the image in px."""

    masks: int
    width: int
    height: int


class Found(NamedTuple):
    """The answer for one pair.

    Attributes:
        instances: highest score first.
        is_finite: whether all mask logits are; if not, the network overflowed and the masks are wrong.
    """

    instances: list[Instance]
    is_finite: bool


def to_instances(
    queries: Sequence[int],
    scores: npt.NDArray[np.float32],
    boxes: npt.NDArray[np.float32],
    mask_logits: Tensor,
    pairs: Sequence[KeptMasks],
) -> list[Found]:
    """The instances of each pair.

    Args:
        queries: indices of the decoder's K kept queries, those of the first pair first.
        scores: (K,) fp32.
        boxes: (K, 4) fp32, x0 y0 x1 y1 in 0..1. They are clamped to the image: the box of an object at the
            edge may exceed it by some px, and annotation tools refuse such boxes.
        mask_logits: (K, h, w) fp32 on the model's mask grid, on the device. They are upsampled as logits
            (bilinear, align_corners=False) and thresholded at 0, as in the official processor.
        pairs: the K masks by pair.
    """
    mask_logits = mask_logits.float().contiguous()
    form = mask_kernels(mask_logits.device) or torch_form
    ranges = form.find_ranges(mask_logits)
    sizes = np.array([pair[1:] for pair in pairs for _ in range(pair.masks)], dtype=np.int64).reshape(-1, 2)
    grid = mask_logits.shape[1], mask_logits.shape[2]
    drawn = dict(form.draw(mask_logits, windows(ranges, grid, sizes)))
    pixel_boxes = np.clip(boxes, 0.0, 1.0) * np.tile(sizes, 2).astype(np.float32)
    instances = []
    for row, (query, score, box) in enumerate(
        zip(queries, scores.tolist(), pixel_boxes.tolist(), strict=True)
    ):
        area_px, crop = drawn.get(row, EMPTY)
        instances.append(Instance(score, tuple(box), area_px, crop, query))
    ends = accumulate((pair.masks for pair in pairs), initial=0)
    return [
        Found(
            sorted(instances[start:end], key=lambda instance: -instance.score),
            bool(ranges.is_finite[start:end].all()),
        )
        for start, end in pairwise(ends)
    ]


@cache
def mask_kernels(device: torch.device) -> MaskKernels | None:
    """The CUDA kernels, compiled at the first call; None where torch's operations are used instead."""
    if device.type != "cuda":
        return None
    try:
        return MaskKernels(device)
    except KernelsUnavailable as error:
        logger.warning("the CUDA kernels for masks are not used, which costs 1 to 30 ms a request: %s", error)
        return None
