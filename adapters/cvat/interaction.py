"""CVAT's interaction function: a box drawn round an object gives its mask.

    cvat-cli function create-native "SAM 3" --function-file adapters/cvat/interaction.py

SAM3_URL and SAM3_API_KEY say which server answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import cvat_sdk.auto_annotation as cvataa
import numpy as np
from cvat_sdk import models

from adapters.cvat.errors import shown_by_cvat
from adapters.cvat.shapes import mask_points
from sam3_client import Client

if TYPE_CHECKING:
    from PIL.Image import Image

    from sam3_client import Instance
    from sam3_runner.instances import Mask


class InteractionFunction:
    """Finds what is in a box.

    SAM 3 takes the box as an example, and finds it and all that is like it. Points choose among what was
    found: each instance that covers a negative point is left out, and with positive points, each that covers
    none.

    Args:
        client: of the SAM 3 server.
        similar: False: only the instance that fits the box best. True: all that are like it.
    """

    def __init__(self, client: Client, *, similar: bool = False) -> None:
        self._client = client
        self._similar = similar
        self.spec = cvataa.InteractionFunctionSpec(min_pos_points=0, min_neg_points=0, min_bounding_boxes=1)

    def detect(
        self,
        context: cvataa.InteractionFunctionContext,  # noqa: ARG002 - part of CVAT's interface
        pp_image: Image,
        prompts: cvataa.InteractionPrompts,
    ) -> list[cvataa.InteractionResultShape]:
        """The masks of what the prompts describe, with their scores; [] where nothing was found.

        Raises:
            BadFunctionError: there is no box, or the server refused or is away; the message says what to do.
        """
        if prompts.bounding_box is None:
            raise cvataa.BadFunctionError("SAM 3 needs a box round an example; draw one before the points")
        (x0, y0), (x1, y1) = prompts.bounding_box
        box = (x0, y0, x1, y1)
        with shown_by_cvat():
            result = self._client.segment(pp_image.convert("RGB"), boxes=[box])
        found = [each for each in result.instances if each.area > 0 and _is_chosen(each.mask, prompts)]
        if not self._similar:
            found = sorted(found, key=lambda each: _box_iou(each.box, box), reverse=True)[:1]
        return [_shape(each) for each in found]


def create(*, similar: bool = False) -> InteractionFunction:
    """What `cvat-cli` calls with the values of `-p`.

    Args:
        similar: False: only the instance that fits the box best. True: all that are like it.

    Raises:
        BadFunctionError: SAM3_URL is no URL.
    """
    with shown_by_cvat():
        client = Client()
    return InteractionFunction(client, similar=similar)


def _is_chosen(mask: Mask, prompts: cvataa.InteractionPrompts) -> bool:
    is_wanted = not prompts.pos_points or any(_covers(mask, point) for point in prompts.pos_points)
    return is_wanted and not any(_covers(mask, point) for point in prompts.neg_points)


def _covers(mask: Mask, point: tuple[float, float]) -> bool:
    height, width = mask.shape
    x, y = int(point[0]), int(point[1])
    return 0 <= x < width and 0 <= y < height and bool(mask[y, x])


def _box_iou(one: np.ndarray | tuple[float, ...], other: tuple[float, float, float, float]) -> float:
    a, b = np.asarray(one, np.float64), np.asarray(other, np.float64)
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    shared = float(np.prod(np.clip(sides, 0, None)))
    return shared / float(np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - shared)


def _shape(instance: Instance) -> cvataa.InteractionResultShape:
    confidence = models.AttributeValRequest(
        spec_id=int(cvataa.InteractionResultAttributes.CONFIDENCE), value=f"{instance.score:.4f}"
    )
    return cvataa.InteractionResultShape(type="mask", points=mask_points(instance), attributes=[confidence])
