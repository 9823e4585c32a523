"""Scenes with their ground truth, drawn like those of the demo checkpoint's training."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from training.scenes import COLOURS, SHAPES, draw_scenes

if TYPE_CHECKING:
    import numpy.typing as npt

    Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Thing:
    """One object of a scene: its visible part, and whether enough of it is visible to be found."""

    colour: str
    shape: str
    mask: Mask
    counted: bool


@dataclass(frozen=True, slots=True)
class Scene:
    """An image and its objects."""

    image: Image.Image
    things: tuple[Thing, ...]

    def named(self, prompt: str) -> list[Thing]:
        """The things that match "red circle", "circle" or "red shape"."""
        words = set(prompt.split()) - {"shape"}
        return [thing for thing in self.things if words <= {thing.colour, thing.shape}]

    @property
    def names(self) -> list[str]:
        """The "colour shape" of every thing that is visible enough to be found, without duplicates."""
        return list(dict.fromkeys(f"{thing.colour} {thing.shape}" for thing in self.things if thing.counted))

    @property
    def absent(self) -> str:
        """A "colour shape" whose colour, and if possible shape, is not in the image."""
        colours = [name for name in COLOURS if all(thing.colour != name for thing in self.things)]
        shapes = [name for name in SHAPES if all(thing.shape != name for thing in self.things)]
        return f"{colours[0]} {(shapes or SHAPES)[0]}"


@cache
def scene(seed: int, width: int = 336, height: int = 336) -> Scene:
    """The scene of one seed; checks that it has at least one counted thing."""
    drawn, pictures = draw_scenes(1, seed, width=width, height=height)
    pixels = pictures.pixels[0].round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    owner = pictures.owner[0].numpy()
    things = tuple(
        Thing(
            colour=list(COLOURS)[int(drawn.colour[0, index])],
            shape=SHAPES[int(drawn.shape[0, index])],
            mask=owner == index + 1,
            counted=bool(pictures.counted[0, index]),
        )
        for index in range(drawn.exists.shape[1])
        if pictures.visible[0, index]
    )
    assert any(thing.counted for thing in things), f"seed {seed} draws no counted thing"
    return Scene(Image.fromarray(np.ascontiguousarray(pixels)), things)


def iou(one: Mask, other: Mask) -> float:
    """Intersection over union of two masks."""
    union = int((one | other).sum())
    return float((one & other).sum()) / union if union else 0.0
