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
    from collections.abc import Callable, Sequence

    import numpy.typing as npt
    import torch
    from torch import Tensor

    from sam3_runner.instances import PackedMask
    from sam3_runner.masks.windows import DrawnMask, Size, United, Window

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
    is_apart = [with_masks[pair] for pair in pair_of]
    apart = [each for each in positive if is_apart[each.mask]]
    together = [each for each in positive if not is_apart[each.mask]]
    if max_mask_bytes is not None:
        _check_bytes(apart, pair_of, max_mask_bytes)
    masks = dict(form.draw(logits, apart)) if apart else {}
    united_sizes = {pair: kept.sizes[pair] for pair, has_masks in enumerate(with_masks) if not has_masks}
    areas_px, unions = _unite(form.unite, logits, together, pair_of, united_sizes)
    instances = _instances(kept, sizes, masks, areas_px, is_apart)
    ends = accumulate(kept.counts, initial=0)
    return [
        Found(
            sorted(instances[start:end], key=lambda instance: -instance.score),
            unions.get(pair),
            bool(ranges.is_finite[start:end].all()),
        )
        for pair, (start, end) in enumerate(pairwise(ends))
    ]


def _unite(
    unite: Callable[..., United],
    logits: Tensor,
    together: list[Window],
    pair_of: Sequence[int],
    sizes: dict[int, Size],
) -> tuple[dict[int, int], dict[int, PackedMask]]:
    """The area of each mask in px, and the union of each pair that has a size in `sizes`."""
    if not sizes:
        return {}, {}
    image_of = {pair: image for image, pair in enumerate(sizes)}
    images = [image_of.get(pair, 0) for pair in pair_of]
    areas_px, masks = unite(logits, together, images, list(sizes.values()))
    return areas_px, dict(zip(sizes, masks, strict=True))


def _instances(
    kept: KeptMasks,
    sizes: npt.NDArray[np.int64],
    masks: dict[int, DrawnMask],
    areas_px: dict[int, int],
    is_apart: Sequence[bool],
) -> list[FoundInstance]:
    """All instances, in the order of `kept`; with their masks where they are apart."""
    boxes = (np.clip(kept.boxes, 0.0, 1.0) * np.tile(sizes, 2).astype(np.float32)).tolist()
    found: list[FoundInstance] = []
    for row, (score, box, query) in enumerate(
        zip(kept.scores.tolist(), map(tuple, boxes), kept.queries, strict=True)
    ):
        if is_apart[row]:
            area_px, crop = masks.get(row, EMPTY)
            found.append(Instance(score, box, area_px, query, crop))
        else:
            found.append(FoundInstance(score, box, areas_px.get(row, 0), query))
    return found


def _check_bytes(drawn: Sequence[Window], pair_of: Sequence[int], max_bytes: int) -> None:
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
