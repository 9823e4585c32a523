"""What callers pass as an image: the file that is sent, and the picture that a viewer shows."""

from __future__ import annotations

import io
import struct
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from sam3_client.errors import BadImage

if TYPE_CHECKING:
    import numpy.typing as npt

    ImageInput = str | Path | bytes | Image.Image | npt.NDArray[np.uint8]

PNG_LEVEL = 3
"""Of a photo it takes a third of the default's time (0.2 s for 1920 x 1080), for a tenth more bytes."""
_BAD_IMAGE = "BAD_IMAGE"
_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by EXIF's orientation."""
_MODES_OF_RGB = {"RGB", "RGBA", "RGBX", "P"}
"""Of images whose colour profile is one of RGB."""
_WHITE = (255, 255, 255)


class Picture:
    """One image.

    Args:
        file: its bytes, as they are sent.
        image: the same, decoded, if it is known already.

    Raises:
        BadImage: Pillow does not know the bytes as a picture.
    """

    def __init__(self, file: bytes, image: Image.Image | None = None) -> None:
        self.file = file
        if image is not None:
            self.image = image
        else:
            _opened(file).close()

    @classmethod
    def of(cls, source: ImageInput) -> Picture:
        """Read what a caller passed.

        Args:
            source: a path, the bytes of a file, an image of Pillow's, or an array (height, width, 3) of
                uint8, RGB. Files are sent as they are; images and arrays as PNG, so without loss.

        Raises:
            BadImage: it is none of these, or cannot be read.
        """
        match source:
            case str() | Path():
                return cls(_read(Path(source)))
            case bytes():
                return cls(source)
            case Image.Image():
                return _encoded(as_viewed(source))
            case np.ndarray():
                return _encoded(_from_array(source))
        raise BadImage(
            f"an image is a path, bytes, a Pillow image or a numpy array, not {type(source).__name__}",
            code=_BAD_IMAGE,
        )

    @cached_property
    def image(self) -> Image.Image:
        """RGB, as a viewer shows it. Raises `BadImage` where the file is damaged."""
        with _opened(self.file) as opened:
            try:
                return as_viewed(opened)
            except (OSError, SyntaxError, ValueError) as error:  # Pillow's errors for damaged files
                raise BadImage(f"the picture is damaged: {error}", code=_BAD_IMAGE) from error


def as_viewed(image: Image.Image) -> Image.Image:
    """RGB as a viewer shows it on a white page: EXIF orientation applied, transparency on white.

    As on the server, the orientation of a WEBP is not followed, nor one in XMP, or after a PNG's pixels.
    """
    orientation = 1 if image.format == "WEBP" else _orientation(image.info.get("exif"))
    image.load()
    upright = image.transpose(_TURNS[orientation]) if orientation in _TURNS else image
    viewed = _in_rgb(upright)
    profile = image.info.get("icc_profile") if image.mode in _MODES_OF_RGB else None
    viewed.info = {"icc_profile": profile} if profile else {}
    return viewed


def _in_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):  # 16 bits become the upper 8
        levels = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255)
        return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB") if image.mode != "RGB" else image.copy()
    page = Image.new("RGB", image.size, _WHITE)
    with_alpha = image.convert("RGBA")
    page.paste(with_alpha, mask=with_alpha.getchannel("A"))
    return page


def _orientation(exif: bytes | None) -> int:
    tags = Image.Exif()
    try:
        tags.load(exif or b"")
        return int(tags.get(_ORIENTATION_TAG, 1))
    except (SyntaxError, ValueError, TypeError, OSError, KeyError, struct.error):
        return 1  # damaged EXIF data turn nothing


def _opened(file: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(file))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "it is empty" if not file else "it is not a PNG, JPEG or WEBP, or it is damaged"
        raise BadImage(f"this file is no picture: {reason}", code=_BAD_IMAGE) from error


def _read(path: Path) -> bytes:
    try:
        file = path.read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise BadImage(f"{path} cannot be read: {reason}", code=_BAD_IMAGE) from error
    try:
        _opened(file).close()
    except BadImage as error:
        raise BadImage(str(error).replace("this file", str(path), 1), code=_BAD_IMAGE) from error
    return file


def _from_array(array: npt.NDArray[Any]) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise BadImage(
            f"an array must be (height, width, 3) of uint8, and this is {array.shape} of {array.dtype}",
            code=_BAD_IMAGE,
        )
    return Image.fromarray(np.ascontiguousarray(array))


def _encoded(image: Image.Image) -> Picture:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=PNG_LEVEL)
    return Picture(file.getvalue(), image)
