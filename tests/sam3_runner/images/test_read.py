"""The metadata of untrusted image files, and the limits of a file."""

from __future__ import annotations

import struct
import tracemalloc
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sam3_runner import UnsupportedImage
from sam3_runner.images import jpeg, png
from sam3_runner.images.image_file import MAX_PROFILE_BYTES, ImageFile
from sam3_runner.images.read import read_image_file
from tests.image_files import (
    FORMATS,
    PNG_SIGNATURE,
    encoded,
    exif_of,
    noise,
    png_chunk,
    png_of,
    with_chunks,
    with_scans,
    with_segments,
)

MAX_PIXELS = 2**26


def read(data: bytes, max_pixels: int = MAX_PIXELS) -> ImageFile:
    return read_image_file(data, max_pixels=max_pixels)


@pytest.mark.parametrize("kind", FORMATS)
def test_metadata_of_a_file(kind: str) -> None:
    """Format, stored size, orientation and profile are read from a file."""
    file = read(encoded(noise(), kind, exif=exif_of(6), icc_profile=b"profile" * 10_000))
    assert (file.kind, file.width, file.height) == (kind, 40, 30)
    assert file.orientation == (1 if kind == "WEBP" else 6)
    assert file.icc_profile == b"profile" * 10_000
    assert b"profile" not in file.data
    assert b"Exif" not in file.data


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "BMP", "ICO", "PPM", "PDF", "TGA"])
def test_other_formats_are_refused(kind: str) -> None:
    """Formats that Pillow reads, but that the contract does not list, are refused."""
    with pytest.raises(UnsupportedImage, match="not a PNG, JPEG or WEBP"):
        read(encoded(noise(), kind))


@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"Exif\0\0",
        b"Exif\0\0" + bytes(40),
        b"Exif\0\0http://ns.adobe.com/xap/1.0/",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0II*\0" + struct.pack("<LH", 8, 65535),
        exif_of(0),
        exif_of(9),
        exif_of(65535),
    ],
)
@pytest.mark.parametrize("kind", FORMATS)
def test_invalid_exif(kind: str, exif: bytes) -> None:
    """EXIF that cannot be read, or that has an invalid orientation, is ignored."""
    assert read(encoded(noise(), kind, exif=exif)).orientation == 1


