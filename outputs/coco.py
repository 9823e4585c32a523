"""All instances of an answer as one document in COCO's annotation format."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

from outputs.coco_rle import coco_rle

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from outputs.coco_rle import CocoRle
    from sam3_runner.instances import PredictResult

IMAGE_ID = 1
INFO = {"description": "Instances found by SAM 3"}


def coco_document(results: Sequence[PredictResult], *, file_name: str) -> dict[str, Any]:
    """The document, ready for JSON: one image, one category for each distinct prompt, all instances.

    An annotation's `id` is the number of the instance in the answer, from 1. Its `bbox` is x, y, width and
    height of the mask's tight rectangle, as in COCO's own files, not the decoder's box. Its `segmentation` is
    compressed RLE: COCO's polygons have no holes. `score` is that of COCO's results format.

    Args:
        results: of the prompts of one image, at least one.
        file_name: of the image, as tools will look for it.

    Raises:
        ValueError: there are no results.
    """
    if not results:
        raise ValueError("results is empty; give those of at least one prompt")
    width, height = results[0].image_width, results[0].image_height
    categories = coco_categories(result.prompt for result in results)
    category_ids = {category["name"]: category["id"] for category in categories}
    found = chain.from_iterable(
        ((category_ids[result.prompt], instance) for instance in result.instances) for result in results
    )
    return {
        "info": dict(INFO),
        "images": [{"id": IMAGE_ID, "file_name": file_name, "width": width, "height": height}],
        "categories": categories,
        "annotations": [
            coco_annotation(
                number,
                image_id=IMAGE_ID,
                category_id=category_id,
                box=(instance.mask.left, instance.mask.top, instance.mask.width, instance.mask.height),
                area_px=instance.area_px,
                rle=coco_rle(instance.mask, width, height),
                score=instance.score,
            )
            for number, (category_id, instance) in enumerate(found, 1)
        ],
    }


def coco_categories(prompts: Iterable[str]) -> list[dict[str, Any]]:
    """One category for each distinct prompt, in their order, numbered from 1."""
    return [
        {"id": number, "name": prompt, "supercategory": ""}
        for number, prompt in enumerate(dict.fromkeys(prompts), 1)
    ]


def coco_annotation(
    number: int,
    *,
    image_id: int,
    category_id: int,
    box: Sequence[int],
    area_px: int,
    rle: CocoRle,
    score: float,
) -> dict[str, Any]:
    """One instance, as `coco_document` has it.

    Args:
        number: the annotation's id, from 1.
        image_id: of its picture.
        category_id: of its prompt.
        box: x, y, width and height of the mask's tight rectangle in px; all 0 for a mask without px.
        area_px: of the mask.
        rle: the mask.
        score: of the instance.
    """
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": list(box),
        "area": area_px,
        "iscrowd": 0,
        "segmentation": rle,
        "score": score,
    }
