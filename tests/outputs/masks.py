"""Masks for the tests of outputs/."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sam3_runner.instances import Instance, Mask, MaskCrop, PredictResult


def mask_of(picture: str) -> Mask:
    """A mask drawn as text: # is set, every other character is not."""
    return np.array([[letter == "#" for letter in row] for row in picture.split()])


def crop_of(mask: Mask) -> MaskCrop:
    """The bounding rectangle of the px of a whole image's mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return MaskCrop(0, 0, 0, 0, b"")
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    packed = np.packbits(mask[top:bottom], axis=1)[:, left // 8 : -(-right // 8)].copy()
    packed[:, 0] &= 0xFF >> left % 8
    packed[:, -1] &= 0xFF << -right % 8 & 0xFF
    return MaskCrop(left, top, right - left, bottom - top, packed.tobytes())


def instance_of(mask: Mask, score: float = 0.9, query: int = 0) -> Instance:
    """An instance; its box is not that of the mask, as the decoder's is not."""
    return Instance(score, (0.25, 0.5, 3.75, 4.5), int(mask.sum()), query, crop_of(mask))


def result_of(*masks: Mask, prompt: str = "cat", scores: list[float] | None = None) -> PredictResult:
    """The masks of a prompt, which have the image's size; the scores are 0.9, 0.8 and so on."""
    scores = [0.9 - 0.1 * number for number in range(len(masks))] if scores is None else scores
    found = [
        instance_of(mask, score, query) for query, (mask, score) in enumerate(zip(masks, scores, strict=True))
    ]
    height, width = masks[0].shape
    return PredictResult(prompt, 0.9, width, height, found)


def whole(mask: MaskCrop, shape: tuple[int, int]) -> Mask:
    """The mask at the image's size."""
    array = np.zeros(shape, np.bool_)
    array[mask.window] = mask.array() if mask.width else False
    return array


@st.composite
def drawn_masks(draw: st.DrawFn, max_side: int = 12) -> Mask:
    """Masks of any form: noise, blocks of px, or either with a margin."""
    shape = draw(st.integers(1, max_side)), draw(st.integers(1, max_side))
    cells: Mask = draw(arrays(np.bool_, shape))
    enlarged = cells.repeat(draw(st.integers(1, 3)), axis=0).repeat(draw(st.integers(1, 3)), axis=1)
    margins = [(draw(st.integers(0, 9)), draw(st.integers(0, 9))) for _ in range(2)]
    return np.pad(enlarged, margins)
