"""What was found in one image, and its forms: arrays, COCO, supervision, a drawn overlay."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from sam3_client import coco_rle
from sam3_client.overlay import draw_overlay

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    import numpy.typing as npt
    import supervision
    from PIL import Image

    from sam3_client.coco_rle import CocoRle, Mask
    from sam3_client.pictures import Picture

MAX_NUMBER = 2**16 - 1
"""Of an instance in a label map."""
NOTEBOOK_SIDE_PX = 1600
"""The longer side of a picture that a notebook stores."""


@dataclass(frozen=True)
class Instance:
    """One object that was found.

    Attributes:
        label: the prompt that found it; "visual" where boxes alone did.
        score: above the threshold, to 1.
        box: x0, y0, x1, y1 in px of the image.
        coco_rle: its mask as COCO's compressed run lengths.
    """

    label: str
    score: float
    box: tuple[float, float, float, float]
    coco_rle: CocoRle

    @cached_property
    def area(self) -> int:
        """Px of its mask."""
        return coco_rle.area_px(self.coco_rle)

    @property
    def mask(self) -> Mask:
        """(height, width) bool, of the image's size; decoded at each access."""
        return coco_rle.decode(self.coco_rle)


class Result:
    """What the prompts found in one image: the prompts in their order, of each the best score first.

    Args:
        picture: the image.
        width, height: of the image in px, as a viewer shows it.
        prompts: each once.
        presence: of each prompt, the probability that its concept is in the image at all.
        instances: of this image.
        model: checkpoint, sha256 of its file, version of the server; None where the server did not say it.
        timings_ms: by stage of the server, summed over the prompts.
    """

    def __init__(
        self,
        picture: Picture,
        *,
        width: int,
        height: int,
        prompts: Sequence[str],
        presence: dict[str, float],
        instances: Sequence[Instance],
        model: dict[str, str] | None = None,
        timings_ms: dict[str, float] | None = None,
    ) -> None:
        self._picture = picture
        self.width = width
        self.height = height
        self.prompts = list(prompts)
        self.presence = presence
        self.instances = list(instances)
        self.model = model
        self.timings_ms = timings_ms or {}

    def __repr__(self) -> str:
        counts = {prompt: self.labels.count(prompt) for prompt in self.prompts}
        found = ", ".join(f"{count} {prompt!r}" for prompt, count in counts.items())
        return f"<Result {self.width} x {self.height}: {found}>"

    @property
    def image(self) -> Image.Image:
        """RGB, as a viewer shows it. Raises `BadImage` where Pillow cannot decode the file."""
        return self._picture.image

    @property
    def masks(self) -> Mask:
        """(N, height, width) bool; decoded at each access."""
        masks = np.zeros((len(self.instances), self.height, self.width), np.bool_)
        for mask, instance in zip(masks, self.instances, strict=True):
            mask[:] = instance.mask
        return masks

    @property
    def boxes(self) -> npt.NDArray[np.float32]:
        """(N, 4): x0, y0, x1, y1 in px of the image."""
        return np.array([each.box for each in self.instances], np.float32).reshape(-1, 4)

    @property
    def scores(self) -> npt.NDArray[np.float32]:
        """(N,)."""
        return np.array([each.score for each in self.instances], np.float32)

    @property
    def labels(self) -> list[str]:
        """Of each instance the prompt that found it."""
        return [each.label for each in self.instances]

    def union(self) -> Mask:
        """(height, width) bool: every px of any instance."""
        union = np.zeros((self.height, self.width), np.bool_)
        for each in self.instances:
            union |= each.mask
        return union

    def label_map(self) -> npt.NDArray[np.uint16]:
        """(height, width): of each px the position of its instance + 1, or 0; higher score on top.

        Raises:
            ValueError: there are more than 65,535 instances.
        """
        if len(self.instances) > MAX_NUMBER:
            raise ValueError(f"a label map numbers at most {MAX_NUMBER} instances; filter the result first")
        numbers = np.zeros((self.height, self.width), np.uint16)
        for index in self._bottom_to_top():
            numbers[self.instances[index].mask] = index + 1
        return numbers

    def filter(self, *, min_score: float = 0.0, labels: Iterable[str] | None = None) -> Result:
        """The same with fewer instances: of these labels (None: all), with scores of `min_score` or more."""
        wanted = None if labels is None else {labels} if isinstance(labels, str) else set(labels)
        kept = [
            each
            for each in self.instances
            if each.score >= min_score and (wanted is None or each.label in wanted)
        ]
        return Result(
            self._picture,
            width=self.width,
            height=self.height,
            prompts=self.prompts,
            presence=self.presence,
            instances=kept,
            model=self.model,
            timings_ms=self.timings_ms,
        )

    def to_coco(self, file_name: str = "", image_id: int = 1) -> dict[str, Any]:
        """A document in COCO's annotation format, ready for JSON; each prompt is a category.

        An annotation's `id` is the position of its instance + 1; `bbox` is x, y, width and height of the
        mask's tight rectangle; `segmentation` is compressed RLE; `score` is that of COCO's results.
        """
        categories = {prompt: number for number, prompt in enumerate(self.prompts, 1)}
        return {
            "info": {"description": "Instances found by SAM 3"},
            "images": [{"id": image_id, "file_name": file_name, "width": self.width, "height": self.height}],
            "categories": [
                {"id": number, "name": prompt, "supercategory": ""} for prompt, number in categories.items()
            ],
            "annotations": [
                {
                    "id": number,
                    "image_id": image_id,
                    "category_id": categories[each.label],
                    "bbox": list(coco_rle.bounds(each.coco_rle)),
                    "area": each.area,
                    "iscrowd": 0,
                    "segmentation": each.coco_rle,
                    "score": each.score,
                }
                for number, each in enumerate(self.instances, 1)
            ],
        }

    def to_supervision(self) -> supervision.Detections:
        """`supervision.Detections`: xyxy, mask, confidence, class_id (position in `prompts`), class_name.

        Raises:
            ImportError: supervision is not installed; `pip install "sam3-client[supervision]"`.
        """
        try:
            from supervision import Detections  # noqa: PLC0415 - an extra, and slow
        except ImportError as error:
            raise ImportError('supervision is missing: pip install "sam3-client[supervision]"') from error
        return Detections(
            xyxy=self.boxes,
            mask=self.masks,
            confidence=self.scores,
            class_id=np.array([self.prompts.index(label) for label in self.labels], np.int64),
            data={"class_name": np.array(self.labels, np.str_)},
        )

    def overlay(self, max_side_px: int | None = None) -> Image.Image:
        """The image with each instance's tint, outline, box, and a label with its score.

        Several prompts have a colour each; the instances of a single one have one each. The font has ASCII:
        a prompt with other characters is written as "prompt 2".

        Args:
            max_side_px: of the drawn picture; None: the image's own size.
        """
        order = [(index, self.instances[index]) for index in self._bottom_to_top()]
        return draw_overlay(self.image, order, self.prompts, max_side_px)

    def save_overlay(self, path: str | Path) -> None:
        """Write `overlay()` in the format that the path's ending names, as in "found.jpg"."""
        self.overlay().save(path)

    def show(self) -> None:
        """Show the overlay: in the notebook's cell, else in a window."""
        ipython = sys.modules.get("IPython")  # a notebook has imported it
        if ipython is not None and ipython.get_ipython() is not None:
            ipython.display.display(self)
        else:
            self.overlay().show()

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.overlay(NOTEBOOK_SIDE_PX).save(file, "PNG")
        return file.getvalue()

    def _bottom_to_top(self) -> list[int]:
        """Positions of the instances, in the order in which they are painted over one another."""
        return sorted(range(len(self.instances)), key=lambda index: (self.instances[index].score, -index))
