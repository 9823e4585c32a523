"""CVAT's detection function: every instance of each label, as masks or polygons.

    cvat-cli task auto-annotate 7 --function-file adapters/cvat/detection.py -p labels=str:"car,person"

SAM3_URL and SAM3_API_KEY say which server answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import cvat_sdk.auto_annotation as cvataa

from adapters.cvat.errors import shown_by_cvat
from adapters.cvat.shapes import mask_points, polygon_points
from sam3_client import Client

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cvat_sdk import models
    from PIL.Image import Image

    from sam3_client import Instance


class DetectionFunction:
    """Searches for labels by text.

    Args:
        client: of the SAM 3 server.
        prompts: the text of each label's name.
        tolerance_px: of polygons, which are made where CVAT asks for them in place of masks.
        score_threshold: where CVAT sends none; None: the server's default.
    """

    def __init__(
        self,
        client: Client,
        prompts: dict[str, str],
        tolerance_px: float = 1.0,
        score_threshold: float | None = None,
    ) -> None:
        self._client = client
        self._prompts = prompts
        self._tolerance_px = tolerance_px
        self._score_threshold = score_threshold
        self.spec = cvataa.DetectionFunctionSpec(
            labels=[cvataa.label_spec(name, number, type="mask") for number, name in enumerate(prompts)]
        )

    def detect(
        self, context: cvataa.DetectionFunctionContext, image: Image
    ) -> list[models.LabeledShapeRequest]:
        """Every instance of each label in one frame.

        Raises:
            BadFunctionError: the server refused, or is away; the message says what to do.
        """
        threshold = self._score_threshold if context.conf_threshold is None else context.conf_threshold
        texts = list(dict.fromkeys(self._prompts.values()))
        with shown_by_cvat():
            result = self._client.segment(image.convert("RGB"), texts, score_threshold=threshold)
        return [
            shape
            for number, text in enumerate(self._prompts.values())
            for instance in result.instances
            if instance.label == text and instance.area > 0
            for shape in self._shapes(number, instance, as_polygons=context.conv_mask_to_poly)
        ]

    def _shapes(
        self, number: int, instance: Instance, *, as_polygons: bool
    ) -> Iterator[models.LabeledShapeRequest]:
        if as_polygons:
            for points in polygon_points(instance, self._tolerance_px):
                yield cvataa.polygon(number, points, score=instance.score)
        else:
            yield cvataa.mask(number, mask_points(instance), score=instance.score)


def create(labels: str, tolerance_px: float = 1.0, score_threshold: float | None = None) -> DetectionFunction:
    """What `cvat-cli` calls with the values of `-p`.

    Args:
        labels: names of the task's labels, separated by commas. `name=text` searches for another text.
        tolerance_px: of polygons: points are left out that are about so far from the line that remains.
        score_threshold: where `--conf-threshold` is left out; None: the server's default.

    Raises:
        ValueError: `labels` names none, or one twice.
        BadFunctionError: SAM3_URL is no URL.
    """
    with shown_by_cvat():
        client = Client()
    return DetectionFunction(client, read_labels(labels), tolerance_px, score_threshold)


def read_labels(labels: str) -> dict[str, str]:
    """The text of each label of `car,sign=traffic sign`.

    Raises:
        ValueError: there is none, or one twice.
    """
    pairs = [entry.partition("=") for entry in labels.split(",") if entry.strip()]
    prompts = {name.strip(): (text.strip() or name.strip()) for name, _, text in pairs}
    if not all(prompts) or len(prompts) != len(pairs) or not prompts:
        raise ValueError(
            f'labels is "{labels}"; name each label of the task once, separated by commas, '
            "such as car,sign=traffic sign"
        )
    return prompts
