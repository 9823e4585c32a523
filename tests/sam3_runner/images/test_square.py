"""Conversion of any image to the model's square, as a viewer shows it."""

from __future__ import annotations

import io
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's usual alias
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from sam3_runner import UnsupportedImage
from sam3_runner.images.decode import decode_square
from sam3_runner.images.read import read_image_file
from sam3_runner.images.square import to_square
from tests.image_files import FORMATS, encoded, exif_of, noise, png_chunk, png_of, primaries_of, with_chunks

if TYPE_CHECKING:
    from sam3_runner.images.decoded import LocalImage

SIDE_PX = 48
MAX_PIXELS = 1_000_000
Levels = npt.NDArray[np.uint8]


def square_of(data: bytes, side_px: int = SIDE_PX, max_pixels: int = MAX_PIXELS) -> LocalImage:
    return decode_square(read_image_file(data, max_pixels=max_pixels), side_px)


def stored(levels: Levels, kind: str = "PNG", **options: object) -> Levels:
    """The square of a file with these levels, where the square has the image's own size."""
    side_px, _, *_ = levels.shape
    return square_of(encoded(Image.fromarray(levels), kind, **options), side_px).pixels


def grid(*channels: int) -> Levels:
    """16 x 16 px: every 8-bit level in the first channel; the other channels are constant."""
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    return np.stack([levels, *(np.full_like(levels, level) for level in channels)], axis=-1)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_lossless_pixels_are_kept(kind: str) -> None:
    """A lossless image of the square's size is not changed."""
    options = {"lossless": True} if kind == "WEBP" else {}
    levels = np.asarray(noise(SIDE_PX, SIDE_PX))
    assert np.array_equal(stored(levels, kind, **options), levels)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparent_is_white(kind: str) -> None:
    """Transparent pixels become white, half transparent ones are mixed with white, opaque ones stay."""
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    assert (stored(grid(0, 0, 0), kind, **options) == 255).all()
    assert np.array_equal(stored(grid(7, 8, 255), kind, **options), grid(7, 8))
    half = stored(grid(0, 0, 128), kind, **options).astype(int)
    assert np.abs(half - (grid(0, 0) * (128 / 255) + 127)).max() <= 1


def test_grey_with_alpha_is_composited_on_white() -> None:
    """Grey images with alpha are composited on white too."""
    light, dark = (stored(grid(alpha)) for alpha in (0, 255))
    assert (light == 255).all()
    assert np.array_equal(dark[..., 0], grid()[..., 0])


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_one_transparent_colour(mode: str) -> None:
    """Pixels of a PNG's transparent colour (tRNS) become white, in every mode."""
    black = Image.new("RGB", (16, 16))
    black.paste((255, 255, 255) if mode == "1" else (200, 0, 0), (0, 0, 8, 16))
    image = black.convert(mode)
    key = {"RGB": (0, 0, 0), "P": image.getpixel((15, 0))}.get(mode, 0)
    square = square_of(encoded(image, "PNG", transparency=key), 16).pixels
    assert (square[:, 8:] == 255).all()
    assert np.array_equal(square[:, :8], np.asarray(image.convert("RGB"))[:, :8])


def test_transparent_palette() -> None:
    """Entries of a palette may be half transparent."""
    image = Image.new("P", (16, 16), 1)
    image.putpalette([0, 0, 0, 100, 0, 0])
    assert square_of(encoded(image, "PNG", transparency=bytes([255, 128])), 16).pixels[0, 0].tolist() == [
        177,
        127,
        127,
    ]


