"""SAM 3 as a model that FiftyOne applies to the samples of a dataset."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import fiftyone
import numpy as np
from fiftyone.core.models import Model, SamplesMixin
from fiftyone.core.sample import Sample, SampleView

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from sam3_client import Client, Instance, Result

    Pixels = npt.NDArray[np.uint8]

MAX_CONCURRENT = 8
"""Requests in flight; the server makes batches of those that it has at the same time."""


@dataclass
class Sam3Config:
    """What FiftyOne may change while it applies the model.

    Attributes:
        confidence_thresh: FiftyOne's name of the score threshold; None leaves it to the server.
    """

    confidence_thresh: float | None = None


class Sam3Model(SamplesMixin, Model):  # type: ignore[misc] # FiftyOne has no types
    """Finds every instance of some concepts in images.

    The file of a sample is sent as it is, so that the server decodes it as for every other caller; an array
    without one is sent as PNG. `apply_model(batch_size=8)` has so many images in flight.

    Args:
        client: of the server; threads share it.
        prompts: each becomes the label of what it finds.
        score_threshold: 0 to 1; `apply_model(confidence_thresh=...)` overrides it.
    """

    def __init__(
        self, client: Client, prompts: str | Sequence[str], *, score_threshold: float | None = None
    ) -> None:
        super().__init__()
        self.config = Sam3Config(score_threshold)
        self._client = client
        self._prompts = prompts

    @property
    def media_type(self) -> str:
        """What FiftyOne passes to `predict`."""
        return "image"

    @property
    def transforms(self) -> None:
        """The server resizes images."""
        return

    @property
    def preprocess(self) -> bool:
        """There are no transforms to apply."""
        return False

    @property
    def ragged_batches(self) -> bool:
        """Images of different sizes may be in one batch."""
        return False

    def predict(self, arg: Pixels, sample: Any = None) -> fiftyone.Detections:
        """What is found in one image.

        Args:
            arg: (height, width, 3) uint8, RGB.
            sample: the image's; its file is sent instead of `arg`.

        Raises:
            sam3_client.Sam3Error: with `apply_model(skip_failures=True)` FiftyOne logs it and goes on.
        """
        image = sample.filepath if isinstance(sample, Sample | SampleView) else arg
        result = self._client.segment(image, self._prompts, score_threshold=self.config.confidence_thresh)
        return detections(result)

    def predict_all(
        self, args: Sequence[Pixels], samples: Sequence[Any] | None = None
    ) -> list[fiftyone.Detections]:
        """`predict` of several images at the same time, in their order."""
        with ThreadPoolExecutor(MAX_CONCURRENT) as pool:
            return list(pool.map(self.predict, args, samples or [None] * len(args)))


def detections(result: Result) -> fiftyone.Detections:
    """FiftyOne's form of a result, the best score of each prompt first."""
    found = [_detection(each, result.width, result.height) for each in result.instances]
    return fiftyone.Detections(detections=found)


def _detection(instance: Instance, width: int, height: int) -> fiftyone.Detection:
    """FiftyOne stretches a mask over its box, so the box is the mask's own rectangle, to the px."""
    mask = instance.mask
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows):
        left, top, right, bottom = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        crop = mask[top:bottom, left:right]
    else:
        (left, top, right, bottom), crop = instance.box, None
    box = (left / width, top / height, (right - left) / width, (bottom - top) / height)
    return fiftyone.Detection(
        label=instance.label,
        confidence=instance.score,
        bounding_box=[float(side) for side in box],
        mask=crop,
    )
