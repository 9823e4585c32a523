"""Draws an answer over a preview of its image, as JPEG."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from imagecodecs import jpeg8_encode
from PIL import Image, ImageDraw, ImageFont

from outputs.label_map import bottom_to_top
from outputs.label_places import LabelPlaces
from outputs.palette import PALETTE, colour_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from sam3_runner.instances import Instance, Mask, MaskCrop, PredictResult

    Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
    Pixels = npt.NDArray[np.uint8]
    Positions = npt.NDArray[np.int64]

TINT = 56
"""Share of the colour in a px of a mask, of 256 (22 %): the rest is the picture."""
SHADE = 96
"""Share of the picture in a px of a dark line, of 256."""
QUALITY = 85
LINE_SIDE_PX = 400
"""An outline has 1 px for so many px of the preview's shorter side, rounded, and at least 1."""
FONT_SIDE_PX = 54
"""A label's font has 1 px for so many px of the shorter side."""
FONT_PX = (11, 40)
"""The smallest and the largest font."""
CROWD = 40
"""With more instances than this the font has three quarters of its size."""
MAX_PROMPT_CHARS = 24
INK = (0, 0, 0)

_COLOURS = np.array(((0, 0, 0), *PALETTE), np.uint16)
"""By the px of a canvas: 0 is no colour."""


@dataclass(frozen=True, slots=True)
class _Drawn:
    """An instance on the preview.

    Attributes:
        number: of the instance in the answer, from 1.
        prompt: as it is written in labels.
        box: x0, y0, x1, y1 in px of the preview; x1 and y1 are the first px outside.
        colour: index into `_COLOURS`.
    """

    number: int
    prompt: str
    instance: Instance
    box: tuple[int, int, int, int]
    colour: int