def sixteen_bits(levels: npt.NDArray[np.integer], colour: int) -> bytes:
    """A PNG with 16 bits per channel."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    return png_of(16, 16, rows, depth=16, colour=colour)


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_are_scaled(colour: int, channels: int) -> None:
    """Images with 16 bits per channel are scaled, with and without alpha; Pillow would clip grey ones."""
    levels = np.arange(256).reshape(16, 16, 1)
    wide = np.concatenate([levels] * (channels - (channels % 2 == 0)), axis=-1) * 257
    if channels % 2 == 0:
        wide = np.concatenate([wide, np.full_like(levels, 65535)], axis=-1)
    square = square_of(sixteen_bits(wide, colour), 16).pixels
    assert np.array_equal(square, np.repeat(levels, 3, axis=-1))


def test_sixteen_bits_with_a_transparent_level() -> None:
    """Pixels of the transparent level of a 16-bit grey PNG become white."""
    levels = np.arange(256).reshape(16, 16, 1) * 257
    data = with_chunks(sixteen_bits(levels, 0), png_chunk(b"tRNS", (257).to_bytes(2)))
    assert square_of(data, 16).pixels[0, :3, 0].tolist() == [0, 255, 2]


@pytest.mark.parametrize(
    ("mode", "brightest", "scale"),
    [
        ("I", 255, 1),
        ("I", 65535, 1 / 257),
        ("I", 10**6, 255 / 10**6),
        ("F", 1.0, 255),
        ("F", 255.0, 1),
        ("F", 9e4, 255 / 9e4),
    ],
)
def test_modes_without_a_range(mode: str, brightest: float, scale: float) -> None:
    """Images of modes I and F are scaled by a range that depends on their brightest pixel."""
    values = np.linspace(0, brightest, 256).reshape(16, 16)
    image = Image.fromarray(values.astype(np.int32 if mode == "I" else np.float32))
    assert image.mode == mode
    grey = to_square(image, 16).pixels[..., 0].astype(float)
    assert np.abs(grey - values * scale).max() <= 1


def image_of_mode(mode: str) -> Image.Image:
    """The noise image in one of Pillow's modes."""
    if mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        converted = ImageCms.profileToProfile(noise(), srgb, lab, outputMode="LAB")
        assert converted is not None
        return converted
    if mode in {"La", "RGBa"}:
        return noise().convert(mode[:-1] + "A").convert(mode)
    if mode == "I;16":
        return Image.fromarray(np.asarray(noise().convert("L")).astype(np.uint16) * 257)
    return noise().convert(mode)


@pytest.mark.parametrize(
    "mode",
    [
        "1",
        "L",
        "LA",
        "La",
        "P",
        "PA",
        "RGB",
        "RGBA",
        "RGBa",
        "RGBX",
        "CMYK",
        "YCbCr",
        "HSV",
        "LAB",
        "I",
        "F",
        "I;16",
    ],
)
def test_every_mode_of_pillow(mode: str) -> None:
    """Every mode of Pillow is converted."""
    image = image_of_mode(mode)
    square = to_square(image, SIDE_PX)
    assert square.pixels.shape == (SIDE_PX, SIDE_PX, 3)
    assert 60 < square.pixels.mean() < 200


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation(kind: str, orientation: int) -> None:
    """An image is rotated by its EXIF orientation, and its size is the one that a viewer shows."""
    data = encoded(noise(), kind, exif=exif_of(orientation))
    square = square_of(data)
    with Image.open(io.BytesIO(data)) as opened:
        expected = ImageOps.exif_transpose(opened)
        assert (square.width, square.height) == expected.size
        assert np.abs(square.pixels.astype(int) - to_square(expected, SIDE_PX).pixels).max() <= 1
        assert np.array_equal(to_square(opened, SIDE_PX).pixels, square.pixels)


def test_exif_of_webp_is_ignored() -> None:
    """The EXIF orientation of a WEBP is ignored, for a file and for an opened image."""
    data = encoded(noise(), "WEBP", exif=exif_of(6))
    with Image.open(io.BytesIO(data)) as opened:
        for square in (square_of(data), to_square(opened, SIDE_PX)):
            assert (square.width, square.height) == (40, 30)


