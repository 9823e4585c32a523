"""Bytes from strangers: what is decoded, how, and what is refused."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name that every PyTorch reader knows
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from sam3_runner import UnsupportedImage
from sam3_runner.images import decode_image, encode_png, squash, to_rgb

MAX_PIXELS = 1_000_000
FORMATS = ("PNG", "JPEG", "WEBP")


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@cache
def picture(width: int = 40, height: int = 30) -> Image.Image:
    levels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


@cache
def sample(kind: str) -> bytes:
    """A small image with EXIF in each format."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(), kind, exif=exif.tobytes())


def decoded(data: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    image = decode_image(data, max_pixels=MAX_PIXELS)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_lossless_pixels_are_kept(kind: str) -> None:
    """A lossless image gives exactly its pixels."""
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(decoded(encoded(picture(), kind, **options)), np.asarray(picture()))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_modes_become_rgb(mode: str) -> None:
    """Every mode of a PNG becomes RGB as Pillow would show it."""
    image = picture().convert(mode)
    assert np.array_equal(decoded(encoded(image, "PNG")), np.asarray(image.convert("RGB")))


def test_transparent_palette() -> None:
    """A palette with transparent entries is decoded to its colours, without a warning."""
    image = picture().quantize(16)
    data = encoded(image, "PNG", transparency=bytes([0, 128] * 8))
    assert np.array_equal(decoded(data), np.asarray(image.convert("RGB")))


def test_sixteen_bits_are_scaled() -> None:
    """16-bit greys keep their gradation; Pillow alone would clip all but the darkest to white."""
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    image = Image.fromarray(levels * np.uint16(257))
    grey = decoded(encoded(image, "PNG"))
    assert np.array_equal(grey[..., 0], levels)
    assert np.array_equal(grey[..., 0], grey[..., 2])


def test_sixteen_bit_colours() -> None:
    """A PNG of 16 bits a channel is decoded to its upper eight."""
    levels = np.asarray(picture(), dtype=">u2") * 257
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40, 30, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
    assert np.array_equal(decoded(data + chunk(b"IEND", b"")), np.asarray(picture()))


@pytest.mark.parametrize("kind", FORMATS)
def test_exif_orientation(kind: str) -> None:
    """An image whose EXIF says that it lies on its side is stood up."""
    assert decoded(sample(kind)).shape == (40, 30, 3)
    if kind == "PNG":
        assert np.array_equal(decoded(sample(kind)), np.rot90(np.asarray(picture()), -1))


@pytest.mark.parametrize("orientation", [0, 1, 9, 65535])
def test_exif_orientation_without_meaning(orientation: int) -> None:
    """An orientation that means nothing changes nothing."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(decoded(encoded(picture(), "PNG", exif=exif.tobytes())), np.asarray(picture()))


def test_first_frame_of_an_animation() -> None:
    """Only the first frame of an animated image counts."""
    frames = [picture(), Image.new("RGB", picture().size)]
    for kind in ("PNG", "WEBP"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert np.array_equal(decoded(data), np.asarray(picture()))


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "BMP", "ICO", "PPM", "PDF", "TGA"])
def test_other_formats_are_refused(kind: str) -> None:
    """Formats that Pillow would read, but that are not promised, are refused."""
    with pytest.raises(UnsupportedImage, match="not a PNG, JPEG or WEBP"):
        decoded(encoded(picture(), kind))


def test_mpo_is_a_jpeg() -> None:
    """A phone's multi-picture JPEG is a JPEG."""
    data = encoded(picture(), "MPO", save_all=True, append_images=[picture()])
    assert decoded(data).shape == (30, 40, 3)


def test_pixel_cap() -> None:
    """An image of exactly the cap is decoded, one more row is refused with both numbers."""
    assert decode_image(encoded(Image.new("L", (100, 100)), "PNG"), max_pixels=10_000).size == (100, 100)
    with pytest.raises(UnsupportedImage, match="100 x 101 pixels; at most 10000"):
        decode_image(encoded(Image.new("L", (100, 101)), "PNG"), max_pixels=10_000)


def test_cap_is_checked_before_pixels_are_decoded() -> None:
    """A bomb of 400 megapixels costs no memory: it is refused by its header."""
    bomb = encoded(Image.new("1", (20_000, 20_000)), "PNG")
    tracemalloc.start()
    try:
        with pytest.raises(UnsupportedImage, match="pixels"):
            decode_image(bomb, max_pixels=50_000_000)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_cut_off_files_are_refused(kind: str, share: float) -> None:
    """A file that ends early is refused, not filled with grey."""
    data = encoded(picture(200, 200), kind)
    with pytest.raises(UnsupportedImage):
        decoded(data[: int(len(data) * share)])


@given(
    kind=st.sampled_from(FORMATS),
    edits=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=8),
    cut=st.none() | st.integers(0, 10_000),
)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_mutated_files(kind: str, edits: list[tuple[int, int]], cut: int | None) -> None:
    """Whatever happened to a file, it is an RGB image within the cap, or UnsupportedImage."""
    data = bytearray(sample(kind))
    for position, value in edits:
        data[position % len(data)] = value
    decodes_or_refuses(bytes(data[:cut]))


@given(
    start=st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\0\0\1\0WEBPVP8X"]),
    rest=st.binary(),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_bytes(start: bytes, rest: bytes) -> None:
    """Any bytes are an image or UnsupportedImage, even behind a good signature."""
    decodes_or_refuses(start + rest)


def decodes_or_refuses(data: bytes) -> None:
    try:
        image = decode_image(data, max_pixels=MAX_PIXELS)
    except UnsupportedImage as refusal:
        assert "image" in str(refusal)  # noqa: PT017 - both ends are right
    else:
        assert image.mode == "RGB"
        assert image.width * image.height <= MAX_PIXELS


def test_squash() -> None:
    """The model's square is the whole image, aspect or not, resized on uint8 with antialiasing."""
    image = picture(300, 100)
    square = squash(image, 56)
    assert square.pixels.shape == (56, 56, 3)
    assert square.pixels.dtype == np.uint8
    assert (square.width, square.height) == (300, 100)
    means = np.asarray(image).reshape(100, 300, 3).mean(axis=(0, 1))
    assert np.abs(square.pixels.mean(axis=(0, 1)) - means).max() < 3


@pytest.mark.parametrize(("width", "height"), [(333, 500), (1200, 700), (40, 30)])
def test_squash_rounds_once(width: int, height: int) -> None:
    """The square is that of torchvision on a GPU, but for values that lie between two: one rounding, last."""
    image = picture(width, height)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float()
    exact = F.interpolate(pixels, (112, 112), mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    difference = squash(image, 112).pixels.astype(int) - exact.round().numpy().astype(int)
    assert np.abs(difference).max() <= 1
    assert np.mean(difference != 0) < 0.005


def test_to_rgb_keeps_rgb() -> None:
    """An RGB image is passed on as it is."""
    assert to_rgb(picture()) is picture()


@given(width=st.integers(1, 70), height=st.integers(1, 70), seed=st.integers(0, 100))
@settings(max_examples=50, deadline=None)
def test_mask_png(width: int, height: int, seed: int) -> None:
    """A mask comes back from its PNG pixel by pixel, as one grey channel of 0 and 255."""
    mask = np.random.default_rng(seed).random((height, width)) < 0.5
    with Image.open(io.BytesIO(encode_png(mask))) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "L", (width, height))
        assert np.array_equal(np.asarray(image), np.where(mask, 255, 0))


def test_pillow_reads_webp() -> None:
    """This build of Pillow has its WEBP decoder; without it every WEBP would be refused."""
    assert features.check("webp")
