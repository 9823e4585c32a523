"""Features of boxes: the mean of samples of a feature map in each cell of a grid over the box.

The formula is that of `torchvision.ops.roi_align` with its default arguments, as the official model calls it:
each cell has ceil(side / cells) samples along an axis, bilinear, and boxes are not moved by half a cell. A
sample's weights along y and x are factors, so two small products give the mean of all samples of a cell. The
shapes do not depend on the boxes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def pool_boxes(features: Tensor, boxes: Tensor, cells: int) -> Tensor:
    """Pooled features (P, K, cells, cells, D) fp32; the first of the cells' dimensions is y.

    Args:
        features: (P, g, g, D) fp32.
        boxes: (P, K, 4), x0 y0 x1 y1 in 0..1, inside the image.
        cells: along each side of a box.
    """
    x0, y0, x1, y1 = (boxes * features.shape[1]).unbind(-1)
    rows = _weights(y0, y1, cells, features.shape[1])
    columns = _weights(x0, x1, cells, features.shape[2])
    of_rows = torch.einsum("pkiy,pyxd->pkixd", rows, features)
    return torch.einsum("pkixd,pkjx->pkijd", of_rows, columns)


def _weights(start: Tensor, end: Tensor, cells: int, size: int) -> Tensor:
    """The weight of each of `size` places in each cell of an extent (P, K) in places: (P, K, cells, size)."""
    extent = (end - start).clamp(min=1.0)
    step = extent / cells
    samples = step.ceil()
    cell = torch.arange(cells, device=start.device)
    place = torch.arange(size, device=start.device)
    first = start[..., None] + cell * step[..., None]
    weights = start.new_zeros(*start.shape, cells, size)
    for sample in range(math.ceil(size / cells)):
        position = first + (sample + 0.5) * (step / samples)[..., None]
        counts = (sample < samples)[..., None] & (position >= -1.0) & (position <= size)
        inside = position.clamp(0.0, size - 1.0)
        weight = (1.0 - (inside[..., None] - place).abs()).clamp(min=0.0)
        weights += weight * counts[..., None]
    return weights / samples[..., None, None]
