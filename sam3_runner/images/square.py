"""An opened image to the square that the model sees."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import ceil, floor

import numpy as np
import numpy.typing as npt
from PIL import Image

from sam3_runner.images.colour import grey_scale_of, on_white, to_srgb
from sam3_runner.images.exif import EXIF_PREFIX, orientation_of

Pixels = npt.NDArray[np.uint8]

BAND_PX = 2**20
"""About how many pixels of the image are held as floats at a time, a thread: 20 MB."""
THREADS = 3
_bands = ThreadPoolExecutor(THREADS, thread_name_prefix="resize")
"""Pillow lets go of the GIL while it resizes."""


@dataclass(frozen=True, slots=True)
class SquareImage:
    """An image as the model takes it, and the size that its masks go back to.

    Attributes:
        pixels: (side, side, 3) uint8 RGB, squashed without keeping the aspect, as the official
            processor does.
        width, height: px of the image as a viewer shows it (EXIF orientation applied).
    """

    pixels: Pixels
    width: int
    height: int


def to_square(image: Image.Image, side_px: int) -> SquareImage:
    """The model's square of an image that Pillow holds, in any mode.

    What the server makes of a file, this makes of the opened file: the EXIF orientation of a JPEG or PNG is
    applied, what is transparent is laid on white, a colour profile that is not near sRGB is converted from.
    """
    exif = b"" if image.format == "WEBP" else image.info.get("exif", b"")
    return oriented_square(
        image,
        side_px,
        orientation=orientation_of(exif.removeprefix(EXIF_PREFIX)),
        icc_profile=image.info.get("icc_profile") or b"",
    )


def oriented_square(
    image: Image.Image,
    side_px: int,
    *,
    orientation: int,
    icc_profile: bytes,
    size: tuple[int, int] | None = None,
) -> SquareImage:
    """The same, with `orientation` and `icc_profile` as they stand in the file.

    Args:
        image: as it is stored.
        side_px: of the square.
        orientation: EXIF's, 1 to 8.
        icc_profile: of the image; may be empty.
        size: width and height in px of the image, where `image` is a reduced version of it.
    """
    width, height = size or image.size
    square = to_srgb(_squash(image, side_px), icc_profile)
    if orientation >= 5:  # these lie on their side
        width, height = height, width
    return SquareImage(np.ascontiguousarray(_turned(square, orientation)), width=width, height=height)


def _squash(image: Image.Image, side_px: int) -> Pixels:
    """Resize to (side, side, channels): bilinear with antialias, in floating point, rounded once.

    As the official processor does on a GPU; Pillow's 8-bit resize rounds between its two passes too, which
    moves one value in five by 1. Band by band, so that memory does not follow the image's size.
    """
    image.load()
    bands = max(THREADS, ceil(image.width * image.height / BAND_PX))
    edges = np.linspace(0, side_px, min(bands, side_px) + 1).astype(int).tolist()
    squash_band = partial(_squash_band, image, side_px, grey_scale_of(image))
    return np.concatenate(list(_bands.map(squash_band, edges[:-1], edges[1:])))


def _squash_band(image: Image.Image, side_px: int, grey_scale: float, first: int, last: int) -> Pixels:
    """Rows `first` to `last` of the square, (last - first, side, channels)."""
    px_per_row = image.height / side_px
    # The triangle filter reaches one row of the square to either side, and one px at least.
    reach = ceil(max(px_per_row, 1.0)) + 1
    top = max(0, floor(first * px_per_row) - reach)
    bottom = min(image.height, ceil(last * px_per_row) + reach)
    band = on_white(image.crop((0, top, image.width, bottom)), grey_scale)
    box = (0, first * px_per_row - top, image.width, min(last * px_per_row - top, bottom - top))
    planes = [
        plane.convert("F").resize((side_px, last - first), Image.Resampling.BILINEAR, box)
        for plane in band.split()
    ]
    return np.stack([np.rint(np.asarray(plane)).astype(np.uint8) for plane in planes], axis=-1)


def _turned(square: Pixels, orientation: int) -> Pixels:
    """The square as a viewer shows it (EXIF 2.32, 4.6.4 A: which edges row 0 and column 0 are)."""
    if orientation >= 5:
        square = square.transpose(1, 0, 2)
    if orientation in {3, 4, 7, 8}:
        square = square[::-1]
    if orientation in {2, 3, 6, 7}:
        square = square[:, ::-1]
    return square
