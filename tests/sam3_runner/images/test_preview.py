"""The picture under an overlay: as a viewer shows the file, whatever its kind, or refused."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from sam3_runner import UnsupportedImage
from sam3_runner.images.decode import decode_preview, decode_square
from sam3_runner.images.read import read_image_file
from tests.image_files import encoded, exif_of, noise, png_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from sam3_runner.images.decoded import LocalImage
    from sam3_runner.images.image_file import ImageFile

WIDTH, HEIGHT = 200, 120
MAX_SIDES = (300, 60)
"""The file is smaller than the first, and larger than the second."""
MAX_DIFFERENCE = 4.0
"""Mean of levels: of the JPEGs, and of resizing a JPEG while it is decoded."""
FLIPS = 40


def drawn() -> Image.Image:
    """Smooth colours, other at each corner."""
    return noise(WIDTH, HEIGHT).filter(ImageFilter.GaussianBlur(8))


def rgba() -> Image.Image:
    """The same with transparency from left to right."""
    image = drawn().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").rotate(90).resize(image.size))
    return image


def of_16_bits() -> bytes:
    rows = (np.asarray(drawn()).astype(np.uint16) * 257).astype(">u2")
    return png_of(WIDTH, HEIGHT, b"".join(b"\0" + row.tobytes() for row in rows), depth=16)


FILES = {
    **{
        f"JPEG, EXIF {each}": encoded(drawn(), "JPEG", quality=95, exif=exif_of(each)) for each in range(1, 9)
    },
    "JPEG, CMYK": encoded(drawn().convert("CMYK"), "JPEG", quality=95),
    "JPEG, grey": encoded(drawn().convert("L"), "JPEG", quality=95),
    "JPEG, progressive": encoded(drawn(), "JPEG", quality=95, progressive=True),
    "PNG, EXIF 6": encoded(drawn(), "PNG", exif=exif_of(6)),
    "PNG, alpha": encoded(rgba(), "PNG"),
    "PNG, palette": encoded(drawn().quantize(256), "PNG"),
    "PNG, 16 bits": of_16_bits(),
    "WEBP, EXIF 8": encoded(drawn(), "WEBP", quality=95, exif=exif_of(8)),
    "WEBP, alpha": encoded(rgba(), "WEBP", lossless=True),
}


def viewed(name: str) -> Image.Image:
    """What a viewer shows of a file, by Pillow alone; transparency is on white."""
    if name == "PNG, 16 bits":
        return drawn()
    image = drawn().convert("CMYK").convert("RGB") if "CMYK" in name else drawn()
    if "grey" in name:
        image = image.convert("L").convert("RGB")
    if "alpha" in name:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, rgba()).convert("RGB")
    if "EXIF" in name and "WEBP" not in name:  # as in Chromium
        turned = Image.new("RGB", image.size)
        turned.paste(image)
        turned.getexif()[0x0112] = int(name[-1])
        image = ImageOps.exif_transpose(turned)
    return image


def read(data: bytes) -> ImageFile:
    return read_image_file(data, max_pixels=10**6)


@pytest.mark.parametrize("max_side_px", MAX_SIDES)
@pytest.mark.parametrize("name", FILES)
def test_preview_is_what_a_viewer_shows(name: str, max_side_px: int) -> None:
    """Its size is the viewer's, scaled; so are its content and its orientation."""
    preview = decode_preview(read(FILES[name]), max_side_px)
    expected = viewed(name)
    assert (preview.width, preview.height) == expected.size
    scale = min(1.0, max_side_px / WIDTH)
    size = round(expected.width * scale), round(expected.height * scale)
    assert preview.pixels.shape == (size[1], size[0], 3)
    levels = np.asarray(expected.resize(size, Image.Resampling.BOX))
    assert np.abs(levels.astype(np.float64) - preview.pixels).mean() < MAX_DIFFERENCE


def outcome(decode: Callable[[ImageFile, int], LocalImage], data: bytes) -> str:
    """`decoded`, or the message of the refusal; any other error is raised."""
    try:
        decode(read(data), MAX_SIDES[1])
    except UnsupportedImage as refusal:
        return str(refusal)
    return "decoded"


@pytest.mark.parametrize("name", FILES)
def test_damaged_file_has_one_answer(name: str) -> None:
    """A file that is cut or changed is decoded for the model and for the preview, or refused for both."""
    data, generator = FILES[name], random.Random(0)  # noqa: S311 - no secret
    damaged = [data[: len(data) * part // 8] for part in range(1, 8)]
    for _ in range(FLIPS):
        place = generator.randrange(len(data))
        damaged.append(data[:place] + bytes([data[place] ^ 1 << generator.randrange(8)]) + data[place + 1 :])
    answers = [(outcome(decode_square, each), outcome(decode_preview, each)) for each in damaged]
    assert all(model == preview for model, preview in answers), answers
    assert any(model != "decoded" for model, _ in answers)
