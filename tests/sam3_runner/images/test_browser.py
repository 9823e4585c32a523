"""Squares compared with the same files in a real Chromium."""

from __future__ import annotations

import base64
import struct
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from playwright.sync_api import sync_playwright

from sam3_runner.images.decode import decode_square
from sam3_runner.images.read import read_image_file
from sam3_runner.images.square import to_square
from tests.image_files import (
    PICTURES,
    encoded,
    exif_of,
    png_chunk,
    png_of,
    primaries_of,
    with_chunks,
    with_segments,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Page

pytestmark = pytest.mark.browser

SIDE_PX = 48
PIXELS_ON_WHITE = """async (url) => {
    const image = new Image();
    image.src = url;
    await image.decode();
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    const context = canvas.getContext("2d", {colorSpace: "srgb"});
    context.fillStyle = "white";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(image, 0, 0);
    const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
    let text = "";
    for (let start = 0; start < pixels.length; start += 4096)
        text += String.fromCharCode(...pixels.subarray(start, start + 4096));
    return [canvas.width, canvas.height, btoa(text)];
}"""
"""As base64, since the browser's protocol needs seconds for a million numbers."""


@pytest.fixture(scope="module")
def page(chromium: str) -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-background-networking",
                "--force-color-profile=srgb",
            ],
        )
        yield browser.new_page()
        browser.close()


def ramps() -> Image.Image:
    """A smooth picture without symmetry."""
    y, x = np.mgrid[0:SIDE_PX, 0:SIDE_PX]
    return Image.fromarray(np.stack([x * 5, y * 5, (x + y) * 2], axis=-1).astype(np.uint8))


def fading() -> Image.Image:
    """The same picture, with alpha from 0 at the left to 255 at the right."""
    picture = ramps()
    alpha = np.tile(np.linspace(0, 255, SIDE_PX).astype(np.uint8), (SIDE_PX, 1))
    picture.putalpha(Image.fromarray(alpha))
    return picture


PNG, JPEG = encoded(ramps(), "PNG"), encoded(ramps(), "JPEG", quality=95)
ROTATED_EXIF = exif_of(6)
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    b"</rdf:RDF></x:xmpmeta>"
)


def small_first_frame() -> bytes:
    first = Image.new("RGBA", (SIDE_PX, SIDE_PX))
    first.paste((200, 0, 0, 255), (16, 20, 32, 36))
    return encoded(first, "WEBP", save_all=True, append_images=[ramps()], lossless=True)


FILES: dict[str, bytes] = {
    **{f"JPEG, orientation {n}": encoded(ramps(), "JPEG", exif=exif_of(n), quality=95) for n in range(1, 9)},
    **{f"PNG, orientation {n}": encoded(ramps(), "PNG", exif=exif_of(n)) for n in range(1, 9)},
    "WEBP, orientation 6": encoded(ramps(), "WEBP", exif=ROTATED_EXIF, lossless=True),
    "JPEG, orientation in XMP": encoded(ramps(), "JPEG", xmp=XMP, quality=95),
    "WEBP, orientation in XMP": encoded(ramps(), "WEBP", xmp=XMP, lossless=True),
    "JPEG, two EXIFs": with_segments(JPEG, (0xE1, exif_of(3)), (0xE1, ROTATED_EXIF)),
    "PNG, EXIF with JPEG's prefix": with_chunks(PNG, png_chunk(b"eXIf", ROTATED_EXIF)),
    "PNG, EXIF after the pixels": PNG[:-12] + png_chunk(b"eXIf", ROTATED_EXIF[6:]) + PNG[-12:],
    "PNG, EXIF with a wrong checksum": with_chunks(PNG, png_chunk(b"eXIf", ROTATED_EXIF[6:], checksum=1)),
    "PNG, transparency with a wrong checksum": with_chunks(PNG, png_chunk(b"tRNS", bytes(6), checksum=1)),
    "PNG without its end": PNG[:-12],
    "PNG with alpha": encoded(fading(), "PNG"),
    "PNG with grey and alpha": encoded(fading().convert("LA"), "PNG"),
    "PNG with a transparent colour": encoded(ramps(), "PNG", transparency=(0, 0, 0)),
    "PNG of 16 bits": png_of(
        SIDE_PX,
        SIDE_PX,
        b"".join(
            b"\0" + (row.astype(">u2") * 257).tobytes() for row in np.asarray(ramps()).reshape(SIDE_PX, -1)
        ),
        depth=16,
    ),
    "PNG, declared sRGB": with_chunks(
        PNG, png_chunk(b"sRGB", b"\0"), png_chunk(b"gAMA", struct.pack(">I", 45455))
    ),
    "WEBP with alpha": encoded(fading(), "WEBP", lossless=True),
    "lossy WEBP with alpha": encoded(fading(), "WEBP", quality=95),
    "WEBP, small first frame": small_first_frame(),
    "JPEG of CMYK": encoded(ramps().convert("CMYK"), "JPEG", quality=95),
    **{
        f"{kind}, profile of {name}": encoded(
            ramps(),
            kind,
            icc_profile=primaries_of(name),
            **({"quality": 95} if kind == "JPEG" else {"lossless": True}),
        )
        for kind in ("JPEG", "PNG", "WEBP")
        for name in ("sRGB", "Display P3", "ProPhoto")
    },
    "PNG, invalid profile": encoded(ramps(), "PNG", icc_profile=b"none"),
    **{path.name: path.read_bytes() for path in sorted(PICTURES.iterdir())},
}


def drawn_by_browser(page: Page, data: bytes) -> npt.NDArray[np.uint8]:
    """The picture as Chromium draws it on white, (height, width, 3)."""
    url = "data:;base64," + base64.b64encode(data).decode()
    width, height, pixels = page.evaluate(PIXELS_ON_WHITE, url)
    levels = np.frombuffer(base64.b64decode(pixels), dtype=np.uint8)
    return levels.reshape(height, width, 4)[..., :3]


@pytest.mark.parametrize("name", FILES)
def test_equals_the_browser(page: Page, name: str) -> None:
    """Size, orientation, transparency and colours equal those of the browser."""
    expected = drawn_by_browser(page, FILES[name])
    square = decode_square(read_image_file(FILES[name], max_pixels=10**6), SIDE_PX)
    assert (square.height, square.width, 3) == expected.shape
    difference = square.pixels.astype(int) - to_square(Image.fromarray(expected), SIDE_PX).pixels
    assert np.abs(difference).mean() < 0.6
