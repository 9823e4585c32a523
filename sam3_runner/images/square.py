"""Converts an opened image to the model's square input."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import ceil, floor

import numpy as np
import numpy.typing as npt
from PIL import Image

from sam3_runner.images.colour import grey_scale_of, is_srgb, on_white, to_srgb
from sam3_runner.images.decoded import LocalImage
from sam3_runner.images.exif import EXIF_PREFIX, orientation_of, viewed_size
from sam3_runner.instances import Window

Pixels = npt.NDArray[np.uint8]

BAND_PX = 2**20
"""Pixels of the image that one thread holds as floats at a time, approximately: 20 MB."""
THREADS = 3
_bands = ThreadPoolExecutor(THREADS, thread_name_prefix="resize")
"""Pillow releases the GIL while it resizes."""


def to_square(image: Image.Image, side_px: int) -> LocalImage:
    """The model's square of a Pillow image of any mode.

    Does for an opened file what the server does for the file: the EXIF orientation of a JPEG or PNG is
    applied, transparency is composited on white, and a colour profile that is not near sRGB is converted.
    """
    return from_pillow(image, side_px, max_stored_px=0)


def from_pillow(image: Image.Image, side_px: int, max_stored_px: int) -> LocalImage:
    """As `to_square`, for a model that resizes images of at most `max_stored_px` itself."""
    exif = b"" if image.format == "WEBP" else image.info.get("exif", b"")
    return stored_or_square(
        image,
        side_px,
        max_stored_px,
        orientation=orientation_of(exif.removeprefix(EXIF_PREFIX)),
        icc_profile=image.info.get("icc_profile") or b"",
        size=image.size,
    )


def stored_or_square(
    image: Image.Image,
    side_px: int,
    max_stored_px: int,
    *,
    orientation: int,
    icc_profile: bytes,
    size: tuple[int, int],
) -> LocalImage:
    """The pixels as stored, if these are few enough and opaque sRGB; else as `oriented_square`."""
    is_whole = image.size == size
    if image.width * image.height > max_stored_px or not is_whole or not is_srgb(image, icc_profile):
        return oriented_square(image, side_px, orientation=orientation, icc_profile=icc_profile, size=size)
    pixels = np.asarray(image).reshape(image.height, image.width, -1)
    return LocalImage(pixels, *viewed_size(size, orientation), orientation)


def oriented_square(
    image: Image.Image,
    side_px: int,
    *,
    orientation: int,
    icc_profile: bytes,
    size: tuple[int, int],
) -> LocalImage:
    """The model's square, with `orientation` and `icc_profile` as in the file.

    Args:
        image: as stored.
        side_px: of the square.
        orientation: EXIF's, 1 to 8.
        icc_profile: of the image; may be empty.
        size: width and height in px of the full image, where `image` is a reduced version of it.
    """
    width, height = viewed_size(size, orientation)
    square = resize_to(image, (side_px, side_px), icc_profile)
    return LocalImage(np.ascontiguousarray(oriented(square, orientation)), width=width, height=height)


def resize_to(
    image: Image.Image, size: tuple[int, int], icc_profile: bytes, window: Window | None = None
) -> Pixels:
    """The image or its window on white in sRGB, resized to `size` (width, height): (height, width, 3)."""
    return to_srgb(_resize(image, size, window or Window(0, 0, *image.size)), icc_profile)


def _resize(image: Image.Image, size: tuple[int, int], window: Window) -> Pixels:
    """Resize to (height, width, channels): bilinear with antialias, in floating point, rounded once.

    The official processor does the same on a GPU. Pillow's 8-bit resize also rounds between its two passes,
    which changes one value in five by 1. Works in bands, so that memory does not grow with the image.
    """
    image.load()
    bands = max(THREADS, ceil(window.width * window.height / BAND_PX))
    edges = np.linspace(0, size[1], min(bands, size[1]) + 1).astype(int).tolist()
    resize_band = partial(_resize_band, image, size, window, grey_scale_of(image))
    return np.concatenate(list(_bands.map(resize_band, edges[:-1], edges[1:])))


def _resize_band(  # noqa: PLR0917 - the first four are the same for all bands
    image: Image.Image, size: tuple[int, int], window: Window, grey_scale: float, first: int, last: int
) -> Pixels:
    """Rows `first` to `last` of the result, (last - first, width, channels)."""
    px_per_row = window.height / size[1]
    # The triangle filter reads one row of the result to either side, and at least one px.
    reach = ceil(max(px_per_row, 1.0)) + 1
    top = max(0, floor(first * px_per_row) - reach)
    bottom = min(window.height, ceil(last * px_per_row) + reach)
    part = image.crop((window.left, window.top + top, window.right, window.top + bottom))
    band = on_white(part, grey_scale)
    box = (0, first * px_per_row - top, window.width, min(last * px_per_row - top, bottom - top))
    planes = [
        plane.convert("F").resize((size[0], last - first), Image.Resampling.BILINEAR, box)
        for plane in band.split()
    ]
    return np.stack([np.rint(np.asarray(plane)).astype(np.uint8) for plane in planes], axis=-1)


def oriented(square: Pixels, orientation: int) -> Pixels:
    """Pixels as a viewer shows it (EXIF 2.32, 4.6.4 A: which edges row 0 and column 0 are)."""
    if orientation >= 5:
        square = square.transpose(1, 0, 2)
    if orientation in {3, 4, 7, 8}:
        square = square[::-1]
    if orientation in {2, 3, 6, 7}:
        square = square[:, ::-1]
    return square
