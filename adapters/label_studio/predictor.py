"""Predictions for the tasks of a project."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from adapters.label_studio.errors import AdapterError, ImageUnavailable, OutOfTime, UnsupportedPrompt
from adapters.label_studio.rectangles import exemplars
from adapters.predict_results import predict_result
from outputs.converters.label_studio import label_studio_prediction
from sam3_client import Sam3Error

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from adapters.label_studio.images import ImageSource
    from adapters.label_studio.interface import Interface, Label, MaskTag
    from adapters.label_studio.rectangles import Box
    from sam3_client import Client
    from sam3_runner.instances import PredictResult

logger = logging.getLogger(__name__)

VISUAL = "visual"
"""The prompt of instances that were found by boxes alone."""


@dataclass(frozen=True, slots=True)
class Options:
    """How predictions are made.

    Attributes:
        score_threshold: instances with a higher score are returned; None: the server's default.
        tolerance_px: of polygons, as in `outputs.polygons.polygons`.
        time_limit_s: after which no further task is begun: Label Studio gives up a request after
            ML_TIMEOUT_PREDICT, 100 s.
    """

    score_threshold: float | None = None
    tolerance_px: float = 1.0
    time_limit_s: float = 60.0


class Predictor:
    """Makes predictions by a SAM 3 server. Threads may share it.

    Args:
        client: of the server.
        info_client: of the same server, with a short timeout and no second try: Label Studio waits three
            seconds for the version.
        images: where the images of tasks are.
        options: how predictions are made.
    """

    def __init__(self, client: Client, info_client: Client, images: ImageSource, options: Options) -> None:
        self._client = client
        self._info_client = info_client
        self._images = images
        self._options = options

    def model_version(self) -> str:
        """What Label Studio stores with each prediction: it asks again when the weights change.

        Raises:
            Sam3Error: the server does not answer.
        """
        info = self._info_client.model_info()
        return f"SAM 3 {info['checkpoint']} {info['weights_sha256'][:8]}"

    def predict(
        self,
        tasks: Sequence[Mapping[str, Any]],
        interface: Interface,
        drawn: Sequence[Mapping[str, Any]] = (),
    ) -> list[dict[str, Any]]:
        """One prediction a task, or `{"error": sentence}`, which Label Studio logs and does not store.

        Args:
            tasks: of one project, with `id` and `data`.
            interface: of the project.
            drawn: regions that the annotator drew; empty: all labels are searched for by their text.

        Raises:
            AdapterError, Sam3Error: the first error, where no task has a prediction.
        """
        until_s = time.monotonic() + self._options.time_limit_s
        version = self.model_version()
        answers: list[dict[str, Any]] = []
        first_error: AdapterError | Sam3Error | None = None
        for task in tasks:
            try:
                if answers and time.monotonic() > until_s:
                    raise OutOfTime(
                        f"No time was left for this task ({self._options.time_limit_s:.0f} s a request); "
                        "retrieve the predictions of the remaining tasks again."
                    )
                answers.append(self._predict_one(task, interface, drawn, version))
            except (AdapterError, Sam3Error) as error:
                logger.warning("task %s: %s", task.get("id"), error)
                first_error = first_error or error
                answers.append({"error": str(error)})
        if first_error is not None and all("error" in answer for answer in answers):
            raise first_error
        return answers

    def _predict_one(
        self,
        task: Mapping[str, Any],
        interface: Interface,
        drawn: Sequence[Mapping[str, Any]],
        version: str,
    ) -> dict[str, Any]:
        address = task.get("data", {}).get(interface.image_key)
        if not isinstance(address, str) or not address:
            raise ImageUnavailable(
                f'Task {task.get("id")} has no image in "{interface.image_key}"; check the task\'s data.'
            )
        image = self._images.fetch(address, task.get("id"))
        found = self._by_rectangles(image, interface, drawn) if drawn else self._by_text(image, interface)
        return _prediction(found, version, self._options.tolerance_px)

    def _by_text(self, image: bytes, interface: Interface) -> list[tuple[MaskTag, PredictResult]]:
        wanted = [(tag, label) for tag in interface.tags for label in tag.labels if label.prompt]
        if not wanted:
            return []
        prompts = list(dict.fromkeys(label.prompt for _, label in wanted))
        result = self._client.segment(image, prompts, score_threshold=self._options.score_threshold)
        return [(tag, predict_result(result, label.prompt, label.name)) for tag, label in wanted]

    def _by_rectangles(
        self, image: bytes, interface: Interface, drawn: Sequence[Mapping[str, Any]]
    ) -> list[tuple[MaskTag, PredictResult]]:
        return [
            (tag, self._like(image, label, boxes))
            for tag, label, boxes in _labelled(exemplars(drawn), interface)
        ]

    def _like(self, image: bytes, label: Label, boxes: list[Box]) -> PredictResult:
        prompts = [label.prompt] if label.prompt else []
        result = self._client.segment(
            image, prompts, boxes=boxes, score_threshold=self._options.score_threshold
        )
        return predict_result(result, label.prompt or VISUAL, label.name)


def _labelled(
    boxes: Mapping[str, list[Box]], interface: Interface
) -> Iterable[tuple[MaskTag, Label, list[Box]]]:
    for name, drawn in boxes.items():
        found = interface.find(name)
        if found is None:
            raise UnsupportedPrompt(
                f'No PolygonLabels or BrushLabels tag has the label "{name}" of the rectangle; add it there.'
            )
        yield *found, drawn


def _prediction(
    found: Sequence[tuple[MaskTag, PredictResult]], version: str, tolerance_px: float
) -> dict[str, Any]:
    regions: list[dict[str, Any]] = []
    for tag, result in found:
        made = label_studio_prediction(
            [result],
            tag.form,
            from_name=tag.name,
            to_name=tag.to_name,
            model_version=version,
            tolerance_px=tolerance_px,
        )
        # The page adds the regions of an interactive answer by their ids.
        regions += [region | {"id": uuid4().hex[:10]} for region in made["result"]]
    score = max((result.confidence for _, result in found), default=0.0)
    return {"model_version": version, "score": score, "result": regions}
