"""All instances of an answer as one document in COCO's annotation format."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

from outputs.coco_rle import coco_rle

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sam3_runner.instances import PredictResult

IMAGE_ID = 1


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
    prompts = dict.fromkeys(result.prompt for result in results)
    category_ids = {prompt: number for number, prompt in enumerate(prompts, 1)}
    found = chain.from_iterable(
        ((category_ids[result.prompt], instance) for instance in result.instances) for result in results
    )
    return {
        "info": {"description": "Instances found by SAM 3"},
        "images": [{"id": IMAGE_ID, "file_name": file_name, "width": width, "height": height}],
        "categories": [
            {"id": number, "name": prompt, "supercategory": ""} for prompt, number in category_ids.items()
        ],
        "annotations": [
            {
                "id": number,
                "image_id": IMAGE_ID,
                "category_id": category_id,
                "bbox": [instance.mask.left, instance.mask.top, instance.mask.width, instance.mask.height],
                "area": instance.area_px,
                "iscrowd": 0,
                "segmentation": coco_rle(instance.mask, width, height),
                "score": instance.score,
            }
            for number, (category_id, instance) in enumerate(found, 1)
        ],
    }
