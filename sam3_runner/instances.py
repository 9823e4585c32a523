"""The values of a prediction. They hold no tensor, so that they can be pickled to another process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]

PackedMask = npt.NDArray[np.uint8]
"""Bits of a mask, (height, bytes): 8 px per byte, the first px in the highest bit; rows have whole bytes."""

SCORE_THRESHOLD = 0.5
"""Default: instances with a higher score are kept (`confidence_threshold` of the official Sam3Processor)."""


@dataclass(frozen=True, slots=True)
class Window:
    """A part of an image, in px of the image as a viewer shows it."""

    left: int
    top: int
    width: int
    height: int

    @property
    def right(self) -> int:
        """Its first column outside."""
        return self.left + self.width

    @property
    def bottom(self) -> int:
        """Its first row outside."""
        return self.top + self.height


@dataclass(frozen=True, slots=True)
class MaskCrop:
    """A binary mask, stored as the bits of its bounding rectangle.

    Attributes:
        left, top: corner of the rectangle in px of the image.
        width, height: its size in px; both 0 for an empty mask.
        bits: its rows in order, each in whole bytes: 8 px per byte, the first px in the highest bit. A byte
            holds the px 8n to 8n + 7 of the image's row, so that masks are united byte by byte. The px left
            and right of the rectangle are 0.
    """

    left: int
    top: int
    width: int
    height: int
    bits: bytes

    def packed(self) -> PackedMask:
        """The rows of `bits`, (height, bytes)."""
        columns = self.packed_window[1]
        return np.frombuffer(self.bits, dtype=np.uint8).reshape(self.height, columns.stop - columns.start)

    def array(self) -> Mask:
        """The rectangle, (height, width) bool."""
        first = self.left % 8
        return np.unpackbits(self.packed(), axis=1)[:, first : first + self.width].view(np.bool_)

    @property
    def window(self) -> tuple[slice, slice]:
        """Position of the rectangle in the image: rows, columns."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)

    @property
    def packed_window(self) -> tuple[slice, slice]:
        """Position of `packed` in a packed mask of the image: rows, bytes."""
        rows, columns = self.window
        return rows, slice(columns.start // 8, -(-columns.stop // 8))


@dataclass(frozen=True, slots=True)
class FoundInstance:
    """One object that the model found.

    Attributes:
        score: sigmoid(logit) x sigmoid(presence logit), above the threshold.
        box: x0, y0, x1, y1 in px of the image, clamped to it, not rounded; the decoder's box, not that of
            the mask.
        area_px: pixels of the mask.
        query: index of the decoder's query that found it, from 0; identifies the instance across runs.
    """

    score: float
    box: tuple[float, float, float, float]
    area_px: int
    query: int


@dataclass(frozen=True, slots=True)
class Instance(FoundInstance):
    """A found object with its mask, at the image's size."""

    mask: MaskCrop


@dataclass(frozen=True, slots=True)
class PromptResult:
    """What was found for one prompt in one image.

    Attributes:
        prompt: the text, unchanged; "visual" for boxes alone.
        presence: probability that the concept is in the image at all.
        image_width, image_height: px.
        instances: best score first.
    """

    prompt: str
    presence: float
    image_width: int
    image_height: int
    instances: Sequence[FoundInstance]

    @property
    def confidence(self) -> float:
        """The highest score, 0.0 when nothing was found."""
        return max((instance.score for instance in self.instances), default=0.0)


@dataclass(frozen=True, slots=True)
class PredictResult(PromptResult):
    """What was found, with the mask of each instance."""

    instances: list[Instance] = field(default_factory=list)

    def mask_array(self) -> Mask:
        """The union of the instances, (image_height, image_width) bool."""
        return union_mask([self])


@dataclass(frozen=True, slots=True)
class UnionResult(PromptResult):
    """What was found, with the union of the instances' masks in place of each mask.

    Attributes:
        union: (image_height, image_width / 8 rounded up) bits; None where there are no instances.
    """

    union: PackedMask | None


Results = Sequence[PredictResult | UnionResult]
"""One result a prompt, for a caller who wants each mask, or for one who wants their union."""


def union_mask(results: Sequence[PredictResult]) -> Mask:
    """The union of all instances of `results`, which share one image, (height, width) bool."""
    return np.unpackbits(packed_union(results), axis=1, count=results[0].image_width).view(np.bool_)


def packed_union(results: Sequence[PredictResult | UnionResult]) -> PackedMask:
    """`union_mask` as bits, (height, width / 8 rounded up) uint8; the px right of the image are 0."""
    union = np.zeros((results[0].image_height, -(-results[0].image_width // 8)), dtype=np.uint8)
    for result in results:
        if isinstance(result, PredictResult):
            for instance in result.instances:
                union[instance.mask.packed_window] |= instance.mask.packed()
        elif result.union is not None:
            union |= result.union
    return union
