"""CVAT's mask shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from outputs.converters.row_runs import crop_runs

if TYPE_CHECKING:
    from sam3_runner.instances import MaskCrop


def cvat_mask_points(mask: MaskCrop) -> list[int]:
    """`points` of a shape of type `mask`, equal to `cvat_sdk.masks.encode_mask` of the whole image.

    Run lengths row by row inside the crop, px that are not set first, then the crop's left, top, right and
    bottom, the last two inclusive. CVAT has no empty mask; like its SDK, this gives one px that is not set.
    """
    if not mask.width:
        return [1, 0, 0, 0, 0]
    right, bottom = mask.left + mask.width - 1, mask.top + mask.height - 1
    return [*crop_runs(mask).tolist(), mask.left, mask.top, right, bottom]
