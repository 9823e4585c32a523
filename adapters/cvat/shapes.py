"""Found objects as CVAT's shapes."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from adapters.predict_results import mask_crop
from outputs.converters.cvat import cvat_mask_points
from outputs.converters.single_path import single_path
from outputs.polygons import polygons

if TYPE_CHECKING:
    from sam3_client import Instance


def mask_points(instance: Instance) -> list[float]:
    """`points` of a shape of type `mask`."""
    return [float(number) for number in cvat_mask_points(mask_crop(instance.mask))]


def polygon_points(instance: Instance, tolerance_px: float) -> list[list[float]]:
    """`points` of shapes of type `polygon`, one for each part of the mask: x, y, x, y in px.

    CVAT's polygons have no holes. Each hole is joined to its part's exterior by a line of no width.

    Args:
        instance: a found object.
        tolerance_px: as in `outputs.polygons.polygons`.
    """
    parts = polygons(mask_crop(instance.mask), tolerance_px)
    return [[float(number) for number in chain.from_iterable(single_path(part))] for part in parts]
