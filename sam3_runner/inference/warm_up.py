"""Pictures and prompts of the passes before a server is ready."""

from __future__ import annotations

import numpy as np

from sam3_runner.images.decoded import LocalImage
from sam3_runner.prompts import ConceptPrompt

WARM_UP_PROMPTS = (ConceptPrompt("warm up"), ConceptPrompt("twice"))


def warm_up_squares(count: int, side_px: int) -> list[LocalImage]:
    """`count` squares of the model's side: colours that change slowly, black, white, noise, and so on.

    They differ, so that a precision that overflows on some pictures is noticed before the first request.
    """
    across = np.tile(np.linspace(0, 255, side_px, dtype=np.uint8), (side_px, 1))
    shape = (side_px, side_px, 3)
    pictures = (
        np.stack([across, across.T, across[:, ::-1]], axis=2),
        np.zeros(shape, dtype=np.uint8),
        np.full(shape, 255, dtype=np.uint8),
        np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8),
    )
    return [
        LocalImage(pictures[index % len(pictures)], width=side_px, height=side_px) for index in range(count)
    ]
