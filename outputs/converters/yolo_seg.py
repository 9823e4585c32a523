"""Label text for YOLO's segmentation models."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from outputs.converters.single_path import single_path
from outputs.polygons import polygons

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sam3_runner.instances import Instance, PredictResult


def class_names(results: Sequence[PredictResult]) -> list[str]:
    """The distinct prompts; a class's number is its index in this list (`names` in the data set's YAML)."""
    return list(dict.fromkeys(result.prompt for result in results))


def yolo_seg(results: Sequence[PredictResult], tolerance_px: float = 0.0) -> str:
    """One line an instance: its class, then x and y of each point as fractions of the image's size.

    The format has one polygon a line. Parts and holes are joined to it by lines of no width, so none is lost
    and areas stay the same; Ultralytics' own converter joins parts alike and loses holes. Instances without
    px have no line, so line numbers are not the numbers of instances. Scores and boxes are not in the format.

    Args:
        results: of the prompts of one image.
        tolerance_px: as in `outputs.polygons.polygons`.
    """
    names = class_names(results)
    lines = [
        _line(names.index(result.prompt), instance, result, tolerance_px)
        for result in results
        for instance in result.instances
        if instance.mask.width
    ]
    return "".join(lines)


def _line(number: int, instance: Instance, result: PredictResult, tolerance_px: float) -> str:
    rings = list(chain.from_iterable(polygons(instance.mask, tolerance_px)))
    points = (f"{x / result.image_width:.7g} {y / result.image_height:.7g}" for x, y in single_path(rings))
    return f"{number} {' '.join(points)}\n"