def test_orientation_after_an_invalid_entry() -> None:
    """An entry whose value is outside of the file does not hide the orientation."""
    invalid = struct.pack("<HHLL", 0x010E, 2, 2**31, 2**31)
    rotated = struct.pack("<HHLHH", 0x0112, 3, 1, 8, 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<LH", 8, 2) + invalid + rotated
    assert read(with_segments(encoded(noise(), "JPEG"), (0xE1, exif))).orientation == 8


def test_first_exif_applies() -> None:
    """Of several EXIF segments the first applies, also of 501."""
    data = with_segments(encoded(noise(), "JPEG"), (0xE1, exif_of(3)), *[(0xE1, exif_of(6))] * 500)
    assert read(data).orientation == 3


ZEROS = zlib.compress(bytes(100_000_000))


@pytest.mark.parametrize(
    "chunk",
    [
        png_chunk(b"zTXt", b"key\0\0" + ZEROS),
        png_chunk(b"iTXt", b"key\0\1\0\0\0" + ZEROS),
        png_chunk(b"iCCP", b"name\0\0" + ZEROS),
        png_chunk(b"iCCP", b"name\0\0no zlib"),
        png_chunk(b"iCCP", b""),
        png_chunk(b"eXIf", b""),
        png_chunk(b"pHYs", b"\0"),
        png_chunk(b"tIME", bytes(7), checksum=1),
        png_chunk(b"tRNS", bytes(6), checksum=1),
        png_chunk(b"prVt", bytes(100)),
    ],
    ids=lambda chunk: chunk[4:8].decode(),
)
def test_invalid_png_metadata_is_ignored(chunk: bytes) -> None:
    """Chunks that pixels do not need can be invalid or huge: the picture is read, in bounded memory."""
    data = with_chunks(encoded(noise(), "PNG"), chunk)
    tracemalloc.start()
    try:
        file = read(data)
        assert tracemalloc.get_traced_memory()[1] < MAX_PROFILE_BYTES * 3
    finally:
        tracemalloc.stop()
    assert (file.data, file.icc_profile) == (encoded(noise(), "PNG"), b"")


def test_png_without_its_end() -> None:
    """A PNG that ends right after its pixels, or in a later chunk, is complete."""
    data = encoded(noise(), "PNG")
    for end in (-12, -7, -1):
        assert read(data[:end]).width == 40
    for end in (-13, data.index(b"IDAT") - 4):
        with pytest.raises(UnsupportedImage, match="damaged: it ends early"):
            read(data[:end])


@pytest.mark.parametrize("kind", [b"IHDR", b"IDAT", b"IEND"])
def test_checksums_of_pixels_are_checked(kind: bytes) -> None:
    """A file with a wrong checksum in a chunk that the pixels need is refused as damaged."""
    data = bytearray(encoded(noise(), "PNG"))
    start = data.index(kind)
    [length] = struct.unpack_from(">I", data, start - 4)
    data[start + 4 + length] ^= 1
    with pytest.raises(UnsupportedImage, match="damaged: a checksum"):
        read(bytes(data))


@pytest.mark.parametrize(
    ("parts", "profile"),
    [
        ([b"\1\2ab", b"\2\2cd"], b"abcd"),
        ([b"\2\2cd", b"\1\2ab"], b"abcd"),
        ([b"\1\2ab"], b""),
        ([b"\1\2ab", b"\1\2cd"], b""),
        ([b"\0\1ab"], b""),
        ([b"", b"\1"], b""),
    ],
)
def test_profile_in_parts(parts: list[bytes], profile: bytes) -> None:
    """A JPEG's colour profile is joined by the numbers of its parts, or ignored where one is missing."""
    segments = [(0xE2, b"ICC_PROFILE\0" + part) for part in parts]
    assert read(with_segments(encoded(noise(), "JPEG"), *segments)).icc_profile == profile


def test_pixel_limit() -> None:
    """An image of exactly the limit is read; for one more row the error has both numbers."""
    assert read(encoded(Image.new("L", (100, 100)), "PNG"), 10_000).width == 100
    with pytest.raises(UnsupportedImage, match="100 x 101 pixels; at most 10000"):
        read(encoded(Image.new("L", (100, 101)), "PNG"), 10_000)


@pytest.mark.parametrize(("width", "height"), [(65_536, 1), (1, 65_536), (50_000_000, 1)])
def test_side_limit(width: int, height: int) -> None:
    """A side of more than 65,535 px is refused, whatever the number of pixels."""
    with pytest.raises(UnsupportedImage, match="65535 are allowed on a side"):
        read(png_of(width, height, b""))


@pytest.mark.parametrize(("width", "height"), [(8160, 6144), (8192, 6144), (8192, 8192)])
def test_photos_of_50_megapixel_phones(width: int, height: int) -> None:
    """Photos of phones with "50 megapixels", which have up to 67, are read at full size."""
    photo = bytearray(encoded(noise(), "JPEG"))
    start = photo.index(b"\xff\xc0") + 5
    photo[start : start + 4] = struct.pack(">HH", height, width)
    file = read(bytes(photo))
    assert (file.width, file.height, file.reduced) == (width, height, False)


def progressive(width: int, height: int, subsampling: int) -> bytes:
    """A progressive JPEG whose header has this size."""
    data = bytearray(encoded(noise(), "JPEG", progressive=True, subsampling=subsampling))
    start = data.index(b"\xff\xc2") + 5
    data[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize(
    ("width", "height", "subsampling", "reduced"),
    [(8192, 6144, 2, False), (8192, 6144, 0, True), (8192, 8192, 2, True)],
)
def test_large_progressive_jpegs_are_reduced(
    width: int, height: int, subsampling: int, *, reduced: bool
) -> None:
    """A progressive JPEG whose coefficients and pixels exceed the memory limit is decoded at half size."""
    assert read(progressive(width, height, subsampling)).reduced == reduced


def test_too_much_memory_is_refused() -> None:
    """An image that exceeds the limit at half size as well is refused with its size and the limit."""
    with pytest.raises(UnsupportedImage, match=r"8192 x 8192 .* take \d+ MB to decode; at most 405 MB"):
        read(progressive(8192, 8192, 0))


def test_scans_are_limited() -> None:
    """A JPEG with as many scans as encoders write is read; one with thousands is refused."""
    data = encoded(noise(), "JPEG", progressive=True)
    assert read(with_scans(data, 20)).width == 40
    with pytest.raises(UnsupportedImage, match="more than 100 scans"):
        read(with_scans(data, 10_000))


def test_scans_of_a_large_image_are_limited_further() -> None:
    """A large image may have fewer scans, since each may update the whole image."""
    data = progressive(8192, 6144, 2)
    with pytest.raises(UnsupportedImage, match="30 scans, too many for 8192 x 6144 pixels"):
        read(with_scans(data, 30 - data.count(b"\xff\xda")))


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        (with_chunks(encoded(noise(), "PNG"), png_chunk(b"prVt", b"") * png.MAX_CHUNKS), "chunks"),
        (with_segments(encoded(noise(), "JPEG"), *[(0xE1, b"")] * jpeg.MAX_SEGMENTS), "segments"),
        (with_segments(encoded(noise(), "JPEG"), *[(0xFE, b"")] * jpeg.MAX_SEGMENTS), "segments"),
    ],
    ids=["PNG", "JPEG", "JPEG of comments"],
)
def test_chunks_are_limited(data: bytes, parts: str) -> None:
    """A file in more chunks or segments than any encoder writes is refused."""
    with pytest.raises(UnsupportedImage, match=f"in more than \\d+ {parts}"):
        read(data)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_truncated_files_are_refused(kind: str, share: float) -> None:
    """A truncated file with a complete signature is refused as damaged."""
    data = encoded(noise(200, 200), kind)
    with pytest.raises(UnsupportedImage, match="damaged" if share else "not a PNG"):
        read(data[: int(len(data) * share)])


@given(
    start=st.sampled_from(
        [b"", PNG_SIGNATURE, b"\xff\xd8\xff", b"RIFF\0\0\1\0WEBPVP8X", b"RIFF\0\0\1\0WEBPANMF"]
    ),
    rest=st.binary(),
)
@settings(max_examples=500, deadline=None, derandomize=True)
def test_any_bytes(start: bytes, rest: bytes) -> None:
    """Any bytes give an image file or UnsupportedImage, also after a valid signature."""
    try:
        file = read(start + rest)
    except UnsupportedImage as refusal:
        assert "image" in str(refusal)  # noqa: PT017 - both results are right
    else:
        assert 0 < file.width * file.height <= MAX_PIXELS
