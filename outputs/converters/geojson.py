"""GeoJSON (RFC 7946) in px of the image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from outputs.polygons import PolygonRing, polygons

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sam3_runner.instances import Instance, PredictResult


def geojson(results: Sequence[PredictResult], tolerance_px: float = 0.0) -> dict[str, Any]:
    """One feature an instance: its number as `id`, a MultiPolygon with holes, and its facts as properties.

    Coordinates are px of the image, with y pointing down, not degrees; who has a georeference transforms
    them. As numbers they follow the RFC: exteriors anticlockwise, holes clockwise. The geometry of an
    instance without px is null.

    Args:
        results: of the prompts of one image.
        tolerance_px: as in `outputs.polygons.polygons`.
    """
    found = [(result.prompt, instance) for result in results for instance in result.instances]
    return {
        "type": "FeatureCollection",
        "features": [
            _feature(number, prompt, instance, tolerance_px)
            for number, (prompt, instance) in enumerate(found, 1)
        ],
    }


def _feature(number: int, prompt: str, instance: Instance, tolerance_px: float) -> dict[str, Any]:
    parts = [[_closed(ring) for ring in part] for part in polygons(instance.mask, tolerance_px)]
    return {
        "type": "Feature",
        "id": number,
        "geometry": {"type": "MultiPolygon", "coordinates": parts} if parts else None,
        "properties": {
            "label": prompt,
            "score": instance.score,
            "box": list(instance.box),
            "area_px": instance.area_px,
        },
    }


def _closed(ring: PolygonRing) -> list[list[int]]:
    return [list(point) for point in (*ring, ring[0])]
