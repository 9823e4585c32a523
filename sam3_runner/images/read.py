"""Parses an image file of any supported format. Decodes no pixel: plain Python, and cheap."""

from __future__ import annotations

from sam3_runner.errors import UnsupportedImage
from sam3_runner.images import jpeg, png, webp
from sam3_runner.images.image_file import ImageFile, within_limits


def read_image_file(data: bytes, *, max_pixels: int) -> ImageFile:
    """The metadata of a file within the limits.

    The format is recognised by content, not by name. Damaged or oversized metadata is ignored.

    Raises:
        UnsupportedImage: not a PNG, JPEG or WEBP, truncated, in more chunks than an encoder writes, of more
            than `max_pixels`, or over a limit of `within_limits`.
    """
    if data.startswith(png.SIGNATURE):
        file = png.read_png(data)
    elif data.startswith(jpeg.SIGNATURE):
        file = jpeg.read_jpeg(data)
    elif webp.is_webp(data):
        file = webp.read_webp(data)
    else:
        raise UnsupportedImage("the image is not a PNG, JPEG or WEBP")
    return within_limits(file, max_pixels)
