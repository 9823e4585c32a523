"""Parses a PNG's chunks (W3C PNG, third edition)."""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING

from sam3_runner.errors import UnsupportedImage
from sam3_runner.images.exif import orientation_of
from sam3_runner.images.image_file import MAX_PROFILE_BYTES, ImageFile, damaged

if TYPE_CHECKING:
    from collections.abc import Iterator

SIGNATURE = b"\x89PNG\r\n\x1a\n"
HEADER_BYTES = 13
PIXEL_CHUNKS = frozenset({b"IHDR", b"PLTE", b"IDAT", b"IEND"})
"""A wrong checksum in one of them is an error. Other chunks are then skipped, as viewers do."""
USED_CHUNKS = frozenset({*PIXEL_CHUNKS, b"tRNS", b"iCCP", b"eXIf"})

MAX_CHUNKS = 20_000
"""10 MB of IDAT chunks of 512 bytes; encoders write 8 KiB or more."""
BYTES_PER_PIXEL = 4
"""Pillow's memory for a pixel of any mode except grey."""


def read_png(data: bytes) -> ImageFile:
    """Parse a PNG; of an animation the default image.

    Raises:
        UnsupportedImage: it is truncated, a chunk that the pixels need is damaged, or it has too many chunks.
    """
    pixels = [SIGNATURE]
    width = height = 0
    orientation, icc_profile, has_pixels = 1, b"", False
    for kind, start, end in _chunks(data):
        body = data[start + 8 : end - 4]
        if zlib.crc32(data[start + 4 : end - 4]) != int.from_bytes(data[end - 4 : end]):
            if kind in PIXEL_CHUNKS:
                raise damaged("a checksum is wrong")
            continue
        if kind == b"IHDR":
            if len(body) != HEADER_BYTES:
                raise damaged("its header is not valid")
            width, height = struct.unpack_from(">II", body)
        if kind in {b"eXIf", b"iCCP"}:
            # After the first pixels browsers ignore them.
            if not has_pixels and kind == b"eXIf":
                orientation = orientation_of(body)
            elif not has_pixels:
                icc_profile = _profile(body)
            continue
        has_pixels |= kind == b"IDAT"
        pixels.append(data[start:end])
    if not has_pixels:
        raise damaged("it has no pixels")
    return ImageFile(
        "PNG",
        b"".join(pixels),
        width,
        height,
        decode_bytes=width * height * BYTES_PER_PIXEL,
        orientation=orientation,
        icc_profile=icc_profile,
    )


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of each used chunk, up to IEND, or to the end of a truncated file.

    A file may be truncated after its pixels start; the decoder checks whether they are complete.
    """
    position, has_pixels = len(SIGNATURE), False
    for _ in range(MAX_CHUNKS):
        length, kind = struct.unpack(">I4s", data[position : position + 8].ljust(8, b"\0"))
        end = position + 12 + length
        if end > len(data):
            if has_pixels and kind != b"IDAT":
                return
            raise damaged("it ends early")
        has_pixels |= kind == b"IDAT"
        if position == len(SIGNATURE) and kind != b"IHDR":
            raise damaged("it does not begin with its header")
        if kind in USED_CHUNKS:
            yield kind, position, end
        if kind == b"IEND":
            return
        position = end
    raise UnsupportedImage(f"the image is in more than {MAX_CHUNKS} chunks")


def _profile(body: bytes) -> bytes:
    """The colour profile of an iCCP chunk; empty where it cannot be decompressed, or is too long."""
    _, _, compressed = body.partition(b"\0")
    decompressor = zlib.decompressobj()
    try:
        profile = decompressor.decompress(compressed[1:], MAX_PROFILE_BYTES)
    except zlib.error:
        return b""
    return profile if decompressor.eof else b""
