"""Label Studio's predictions: polygons or brushes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from outputs.converters.row_runs import image_runs
from outputs.converters.single_path import single_path
from outputs.polygons import polygons

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sam3_runner.instances import MaskCrop, PredictResult

CHANNELS = 4
"""A brush's mask is the RGBA image of a canvas, each channel 0 or 255."""

LENGTH_BITS = (3, 4, 8, 16)
"""Of a run's length, chosen by two bits; the longest run is 2^16 values."""


def label_studio_prediction(
    results: Sequence[PredictResult],
    form: Literal["polygon", "brush"],
    *,
    from_name: str,
    to_name: str,
    model_version: str,
    tolerance_px: float = 0.0,
) -> dict[str, Any]:
    """A prediction to import with a task: a region for each part (polygons) or for each instance (brushes).

    Polygons have no holes in Label Studio. Each hole is joined to its part's exterior by a line of no width,
    so that the filled area is the mask's. Instances without px have no region.

    Args:
        results: of the prompts of one image, at least one.
        form: `polygon`: the labelling interface has a `PolygonLabels` tag. `brush`: it has `BrushLabels`.
        from_name: name of that tag.
        to_name: name of the interface's `Image` tag.
        model_version: shown beside the prediction.
        tolerance_px: of polygons, as in `outputs.polygons.polygons`.
    """
    regions = []
    for result in results:
        for instance in result.instances:
            for value in _values(instance.mask, result, form, tolerance_px):
                region = {
                    "from_name": from_name,
                    "to_name": to_name,
                    "type": f"{form}labels",
                    "original_width": result.image_width,
                    "original_height": result.image_height,
                    "image_rotation": 0,
                    "score": instance.score,
                    "value": value | {f"{form}labels": [result.prompt]},
                }
                regions.append(region)
    score = max((result.confidence for result in results), default=0.0)
    return {"model_version": model_version, "score": score, "result": regions}


def _values(mask: MaskCrop, result: PredictResult, form: str, tolerance_px: float) -> list[dict[str, Any]]:
    width, height = result.image_width, result.image_height
    if not mask.width:
        return []
    if form == "brush":
        return [{"format": "rle", "rle": label_studio_brush_rle(mask, width, height)}]
    return [
        {
            "points": [[100 * x / width, 100 * y / height] for x, y in single_path(part)],
            "closed": True,
        }
        for part in polygons(mask, tolerance_px)
    ]


def label_studio_brush_rle(mask: MaskCrop, width: int, height: int) -> list[int]:
    """A brush's `rle`: bytes of a bit stream over the whole image, px by px along rows, four values a px.

    `label_studio_sdk.converter.brush.decode_rle` reads it. The stream: number of values (32 bits), bits of a
    value - 1 (5), the four widths of lengths - 1 (4 each), then each run as 1, the number of its width (2),
    its length - 1, and its value (8).
    """
    bits = [f"{CHANNELS * width * height:032b}{8 - 1:05b}", *(f"{size - 1:04b}" for size in LENGTH_BITS)]
    longest = 1 << LENGTH_BITS[-1]
    for number, length in enumerate(image_runs(mask, width, height).tolist()):
        value = "11111111" if number % 2 else "00000000"
        whole_runs, rest = divmod(CHANNELS * length, longest)
        bits.append(_run(longest, value) * whole_runs)
        if rest:
            bits.append(_run(rest, value))
    stream = "".join(bits)
    stream += "0" * (-len(stream) % 8)
    return list(int(stream, 2).to_bytes(len(stream) // 8))


def _run(length: int, value: str) -> str:
    choice = next(number for number, size in enumerate(LENGTH_BITS) if length <= 1 << size)
    return f"1{choice:02b}{length - 1:0{LENGTH_BITS[choice]}b}{value}"