class _Canvas:
    """What is drawn over the preview: layers of its size, combined at the end.

    Attributes:
        tints, lines: (height, width), indices into `_COLOURS`.
        shade: (height, width), the dark lines.
    """

    def __init__(self, width: int, height: int) -> None:
        self.tints = np.zeros((height, width), np.uint8)
        self.lines = np.zeros((height, width), np.uint8)
        self.shade = np.zeros((height, width), np.bool_)
        self.line_px = max(1, round(min(width, height) / LINE_SIDE_PX))

    def draw_box(self, box: tuple[int, int, int, int], colour: int) -> None:
        """Draw the border of a box, half as wide as an outline, with a dark line inside."""
        width_px = max(1, self.line_px // 2)
        _frame(self.shade, box, width_px + 1, True)  # noqa: FBT003 - a px
        _frame(self.lines, box, width_px, colour)

    def draw_mask(self, mask: Mask, left: int, top: int, colour: int) -> None:
        """Draw a tint, an outline outside the mask, and a dark line outside the outline."""
        margin = self.line_px + 1
        height, width = self.tints.shape
        padded = np.pad(mask, margin)
        inside = (
            slice(max(0, margin - top), margin - top + height),
            slice(max(0, margin - left), margin - left + width),
        )
        window = (
            slice(max(0, top - margin), top + len(mask) + margin),
            slice(max(0, left - margin), left + mask.shape[1] + margin),
        )
        outlined = padded
        for step in range(self.line_px):
            outlined = _grown(outlined, diagonally=step % 2 == 1)
        shaded = _grown(outlined, diagonally=self.line_px % 2 == 1)
        np.copyto(self.tints[window], colour, where=padded[inside], casting="unsafe")
        np.copyto(self.lines[window], colour, where=(outlined & ~padded)[inside], casting="unsafe")
        self.shade[window] |= (shaded & ~outlined)[inside]

    def over(self, pixels: Pixels) -> None:
        """Draw the layers over `pixels`, (height, width, 3), in place: tints, dark lines, coloured lines."""
        flat, colours = pixels.reshape(-1, 3), self.tints.ravel()
        tinted = np.flatnonzero(colours)
        flat[tinted] = (flat[tinted] * np.uint16(256 - TINT) + _COLOURS[colours[tinted]] * TINT) >> 8
        shaded = np.flatnonzero(self.shade)
        flat[shaded] = (flat[shaded] * np.uint16(SHADE)) >> 8
        lined = np.flatnonzero(self.lines)
        flat[lined] = _COLOURS[self.lines.ravel()[lined]]


def overlay_jpeg(image: Image.Image, results: Sequence[PredictResult]) -> bytes:
    """JPEG of a preview with every instance: an outline, a tint, its box, and a label.

    - The outline runs outside the mask, so that it hides no px of the object, with a dark line beside it.
      Where a mask reaches the edge of the picture it has no outline.
    - A px is tinted once, in the colour of the instance that `label_map_png` has there.
    - A label is "3 red circle 0.95": number, prompt, score. Labels do not hide each other, nor more than a
      third of any box. The best scores are placed first. A label that does not fit beside or in its box is
      shortened to the number; where that does not fit either, it is left out.
    - Several prompts have one colour each; the instances of a single one have one each. Ten colours repeat.
    - The font has ASCII. Accents are left out, and a prompt with other characters is written as "prompt 2".

    Masks are sampled at the centres of the preview's px; an instance with a mask has one px at least.

    Args:
        image: RGB, as a viewer shows it, of the original's size or smaller.
        results: of the original; at least one.
    """
    canvas = _Canvas(image.width, image.height)
    scale = image.width / results[0].image_width, image.height / results[0].image_height
    drawn = {each.number: each for each in _drawn(results, image.size, scale)}
    stack = [drawn[number] for number, _ in bottom_to_top(results)]
    for each in stack:
        canvas.draw_box(each.box, each.colour)
    for each in stack:
        if each.instance.mask.width:
            canvas.draw_mask(*_sampled(each.instance.mask, image.size, scale), each.colour)
    pixels = np.array(image.convert("RGB"))
    canvas.over(pixels)
    picture = Image.fromarray(pixels)
    _draw_labels(picture, stack[::-1], canvas.tints > 0)
    return bytes(jpeg8_encode(np.asarray(picture), level=QUALITY, subsampling="444"))


def _drawn(
    results: Sequence[PredictResult], size: tuple[int, int], scale: tuple[float, float]
) -> list[_Drawn]:
    """All instances, in the order of their numbers."""
    drawn: list[_Drawn] = []
    for prompt_number, result in enumerate(results, start=1):
        prompt = written_prompt(result.prompt, prompt_number)
        for instance in result.instances:
            number = len(drawn) + 1
            colour = 1 + colour_of(number, prompt_number, len(results))
            drawn.append(_Drawn(number, prompt, instance, _box_on(instance.box, size, scale), colour))
    return drawn


def _box_on(
    box: tuple[float, float, float, float], size: tuple[int, int], scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """The px of the preview that a box touches; one at least."""
    starts = [min(int(box[axis] * scale[axis]), size[axis] - 1) for axis in (0, 1)]
    ends = [
        min(max(int(np.ceil(box[2 + axis] * scale[axis])), starts[axis] + 1), size[axis]) for axis in (0, 1)
    ]
    return starts[0], starts[1], ends[0], ends[1]


def _sampled(mask: MaskCrop, size: tuple[int, int], scale: tuple[float, float]) -> tuple[Mask, int, int]:
    """The mask at the centres of the preview's px, within its bounding rectangle; its left and its top."""
    if scale[0] == 1 and scale[1] == 1:
        return mask.array(), mask.left, mask.top
    left, columns = _centres(mask.left, mask.width, size[0], scale[0])
    top, rows = _centres(mask.top, mask.height, size[1], scale[1])
    bits = np.unpackbits(mask.packed()[rows - mask.top], axis=1)
    sampled = bits[:, columns - mask.left // 8 * 8].view(np.bool_)
    if sampled.any():
        return sampled, left, top
    # No centre is in the mask: the px in the middle of its rectangle stands for it.
    middle = (mask.left + mask.width / 2) * scale[0], (mask.top + mask.height / 2) * scale[1]
    left, top = (min(int(middle[axis]), size[axis] - 1) for axis in (0, 1))
    return np.ones((1, 1), np.bool_), left, top


def _centres(start: int, length: int, side: int, scale: float) -> tuple[int, Positions]:
    """Along one axis: the first px whose centre is in a part of the image; all these centres."""
    first = max(0, int(start * scale) - 1)
    ends = min(side, int((start + length) * scale) + 2)
    centres = ((np.arange(first, ends) + 0.5) / scale).astype(np.int64)
    inside = np.flatnonzero((centres >= start) & (centres < start + length))
    return first + int(inside[0]) if len(inside) else first, centres[inside]


def _frame(layer: npt.NDArray[np.generic], box: tuple[int, int, int, int], width_px: int, value: int) -> None:
    """Set the px of a box's border."""
    x0, y0, x1, y1 = box
    part = layer[y0:y1, x0:x1]
    part[:width_px] = part[-width_px:] = value
    part[:, :width_px] = part[:, -width_px:] = value


def _grown(mask: Mask, *, diagonally: bool) -> Mask:
    """The mask and the px beside it: four of each px, or eight."""
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    rows = grown.copy() if diagonally else mask
    grown[:, 1:] |= rows[:, :-1]
    grown[:, :-1] |= rows[:, 1:]
    return grown


def _draw_labels(picture: Image.Image, drawn: Sequence[_Drawn], objects: Mask) -> None:
    """Draw the labels of `drawn`, in the order in which they are placed."""
    font_px = min(picture.size) / FONT_SIDE_PX * (0.75 if len(drawn) > CROWD else 1)
    font = _font(round(min(max(font_px, FONT_PX[0]), FONT_PX[1])))
    places = LabelPlaces(picture.width, picture.height, [each.box for each in drawn], objects)
    pen = ImageDraw.Draw(picture)
    for each in drawn:
        # Two spaces: one is too narrow between numbers.
        full = f"{each.number}  {each.prompt}  {each.instance.score:.2f}"
        for text in (full, str(each.number)):
            width, height, padding = _label_size(text, font)
            corner = places.place(each.box, width, height)
            if corner is not None:
                x, y = corner
                pen.rectangle((x, y, x + width - 1, y + height - 1), fill=PALETTE[each.colour - 1])
                pen.text((x + padding, y + padding), text, fill=INK, font=font)
                break


def _label_size(text: str, font: Font) -> tuple[int, int, int]:
    """Width and height of a label, and the px between its border and its text."""
    padding = 2
    _, _, _, bottom = font.getbbox("Ag")
    return int(font.getlength(text)) + 1 + 2 * padding, int(bottom) + 2 * padding, padding


@lru_cache(maxsize=32)
def _font(size_px: int) -> Font:
    """Aileron, which Pillow contains."""
    return ImageFont.load_default(size_px)


def written_prompt(prompt: str, prompt_number: int) -> str:
    """A prompt as labels show it: on one line, in ASCII, at most `MAX_PROMPT_CHARS` long, or "prompt 2"."""
    letters = unicodedata.normalize("NFKD", " ".join(prompt.split()))
    text = "".join(letter for letter in letters if not unicodedata.combining(letter))
    if not text.isascii() or not text.isprintable() or not text:
        return f"prompt {prompt_number}"
    return text if len(text) <= MAX_PROMPT_CHARS else text[: MAX_PROMPT_CHARS - 3].rstrip() + "..."
