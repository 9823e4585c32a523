"""Image files of every kind for tests, valid and invalid."""

from __future__ import annotations

import io
import struct
import zlib
from functools import cache
from pathlib import Path
from uuid import uuid4

import numpy as np
from PIL import Image, ImageCms

PICTURES = Path(__file__).parent / "pictures"
FORMATS = ("PNG", "JPEG", "WEBP")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Colorants for D50, from the published profiles.
PRIMARIES = {
    "sRGB": {
        b"rXYZ": (0.4360, 0.2225, 0.0139),
        b"gXYZ": (0.3851, 0.7169, 0.0971),
        b"bXYZ": (0.1431, 0.0606, 0.7141),
    },
    "Display P3": {
        b"rXYZ": (0.5151, 0.2412, -0.0011),
        b"gXYZ": (0.2920, 0.6922, 0.0419),
        b"bXYZ": (0.1571, 0.0666, 0.7841),
    },
    "ProPhoto": {
        b"rXYZ": (0.7977, 0.2880, 0.0),
        b"gXYZ": (0.1352, 0.7119, 0.0),
        b"bXYZ": (0.0313, 0.0001, 0.8249),
    },
}


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """`image` as a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@cache
def noise(width: int = 40, height: int = 30) -> Image.Image:
    """An RGB image of random pixels."""
    levels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def exif_of(orientation: int) -> bytes:
    r"""EXIF data with an orientation, starting with `Exif\0\0`."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def png_chunk(kind: bytes, body: bytes, *, checksum: int | None = None) -> bytes:
    """A chunk of a PNG."""
    right = zlib.crc32(kind + body)
    return (
        struct.pack(">I", len(body))
        + kind
        + body
        + struct.pack(">I", right if checksum is None else checksum)
    )


def png_of(width: int, height: int, rows: bytes, *, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG with the given header and rows, which may not match."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return PNG_SIGNATURE + chunks


def with_chunks(png: bytes, *chunks: bytes) -> bytes:
    """A PNG with chunks inserted after its header."""
    return png[:33] + b"".join(chunks) + png[33:]


def with_new_bytes(png: bytes) -> bytes:
    """The same picture as a file of its own, so that a server does not hold its features."""
    return with_chunks(png, png_chunk(b"tEXt", b"Comment\0" + uuid4().hex.encode()))


def with_segments(jpeg: bytes, *segments: tuple[int, bytes]) -> bytes:
    """A JPEG with segments (marker, body) inserted at the start."""
    packed = [struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body for marker, body in segments]
    return jpeg[:2] + b"".join(packed) + jpeg[2:]


def with_scans(jpeg: bytes, scans: int) -> bytes:
    """A progressive JPEG with `scans` more scans: repeats its last one."""
    start = jpeg.rindex(b"\xff\xda")
    return jpeg[:-2] + jpeg[start:-2] * scans + jpeg[-2:]


def primaries_of(name: str) -> bytes:
    """A colour profile with these primaries and sRGB's curve, made from the sRGB profile."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for tag, xyz in PRIMARIES[name].items():
        entry = profile.index(tag, 128)
        [offset] = struct.unpack_from(">L", profile, entry + 4)
        struct.pack_into(">3l", profile, offset + 8, *(round(value * 65536) for value in xyz))
    return bytes(profile)
