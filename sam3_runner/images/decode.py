"""Decodes an image file, with Pillow and imagecodecs, and resizes it to the square unless the model does."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import imagecodecs
import numpy as np
from PIL import Image

from sam3_runner.images.colour import is_srgb
from sam3_runner.images.decoded import LocalImage
from sam3_runner.images.exif import viewed_size
from sam3_runner.images.image_file import damaged
from sam3_runner.images.square import oriented, resize_to, stored_or_square
from sam3_runner.images.tiles import stored_window
from sam3_runner.instances import Window

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sam3_runner.images.image_file import ImageFile


def decode_square(file: ImageFile, side_px: int) -> LocalImage:
    """Decode a file to the model's square. Raises `UnsupportedImage`: its pixels are damaged."""
    return decode_image(file, side_px, max_stored_px=0)


def decode_image(file: ImageFile, side_px: int, max_stored_px: int) -> LocalImage:
    """Decode a file for a model that resizes images of at most `max_stored_px` itself; 0: none.

    Such an image stays as stored, unless its colours or its transparency need work that Pillow does here.

    Raises:
        UnsupportedImage: its pixels are damaged.
    """
    if file.kind == "JPEG" and not file.reduced and file.width * file.height <= max_stored_px:
        stored = _decode_plain_jpeg(file)
        if stored is not None:
            return stored
    return stored_or_square(
        decode(file),
        side_px,
        max_stored_px,
        orientation=file.orientation,
        icc_profile=file.icc_profile,
        size=(file.width, file.height),
    )


def decode_preview(file: ImageFile, max_side_px: int) -> LocalImage:
    """Decode a file as a viewer shows it, with no side longer than `max_side_px`: (rows, columns, 3).

    Raises:
        UnsupportedImage: its pixels are damaged.
    """
    image = decode(file, max_side_px)
    size = viewed_size((file.width, file.height), file.orientation)
    scale = min(1.0, max_side_px / max(file.width, file.height))
    stored = max(1, round(file.width * scale)), max(1, round(file.height * scale))
    pixels = resize_to(image, stored, file.icc_profile)
    return LocalImage(np.ascontiguousarray(oriented(pixels, file.orientation)), *size)


def decode_windows(file: ImageFile, side_px: int, windows: Sequence[Window]) -> Iterator[LocalImage]:
    """Decode a file once; each window of it as the model's square, one after another.

    Raises:
        UnsupportedImage: its pixels are damaged.
    """
    image = decode(file)
    size = viewed_size((file.width, file.height), file.orientation)
    for window in windows:
        stored = _scaled(stored_window(window, size, file.orientation), file, image)
        square = resize_to(image, (side_px, side_px), file.icc_profile, stored)
        pixels = np.ascontiguousarray(oriented(square, file.orientation))
        yield LocalImage(pixels, window.width, window.height)


def decode(file: ImageFile, max_side_px: int | None = None) -> Image.Image:
    """The pixels as stored, as an image of Pillow. Raises `UnsupportedImage`, `MemoryError`.

    Args:
        file: of the image.
        max_side_px: a JPEG may be decoded smaller, with its longer side at least this long.
    """
    try:
        return _decode_webp(file) if file.kind == "WEBP" else _decode_with_pillow(file, max_side_px)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError and others
        raise damaged("its pixels cannot be decoded") from error


def _scaled(window: Window, file: ImageFile, image: Image.Image) -> Window:
    """A window of the file in px of `image`, which may be decoded at half its size."""
    across, down = image.width / file.width, image.height / file.height
    left, top = int(window.left * across), int(window.top * down)
    right = min(image.width, max(left + 1, round(window.right * across)))
    bottom = min(image.height, max(top + 1, round(window.bottom * down)))
    return Window(left, top, right - left, bottom - top)


def _decode_plain_jpeg(file: ImageFile) -> LocalImage | None:
    """The pixels of a JPEG of grey or RGB near sRGB, None for another.

    By imagecodecs, with the library that Pillow uses too: to the same pixels in three quarters of the time,
    without Pillow's copies.
    """
    try:
        with Image.open(io.BytesIO(file.data), formats=["JPEG"]) as opened:
            if opened.size != (file.width, file.height) or not is_srgb(opened, file.icc_profile):
                return None
        pixels = imagecodecs.jpeg8_decode(file.data)
    except MemoryError:
        raise
    except Exception as error:  # as in `decode`
        raise damaged("its pixels cannot be decoded") from error
    size = viewed_size((file.width, file.height), file.orientation)
    return LocalImage(pixels.reshape(file.height, file.width, -1), *size, file.orientation)


def _decode_with_pillow(file: ImageFile, max_side_px: int | None) -> Image.Image:
    image = Image.open(io.BytesIO(file.data), formats=[file.kind])
    if image.size != (file.width, file.height):
        raise ValueError("the decoder reports another size")
    if file.reduced:
        image.draft(None, (file.width // 2, file.height // 2))
    elif max_side_px is not None:
        scale = max_side_px / max(file.width, file.height)
        image.draft(None, (max(1, int(file.width * scale)), max(1, int(file.height * scale))))
    image.load()
    return image


def _decode_webp(file: ImageFile) -> Image.Image:
    """Decode with imagecodecs: Pillow decodes every WEBP as an animation, in twice the memory and time."""
    pixels = imagecodecs.webp_decode(file.data, hasalpha=True)
    # Pillow takes four bytes per pixel without a copy.
    frame = Image.frombuffer("RGBA", pixels.shape[1::-1], pixels, "raw", "RGBA", 0, 1)
    if frame.size == (file.width, file.height):
        return frame
    image = Image.new("RGBA", (file.width, file.height))
    image.paste(frame, (file.frame_left, file.frame_top))
    return image
