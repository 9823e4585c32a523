"""Rectangles that a person drew in Label Studio, as exemplar boxes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from adapters.label_studio.errors import BadRequest, UnsupportedPrompt

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in px of the image."""


def exemplars(regions: Sequence[Mapping[str, Any]]) -> dict[str, list[Box]]:
    """The rectangles by their label, in their order.

    Args:
        regions: of Label Studio: `value` has x, y, width and height in per cent of the image, and rotation in
            degrees round the corner x, y. A rotated rectangle counts as the box around it.

    Raises:
        UnsupportedPrompt: nothing in them is a rectangle with a label.
        BadRequest: a rectangle has no numbers.
    """
    boxes: dict[str, list[Box]] = {}
    for region in regions:
        value = region.get("value", {})
        if region.get("type") == "rectanglelabels" and value.get("rectanglelabels"):
            boxes.setdefault(str(value["rectanglelabels"][0]), []).append(_box(region, value))
    if not boxes:
        raise UnsupportedPrompt(
            "Draw a rectangle with a label round one example; SAM 3 takes no points and no brush strokes."
        )
    return boxes


def _box(region: Mapping[str, Any], value: Mapping[str, Any]) -> Box:
    try:
        width, height = float(region["original_width"]), float(region["original_height"])
        left, top = float(value["x"]) / 100 * width, float(value["y"]) / 100 * height
        across, down = float(value["width"]) / 100 * width, float(value["height"]) / 100 * height
        angle = math.radians(float(value.get("rotation") or 0))
    except (KeyError, TypeError, ValueError) as error:
        raise BadRequest("A rectangle from Label Studio has no place in the image; draw it again.") from error
    cos, sin = math.cos(angle), math.sin(angle)
    corners = [(0.0, 0.0), (across, 0.0), (0.0, down), (across, down)]
    x = [left + dx * cos - dy * sin for dx, dy in corners]
    y = [top + dx * sin + dy * cos for dx, dy in corners]
    return min(x), min(y), max(x), max(y)
