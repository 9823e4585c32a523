"""Converts mask logits on the device to the instances of images.

All kept masks are processed together. Where their logits are positive goes to the host in one transfer, and
bounds each mask's window: the part of the image that can be positive. The windows are upsampled, thresholded
and packed to bits on the device, in chunks bounded in memory. Then of each pair either each mask goes to the
host, or only the union of its masks.
"""

from __future__ import annotations

import logging
from collections import Counter
from functools import cache
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sam3_runner.errors import MasksTooLarge
from sam3_runner.instances import FoundInstance, Instance
from sam3_runner.masks import torch_form
from sam3_runner.masks.cuda_form import MaskKernels
from sam3_runner.masks.nvrtc import KernelsUnavailable
from sam3_runner.masks.windows import BYTE_PX, EMPTY, windows

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt
    import torch
    from torch import Tensor

    from sam3_runner.instances import PackedMask
    from sam3_runner.masks.windows import DrawnMask, Size, Window

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


def find_instances(
    kept: KeptMasks, with_masks: Sequence[bool], max_mask_bytes: int | None = None
) -> list[Found]:
    """The instances of each pair.

    Args:
        kept: masks on the device.
        with_masks: of each pair, whether it gets each mask, in place of their union. On a GPU a union is
            drawn there.
        max_mask_bytes: of the masks of one pair together.

    Raises:
        MasksTooLarge: before they are drawn.
    """
    logits = kept.logits.float().contiguous()
    form = mask_kernels(logits.device) or torch_form
    ranges = form.find_ranges(logits)
    pair_of = [pair for pair, count in enumerate(kept.counts) for _ in range(count)]
    sizes = np.array([kept.sizes[pair] for pair in pair_of], dtype=np.int64).reshape(-1, 2)
    positive = windows(ranges, (logits.shape[1], logits.shape[2]), sizes)
    if max_mask_bytes is not None:
        _check_bytes((each for each in positive if with_masks[pair_of[each.mask]]), pair_of, max_mask_bytes)
    boxes = (np.clip(kept.boxes, 0.0, 1.0) * np.tile(sizes, 2).astype(np.float32)).tolist()
    drawn: dict[int, DrawnMask] = {}
    areas_px: dict[int, int] = {}
    unions: dict[int, PackedMask] = {}
    if any(with_masks):
        drawn = dict(form.draw(logits, [each for each in positive if with_masks[pair_of[each.mask]]]))
    if not all(with_masks):
        places = {pair: place for place, pair in enumerate(np.flatnonzero(~np.array(with_masks)).tolist())}
        areas_px, masks = form.unite(
            logits,
            [each for each in positive if pair_of[each.mask] in places],
            [places.get(pair, 0) for pair in pair_of],
            [kept.sizes[pair] for pair in places],
        )
        unions = dict(zip(places, masks, strict=True))
    instances = [
        Instance(score, box, drawn.get(row, EMPTY).area_px, query, drawn.get(row, EMPTY).crop)
        if with_masks[pair]
        else FoundInstance(score, box, areas_px.get(row, 0), query)
        for row, (pair, score, box, query) in enumerate(
            zip(pair_of, kept.scores.tolist(), map(tuple, boxes), kept.queries, strict=True)
        )
    ]
    ends = accumulate(kept.counts, initial=0)
    return [
        Found(
            sorted(instances[start:end], key=lambda instance: -instance.score),
            unions.get(pair),
            bool(ranges.is_finite[start:end].all()),
        )
        for pair, (start, end) in enumerate(pairwise(ends))
    ]


def _check_bytes(drawn: Iterable[Window], pair_of: Sequence[int], max_bytes: int) -> None:
    bytes_of: Counter[int] = Counter()
    for window in drawn:
        bytes_of[pair_of[window.mask]] += window.rows.px * window.columns.px // BYTE_PX
    if bytes_of and max(bytes_of.values()) > max_bytes:
        raise MasksTooLarge(
            f"the masks of a prompt's instances have {max(bytes_of.values()) / 2**20:.0f} MiB, more than "
            f"{max_bytes / 2**20:.0f}: raise score_threshold, send a smaller image, or ask for the mask alone"
        )


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
