"""Any file to what it says of itself. Nothing is decoded: this is Python alone, and cheap."""

from __future__ import annotations

from sam3_runner.errors import UnsupportedImage
from sam3_runner.images import jpeg, png, webp
from sam3_runner.images.image_file import ImageFile, within_limits


def read_image_file(data: bytes, *, max_pixels: int) -> ImageFile:
    """What a file says of itself, within the limits.

    The format is told by content, not by name. Metadata that is damaged or huge is as none.

    Raises:
        UnsupportedImage: not a PNG, JPEG or WEBP, cut off, in more pieces than an encoder writes, of more
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
