"""The images of the benchmarks: drawn scenes as JPEGs, with their true masks."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from training.scenes import COLOURS, SHAPES, draw_scenes

if TYPE_CHECKING:
    import numpy.typing as npt

WIDTH_PX, HEIGHT_PX = 1280, 720
FIRST_SEED = 9_000_000
EVERY_PROMPT = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]


class Scene:
    """One drawn image.

    Args:
        seed: of the drawing.
        width_px, height_px: of the image.

    Attributes:
        image: the drawing.
        jpeg: the drawing as a file, quality 90.
        masks: for each prompt the union of its objects' masks, (H, W) bool.
    """

    def __init__(self, seed: int, width_px: int = WIDTH_PX, height_px: int = HEIGHT_PX) -> None:
        scenes, pictures = draw_scenes(1, seed, width=width_px, height=height_px)
        pixels = pictures.pixels[0].round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        self.image = Image.fromarray(pixels)
        self.jpeg = encode_jpeg(self.image, 90)
        self.masks: dict[str, npt.NDArray[np.bool_]] = {}
        owner = pictures.owner[0].numpy()
        for index in pictures.counted[0].nonzero().flatten().tolist():
            colour, shape = int(scenes.colour[0, index]), int(scenes.shape[0, index])
            prompt = f"{list(COLOURS)[colour]} {SHAPES[shape]}"
            self.masks[prompt] = self.masks.get(prompt, np.zeros_like(owner, dtype=bool)) | (
                owner == index + 1
            )

    @property
    def ten_prompts(self) -> list[str]:
        """Ten prompts: the scene's objects first, then absent ones."""
        absent = [prompt for prompt in EVERY_PROMPT if prompt not in self.masks]
        return [*self.masks, *absent][:10]


def encode_jpeg(image: Image.Image, quality: int, comment: bytes = b"") -> bytes:
    """The file of `image`, with a comment segment unless `comment` is empty."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality, **({"comment": comment} if comment else {}))
    return buffer.getvalue()


def with_comment(jpeg: bytes, comment: bytes) -> bytes:
    """Another file with the same pixels: a comment segment (ITU-T T.81, B.2.4.5) after the first marker."""
    return jpeg[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + jpeg[2:]