def test_orientation_in_xmp_is_ignored() -> None:
    """XMP's orientation is ignored, as in browsers."""
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = encoded(noise(), "JPEG", xmp=xmp)
    with Image.open(io.BytesIO(data)) as opened:
        for square in (square_of(data), to_square(opened, SIDE_PX)):
            assert (square.width, square.height) == (40, 30)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_first_frame_of_an_animation(kind: str) -> None:
    """Only the first frame of an animation is used."""
    frames = [noise(), Image.new("RGB", noise().size)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    assert np.array_equal(square_of(data).pixels, to_square(noise(), SIDE_PX).pixels)


def test_first_frame_that_is_smaller_than_the_image() -> None:
    """The area outside of an animation's smaller first frame is white."""
    first = Image.new("RGBA", (48, 48))
    first.paste((200, 0, 0, 255), (16, 20, 32, 36))
    data = encoded(first, "WEBP", save_all=True, append_images=[noise(48, 48)], lossless=True)
    data = data.replace(b"ANMF", b"ANMF", 1)
    pixels = square_of(data).pixels
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[28, 24].tolist() == [200, 0, 0]


@pytest.mark.parametrize("kind", FORMATS)
def test_wide_profiles_are_converted(kind: str) -> None:
    """A colour in a wide-gamut profile is converted to the more saturated sRGB colour that a viewer shows."""
    levels = np.full((SIDE_PX, SIDE_PX, 3), (180, 60, 60), dtype=np.uint8)
    profile = primaries_of("Display P3")
    red, green, blue = stored(levels, kind, icc_profile=profile, quality=100)[20, 20].astype(int)
    assert red > 187
    assert green < 50
    opened = Image.fromarray(levels)
    opened.info["icc_profile"] = profile
    assert np.abs(to_square(opened, SIDE_PX).pixels[20, 20].astype(int) - (red, green, blue)).max() < 6


@pytest.mark.parametrize(
    "profile", [primaries_of("sRGB"), b"no profile", b"", bytes(200), primaries_of("ProPhoto")[:300]]
)
def test_profiles_without_effect(profile: bytes) -> None:
    """The profile of sRGB itself, and an unreadable one, change no pixel."""
    levels = np.asarray(noise(SIDE_PX, SIDE_PX))
    assert np.array_equal(stored(levels, icc_profile=profile), levels)


def test_multi_picture_jpeg() -> None:
    """Of a phone's multi-picture JPEG the first picture is used."""
    data = encoded(noise(), "MPO", save_all=True, append_images=[Image.new("RGB", (40, 30))])
    alone = encoded(noise(), "JPEG")
    assert np.array_equal(square_of(data).pixels, square_of(alone).pixels)


def test_cmyk() -> None:
    """A CMYK JPEG without a profile is converted as Pillow does."""
    cmyk = noise().convert("CMYK")
    data = encoded(cmyk, "JPEG", quality=100, subsampling=0)
    difference = square_of(data).pixels.astype(int) - to_square(cmyk.convert("RGB"), SIDE_PX).pixels
    assert np.abs(difference).mean() < 3


@pytest.mark.parametrize(("width", "height"), [(333, 500), (1200, 700), (40, 30), (3000, 2), (1, 3000)])
def test_resize_rounds_once(width: int, height: int) -> None:
    """The square equals torch's antialiased resize in floating point, rounded once at the end."""
    image = noise(width, height)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float()
    exact = F.interpolate(pixels, (112, 112), mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    square = to_square(image, 112)
    assert (square.width, square.height) == (width, height)
    difference = square.pixels.astype(int) - exact.round().numpy().astype(int)
    assert np.abs(difference).max() <= 1
    assert np.mean(difference != 0) < 0.005


def test_bands_do_not_change_the_result() -> None:
    """An image that is resized in many bands gives the square of the whole image."""
    image = noise(3000, 2500)
    whole = [
        np.rint(np.asarray(plane.convert("F").resize((100, 100), Image.Resampling.BILINEAR)))
        for plane in image.split()
    ]
    difference = to_square(image, 100).pixels.astype(int) - np.stack(whole, axis=-1).astype(int)
    assert np.abs(difference).max() <= 1
    assert np.mean(difference != 0) < 0.001


def test_reduced_jpeg() -> None:
    """A JPEG decoded at half its size gives nearly the same square, and its full size."""
    photo = noise(120, 90).resize((2400, 1800), Image.Resampling.BICUBIC)
    whole = square_of(encoded(photo, "JPEG", progressive=True), max_pixels=10**7)
    file = read_image_file(encoded(photo, "JPEG", progressive=True), max_pixels=10**7)
    reduced = decode_square(replace(file, reduced=True), SIDE_PX)
    assert (reduced.width, reduced.height) == (2400, 1800)
    assert np.abs(reduced.pixels.astype(int) - whole.pixels).max() <= 3


@given(
    kind=st.sampled_from(FORMATS),
    edits=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=8),
    cut=st.none() | st.integers(0, 10_000),
)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_mutated_files(kind: str, edits: list[tuple[int, int]], cut: int | None) -> None:
    """Any change of a file gives a square or UnsupportedImage."""
    data = bytearray(encoded(noise(), kind, exif=exif_of(6)))
    for position, value in edits:
        data[position % len(data)] = value
    try:
        square = square_of(bytes(data[:cut]))
    except UnsupportedImage as refusal:
        assert "image" in str(refusal)  # noqa: PT017 - both results are right
    else:
        assert square.width * square.height <= MAX_PIXELS


def test_warning_filters_are_unchanged() -> None:
    """Decoding on several threads does not change the process' warning filters."""
    filters = list(warnings.filters)
    data = [encoded(noise(), kind, exif=exif_of(6)) for kind in FORMATS] * 100
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(square_of, data))
    assert warnings.filters == filters
