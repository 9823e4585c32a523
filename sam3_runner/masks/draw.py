"""Converts mask logits on the device to the instances of images.

All kept masks are processed together. Where their logits are positive goes to the host in one transfer, and
bounds each mask's window: the part of the image that can be positive. The windows are upsampled, thresholded
and packed to bits on the device, in chunks bounded in memory. Then either each mask goes to the host, or only
the union of the masks of each image.
"""

from __future__ import annotations

import logging
from functools import cache
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sam3_runner.instances import FoundInstance, Instance
from sam3_runner.masks import torch_form
from sam3_runner.masks.cuda_form import MaskKernels
from sam3_runner.masks.nvrtc import KernelsUnavailable
from sam3_runner.masks.windows import EMPTY, windows

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt
    import torch
    from torch import Tensor

    from sam3_runner.instances import PackedMask
    from sam3_runner.masks.windows import Size

logger = logging.getLogger(__name__)


class KeptMasks(NamedTuple):
    """The kept queries of P (image, prompt) pairs, those of the first pair first.

    Attributes:
        queries: indices of the decoder's K kept queries.
        scores: (K,) fp32.
        boxes: (K, 4) fp32, x0 y0 x1 y1 in 0..1. They are clamped to the image: the box of an object at the
            edge may exceed it by some px, and annotation tools refuse such boxes.
        logits: (K, h, w) on the model's mask grid, on the device. They are upsampled as logits (bilinear,
            align_corners=False) and thresholded at 0, as in the official processor.
        counts: number of masks of each pair.
        sizes: of each pair's image.
    """

    queries: Sequence[int]
    scores: npt.NDArray[np.float32]
    boxes: npt.NDArray[np.float32]
    logits: Tensor
    counts: Sequence[int]
    sizes: Sequence[Size]


class Found(NamedTuple):
    """The answer for one pair.

    Attributes:
        instances: highest score first; with their masks, unless these are united.
        union: of the masks, as bits; None where they are not united.
        is_finite: whether all mask logits are; if not, the network overflowed and the masks are wrong.
    """

    instances: list[FoundInstance]
    union: PackedMask | None
    is_finite: bool


def find_instances(kept: KeptMasks, *, unite: bool) -> list[Found]:
    """The instances of each pair.

    Args:
        kept: masks on the device.
        unite: return the union of each pair's masks in place of the masks. On a GPU it is drawn there.
    """
    logits = kept.logits.float().contiguous()
    form = mask_kernels(logits.device) or torch_form
    ranges = form.find_ranges(logits)
    pair_of = [pair for pair, count in enumerate(kept.counts) for _ in range(count)]
    sizes = np.array([kept.sizes[pair] for pair in pair_of], dtype=np.int64).reshape(-1, 2)
    positive = windows(ranges, (logits.shape[1], logits.shape[2]), sizes)
    boxes = (np.clip(kept.boxes, 0.0, 1.0) * np.tile(sizes, 2).astype(np.float32)).tolist()
    unions: list[PackedMask | None] = [None] * len(kept.counts)
    instances: list[FoundInstance]
    facts = zip(kept.scores.tolist(), map(tuple, boxes), kept.queries, strict=True)
    if unite:
        united = form.unite(logits, positive, pair_of, kept.sizes)
        unions = list(united.masks)
        instances = [
            FoundInstance(score, box, united.areas_px.get(row, 0), query)
            for row, (score, box, query) in enumerate(facts)
        ]
    else:
        drawn = dict(form.draw(logits, positive))
        masks = [drawn.get(row, EMPTY) for row in range(len(pair_of))]
        instances = [
            Instance(score, box, area_px, query, crop)
            for (score, box, query), (area_px, crop) in zip(facts, masks, strict=True)
        ]
    ends = accumulate(kept.counts, initial=0)
    return [
        Found(
            sorted(instances[start:end], key=lambda instance: -instance.score),
            union,
            bool(ranges.is_finite[start:end].all()),
        )
        for (start, end), union in zip(pairwise(ends), unions, strict=True)
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
