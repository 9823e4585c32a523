"""Draws what was found over its picture, with Pillow."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from sam3_client.result import Instance

    Layer = npt.NDArray[np.uint8]
    Rectangle = tuple[int, int, int, int]

PALETTE = np.array(
    [
        (0, 0, 0),  # none
        *((255, 34, 170), (187, 221, 0), (119, 204, 238), (170, 102, 17), (153, 68, 255)),
        *((51, 187, 0), (255, 153, 153), (0, 136, 119), (170, 136, 255), (136, 255, 170)),
    ],
    np.uint8,
)
"""The server's colours: they differ for colour-blind people too, and black text is readable on each."""
TINT = 0.22
"""Share of the colour in a px of a mask; the rest is the picture."""
LINE_SIDE_PX = 400
"""A line has 1 px for so many px of the shorter side."""
FONT_SIDE_PX = 54
"""A label's font has 1 px for so many px of the shorter side, within `FONT_PX`."""
FONT_PX = (11, 40)
MAX_LABEL_CHARACTERS = 24


def draw_overlay(
    image: Image.Image, stack: Sequence[tuple[int, Instance]], prompts: Sequence[str], max_side_px: int | None
) -> Image.Image:
    """The picture with tints, outlines, boxes and labels.

    Args:
        image: RGB.
        stack: instances with their positions in the result, those that are painted first before others.
        prompts: of the result. Several have a colour each, the instances of a single one have one each.
        max_side_px: of the drawn picture; None: the image's own size.
    """
    scale = min(1.0, (max_side_px or max(image.size)) / max(image.size))
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    line_px = max(1, round(min(size) / LINE_SIDE_PX))
    tints, lines = (np.zeros((size[1], size[0]), np.uint8) for _ in range(2))
    drawn: list[tuple[Rectangle, int, str]] = []
    for index, instance in stack:
        colour = 1 + (prompts.index(instance.label) if len(prompts) > 1 else index) % (len(PALETTE) - 1)
        box = _box_on(instance, image.size, size)
        drawn.append((box, colour, f"{_written(instance.label, prompts)} {instance.score:.2f}"))
        _draw_mask(tints, lines, Image.fromarray(instance.mask), colour, line_px)
    pixels = np.array(image if scale == 1 else image.resize(size, Image.Resampling.LANCZOS))
    tinted, lined = tints > 0, lines > 0
    pixels[tinted] = pixels[tinted] * (1 - TINT) + PALETTE[tints[tinted]] * TINT
    pixels[lined] = PALETTE[lines[lined]]
    picture = Image.fromarray(pixels)
    pen = ImageDraw.Draw(picture)
    for box, colour, _ in drawn:
        pen.rectangle(
            (box[0], box[1], box[2] - 1, box[3] - 1), outline=_rgb(colour), width=max(1, line_px // 2)
        )
    _draw_labels(pen, drawn[::-1], size)
    return picture


def _box_on(instance: Instance, size: tuple[int, int], drawn_size: tuple[int, int]) -> Rectangle:
    """The px of the drawn picture that a box touches; one at least."""
    x0, y0, x1, y1 = (side * drawn_size[axis % 2] / size[axis % 2] for axis, side in enumerate(instance.box))
    left, top = min(int(x0), drawn_size[0] - 1), min(int(y0), drawn_size[1] - 1)
    return (
        left,
        top,
        max(left + 1, min(round(x1), drawn_size[0])),
        max(top + 1, min(round(y1), drawn_size[1])),
    )


def _draw_mask(tints: Layer, lines: Layer, mask: Image.Image, colour: int, line_px: int) -> None:
    """Set the px of a mask, and those round it that are its outline: it hides no px of the object."""
    mask = mask.convert("L").resize((tints.shape[1], tints.shape[0]), Image.Resampling.NEAREST)
    rectangle = mask.getbbox()
    if rectangle is None:
        return
    left, top = max(0, rectangle[0] - line_px), max(0, rectangle[1] - line_px)
    crop = mask.crop((left, top, rectangle[2] + line_px, rectangle[3] + line_px))
    grown = np.asarray(crop.filter(ImageFilter.MaxFilter(2 * line_px + 1))) > 0
    inside = np.asarray(crop) > 0
    window = slice(top, top + crop.height), slice(left, left + crop.width)
    height, width = tints[window].shape
    inside, grown = inside[:height, :width], grown[:height, :width]
    tints[window][inside] = colour
    lines[window][inside] = 0  # what is on top hides the outlines below it
    lines[window][grown & ~inside] = colour


def _draw_labels(
    pen: ImageDraw.ImageDraw, drawn: Sequence[tuple[Rectangle, int, str]], size: tuple[int, int]
) -> None:
    """Write a label at each box, where it hides no other label and as little of any box as can be."""
    font = ImageFont.load_default(min(max(min(size) / FONT_SIDE_PX, FONT_PX[0]), FONT_PX[1]))
    padding_px = 2
    height = int(font.getbbox("Ag")[3]) + 2 * padding_px
    boxes = np.array([box for box, _, _ in drawn], np.int64).reshape(-1, 4)
    taken = np.zeros((0, 4), np.int64)
    for box, colour, text in drawn:
        width = int(font.getlength(text)) + 1 + 2 * padding_px
        free = [each for each in _places(box, width, height, size) if not _shared_px(each, taken)]
        if free:
            label = min(free, key=lambda each: _shared_px(each, boxes))  # the first of equal ones
            taken = np.vstack([taken, label])
            pen.rectangle((label[0], label[1], label[2] - 1, label[3] - 1), fill=_rgb(colour))
            pen.text((label[0] + padding_px, label[1] + padding_px), text, fill=(0, 0, 0), font=font)


def _places(box: Rectangle, width: int, height: int, size: tuple[int, int]) -> Iterator[Rectangle]:
    """Rectangles of a label above, below and in a box, moved into the picture; the best first."""
    x0, y0, x1, y1 = box
    for y in (y0 - height, y1, y0, y1 - height):
        for x in (x0, x1 - width, x1, x0 - width):
            left, top = max(0, min(x, size[0] - width)), max(0, min(y, size[1] - height))
            yield left, top, left + width, top + height


def _shared_px(rectangle: Rectangle, others: npt.NDArray[np.int64]) -> int:
    """The px that a rectangle shares with each of the others, all together."""
    starts = np.maximum(rectangle[:2], others[:, :2])
    ends = np.minimum(rectangle[2:], others[:, 2:])
    return int((ends - starts).clip(0).prod(axis=1).sum())


def _rgb(colour: int) -> tuple[int, int, int]:
    red, green, blue = (int(level) for level in PALETTE[colour])
    return red, green, blue


def _written(label: str, prompts: Sequence[str]) -> str:
    """A label in ASCII, which the font has, on one line; "prompt 2" where that leaves nothing of it."""
    letters = unicodedata.normalize("NFKD", " ".join(label.split()))
    text = "".join(letter for letter in letters if not unicodedata.combining(letter))
    if not text.isascii() or not text.isprintable():
        return f"prompt {prompts.index(label) + 1}"
    return text if len(text) <= MAX_LABEL_CHARACTERS else text[: MAX_LABEL_CHARACTERS - 3].rstrip() + "..."
