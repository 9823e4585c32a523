"""What a file says of itself: read from strangers' bytes, and refused where it costs too much."""

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
def test_what_a_file_says(kind: str) -> None:
    """Format, stored size, orientation and profile are read from a file."""
    file = read(encoded(noise(), kind, exif=exif_of(6), icc_profile=b"profile" * 10_000))
    assert (file.kind, file.width, file.height) == (kind, 40, 30)
    assert file.orientation == (1 if kind == "WEBP" else 6)
    assert file.icc_profile == b"profile" * 10_000
    assert b"profile" not in file.data
    assert b"Exif" not in file.data


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "BMP", "ICO", "PPM", "PDF", "TGA"])
def test_other_formats_are_refused(kind: str) -> None:
    """Formats that Pillow would read, but that are not promised, are refused."""
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
def test_exif_without_meaning(kind: str, exif: bytes) -> None:
    """EXIF that cannot be read, or whose orientation means nothing, is as none."""
    assert read(encoded(noise(), kind, exif=exif)).orientation == 1


def test_orientation_beside_odd_values() -> None:
    """An entry whose value lies outside of the file does not hide the orientation."""
    odd = struct.pack("<HHLL", 0x010E, 2, 2**31, 2**31)
    turned = struct.pack("<HHLHH", 0x0112, 3, 1, 8, 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<LH", 8, 2) + odd + turned
    assert read(with_segments(encoded(noise(), "JPEG"), (0xE1, exif))).orientation == 8


def test_the_first_exif_counts() -> None:
    """Of several EXIF segments the first counts, and many cost nothing."""
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
def test_png_metadata_refuses_nothing(chunk: bytes) -> None:
    """Whatever stands in chunks that pixels do not need, the picture is read, and memory stays flat."""
    data = with_chunks(encoded(noise(), "PNG"), chunk)
    tracemalloc.start()
    try:
        file = read(data)
        assert tracemalloc.get_traced_memory()[1] < MAX_PROFILE_BYTES * 3
    finally:
        tracemalloc.stop()
    assert (file.data, file.icc_profile) == (encoded(noise(), "PNG"), b"")


def test_png_without_its_end() -> None:
    """A PNG that ends with its pixels, or in the middle of what follows, is whole."""
    data = encoded(noise(), "PNG")
    for end in (-12, -7, -1):
        assert read(data[:end]).width == 40
    for end in (-13, data.index(b"IDAT") - 4):
        with pytest.raises(UnsupportedImage, match="damaged: it ends early"):
            read(data[:end])


@pytest.mark.parametrize("kind", [b"IHDR", b"IDAT", b"IEND"])
def test_checksums_of_pixels_count(kind: bytes) -> None:
    """A wrong checksum of a chunk that the pixels need is damage."""
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
    """A JPEG's colour profile is put together by the numbers of its parts, or left out."""
    segments = [(0xE2, b"ICC_PROFILE\0" + part) for part in parts]
    assert read(with_segments(encoded(noise(), "JPEG"), *segments)).icc_profile == profile


def test_pixel_cap() -> None:
    """An image of exactly the cap is read, one more row is refused with both numbers."""
    assert read(encoded(Image.new("L", (100, 100)), "PNG"), 10_000).width == 100
    with pytest.raises(UnsupportedImage, match="100 x 101 pixels; at most 10000"):
        read(encoded(Image.new("L", (100, 101)), "PNG"), 10_000)


@pytest.mark.parametrize(("width", "height"), [(65_536, 1), (1, 65_536), (50_000_000, 1)])
def test_side_cap(width: int, height: int) -> None:
    """A side of more than 65,535 px is refused, however few pixels there are."""
    with pytest.raises(UnsupportedImage, match="65535 are allowed on a side"):
        read(png_of(width, height, b""))


@pytest.mark.parametrize(("width", "height"), [(8160, 6144), (8192, 6144), (8192, 8192)])
def test_photos_of_50_megapixel_phones(width: int, height: int) -> None:
    """Phones that are sold as 50 megapixels store a few more."""
    photo = bytearray(encoded(noise(), "JPEG"))
    start = photo.index(b"\xff\xc0") + 5
    photo[start : start + 4] = struct.pack(">HH", height, width)
    file = read(bytes(photo))
    assert (file.width, file.height, file.reduced) == (width, height, False)


def progressive(width: int, height: int, subsampling: int) -> bytes:
    """A progressive JPEG that claims a size."""
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
    """A progressive JPEG whose coefficients and pixels do not fit together is decoded at half its size."""
    assert read(progressive(width, height, subsampling)).reduced == reduced


def test_too_much_memory_is_refused() -> None:
    """What does not fit even so is refused with the reason."""
    with pytest.raises(UnsupportedImage, match=r"8192 x 8192 .* take \d+ MB to decode; at most 405 MB"):
        read(progressive(8192, 8192, 0))


def test_scans_are_counted() -> None:
    """A JPEG of as many scans as encoders write is read; thousands are refused unread."""
    data = encoded(noise(), "JPEG", progressive=True)
    assert read(with_scans(data, 20)).width == 40
    with pytest.raises(UnsupportedImage, match="more than 100 scans"):
        read(with_scans(data, 10_000))


def test_scans_of_a_large_image_are_fewer() -> None:
    """Each scan may visit all of the image: a large one may have fewer."""
    data = progressive(8192, 6144, 2)
    with pytest.raises(UnsupportedImage, match="30 scans, too many for 8192 x 6144 pixels"):
        read(with_scans(data, 30 - data.count(b"\xff\xda")))


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (with_chunks(encoded(noise(), "PNG"), png_chunk(b"prVt", b"") * png.MAX_CHUNKS), "chunks"),
        (with_segments(encoded(noise(), "JPEG"), *[(0xE1, b"")] * jpeg.MAX_SEGMENTS), "segments"),
        (with_segments(encoded(noise(), "JPEG"), *[(0xFE, b"")] * jpeg.MAX_SEGMENTS), "segments"),
    ],
    ids=["PNG", "JPEG", "JPEG of comments"],
)
def test_pieces_are_counted(data: bytes, what: str) -> None:
    """A file in more pieces than any encoder writes is refused, which it is told."""
    with pytest.raises(UnsupportedImage, match=f"in more than \\d+ {what}"):
        read(data)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_cut_off_files_are_refused(kind: str, share: float) -> None:
    """A file that ends early is refused as damaged, once its signature is there."""
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
    """Any bytes are an image file or UnsupportedImage, even behind a good signature."""
    try:
        file = read(start + rest)
    except UnsupportedImage as refusal:
        assert "image" in str(refusal)  # noqa: PT017 - both ends are right
    else:
        assert 0 < file.width * file.height <= MAX_PIXELS
