"""The picture that a result shows is the one that the server has segmented."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from sam3_client import BadImage
from sam3_client.pictures import Picture
from sam3_runner.images.decode import decode_preview
from sam3_runner.images.read import read_image_file
from tests.edge import image_bytes

if TYPE_CHECKING:
    from sam3_client.pictures import ImageInput

LEVELS = np.add.outer(np.arange(0, 240, 10), np.arange(0, 16)).astype(np.uint8)
COLOURS = Image.fromarray(np.dstack([LEVELS, LEVELS[::-1], np.full_like(LEVELS, 90)]))


def exif(orientation: int) -> Image.Exif:
    """EXIF data with an orientation."""
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def with_alpha() -> Image.Image:
    """A picture whose left part is transparent."""
    image = COLOURS.convert("RGBA")
    image.putalpha(Image.fromarray(np.where(np.arange(16) < 6, 40, 255).astype(np.uint8)[None].repeat(24, 0)))
    return image


FILES: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
    **{f"JPEG, orientation {turn}": (COLOURS, "JPEG", {"exif": exif(turn)}) for turn in range(1, 9)},
    "PNG, orientation 6": (COLOURS, "PNG", {"exif": exif(6)}),
    "WEBP, orientation 6": (COLOURS, "WEBP", {"exif": exif(6), "lossless": True}),
    "JPEG, damaged EXIF data": (COLOURS, "JPEG", {"exif": b"Exif\0\0MM\0*\0\0\xff"}),
    "PNG with alpha": (with_alpha(), "PNG", {}),
    "WEBP with alpha": (with_alpha(), "WEBP", {"lossless": True}),
    "PNG, grey with alpha": (with_alpha().convert("LA"), "PNG", {}),
    "PNG, palette with transparency": (COLOURS.quantize(8), "PNG", {"transparency": 0}),
    "PNG, 16 bits": (Image.fromarray(LEVELS.astype(np.uint16) * 257), "PNG", {}),
    "PNG, 1 bit": (COLOURS.convert("1"), "PNG", {}),
    "JPEG, grey": (COLOURS.convert("L"), "JPEG", {}),
    "JPEG, CMYK": (COLOURS.convert("CMYK"), "JPEG", {}),
}


@pytest.mark.parametrize("name", FILES)
def test_picture_is_the_servers(name: str) -> None:
    """Size, orientation and colours are the server's, for a file and for an image opened by Pillow."""
    image, kind, options = FILES[name]
    file = image_bytes(image, kind, **options)
    wanted = decode_preview(read_image_file(file, max_pixels=1000), 100).pixels.astype(int)
    with Image.open(io.BytesIO(file)) as opened:
        for source in (file, opened):
            picture = Picture.of(source)
            assert picture.image.mode == "RGB"
            assert np.asarray(picture.image).shape == wanted.shape
            assert np.abs(np.asarray(picture.image) - wanted).max() <= 3
    sent = decode_preview(read_image_file(picture.file, max_pixels=1000), 100).pixels
    assert np.array_equal(sent, np.asarray(picture.image))


def test_files_are_sent_as_they_are() -> None:
    """The bytes of a file are sent, not those of another encoding."""
    file = image_bytes(COLOURS, "JPEG")
    assert Picture.of(file).file == file


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (b"", "it is empty"),
        (b"hello", "not a PNG, JPEG or WEBP"),
        (np.zeros((4, 4, 4), np.uint8), r"\(4, 4, 4\) of uint8"),
        (np.zeros((0, 4, 3), np.uint8), r"\(0, 4, 3\)"),
        (7, "not int"),
    ],
)
def test_what_is_no_image(source: ImageInput, sentence: str) -> None:
    """Anything else is an error that says what it is."""
    with pytest.raises(BadImage, match=sentence):
        Picture.of(source)
