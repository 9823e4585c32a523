"""Bytes from strangers to pixels, and masks to PNG bytes. The only code that meets hostile images.

Knows Pillow, and nothing of torch.
"""

from __future__ import annotations

import io
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from sam3_runner.errors import UnsupportedImage

if TYPE_CHECKING:
    from sam3_runner.instances import Mask

FORMATS = ("PNG", "JPEG", "WEBP")

_planes = ThreadPoolExecutor(3, thread_name_prefix="resize")
"""One thread a colour: Pillow lets go of the GIL."""


@dataclass(frozen=True, slots=True)
class SquareImage:
    """An image as the model takes it, and the size that its masks go back to.

    Attributes:
        pixels: (side, side, 3) uint8 RGB, squashed without keeping the aspect, as the official
            processor does.
        width, height: px of the image as a viewer shows it (EXIF orientation applied).
    """

    pixels: npt.NDArray[np.uint8]
    width: int
    height: int


def decode_image(data: bytes, *, max_pixels: int) -> Image.Image:
    """Decode a PNG, JPEG or WEBP to RGB, turned as its EXIF orientation says.

    The format is told by content, the size is read from the header before any pixel is decoded, and
    only the first frame of an animation counts.

    Raises:
        UnsupportedImage: another format, damaged, or more than `max_pixels`.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of broken EXIF and palettes; the caller gets pixels or an error.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            _check_size(image, max_pixels)
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except UnsupportedImage:
        raise
    except Image.DecompressionBombError as error:
        raise UnsupportedImage(f"the image has more than {max_pixels} pixels") from error
    except UnidentifiedImageError as error:
        raise UnsupportedImage("the image is not a PNG, JPEG or WEBP") from error
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, MemoryError and more
        raise UnsupportedImage("the image is damaged") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any mode; 16-bit greys are scaled, where Pillow's own conversion clips them."""
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.uint32) >> 8
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def squash(image: Image.Image, side_px: int) -> SquareImage:
    """Resize an RGB image to the model's square: bilinear with antialias, uint8 in and out.

    Rounded once, at the end, as the official processor does on a GPU. Pillow's 8-bit resize rounds between
    its two passes too, which moves one value in five by 1.
    """
    planes = _planes.map(lambda plane: _resize_plane(plane, side_px), image.split())
    return SquareImage(np.stack(list(planes), axis=-1), width=image.width, height=image.height)


def encode_png(mask: Mask) -> bytes:
    """PNG of `mask` (H, W) bool: one 8-bit grey channel, 0 or 255."""
    buffer = io.BytesIO()
    # Masks are long runs of one level: zlib's run-length strategy halves the size in the same time.
    grey = Image.fromarray(mask.view(np.uint8) * np.uint8(255))
    grey.save(buffer, format="PNG", compress_level=1, compress_type=zlib.Z_RLE)
    return buffer.getvalue()


def _resize_plane(plane: Image.Image, side_px: int) -> npt.NDArray[np.uint8]:
    resized = plane.convert("F").resize((side_px, side_px), Image.Resampling.BILINEAR)
    pixels: npt.NDArray[np.uint8] = np.rint(np.asarray(resized)).astype(np.uint8)
    return pixels


def _check_size(image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise UnsupportedImage(
            f"the image has {image.width} x {image.height} pixels; at most {max_pixels} are allowed"
        )
