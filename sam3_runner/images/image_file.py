"""The metadata of an image file, read before any pixel is decoded, and its limits.

Files are untrusted. A file is parsed chunk by chunk in one cheap pass, for the image's size, its orientation,
and the memory that decoding needs. The decoder gets only the chunks that hold pixels, so metadata can neither
fail nor slow the decoding.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import Literal

from sam3_runner.errors import UnsupportedImage

DEFAULT_MAX_PIXELS = 2**26
"""67 megapixels: phones with "50 megapixels" store up to 8192 x 6144."""
MAX_SIDE_PX = 65_535
"""JPEG's own limit; WEBP's is lower. Only a PNG can exceed it, and such a PNG is no photo."""

MAX_DECODE_BYTES = 405_000_000
"""Most memory for decoding one image. With code and bands of pixels a process stays below 450 MB."""

LENGTH = struct.Struct(">Q")
"""Prefix of each message between an API worker and a decoder: how many bytes follow."""

HEAVY_PX = 24_000_000
"""Limit of `is_heavy`: a photo of 20 megapixels, a progressive one of 8. Half a second of one core."""

MAX_PROFILE_BYTES = 4 * 2**20
"""Longer colour profiles are ignored. Those of printers, the longest in use, have 0.5 to 3 MB."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A parsed image file.

    Attributes:
        kind: the file's format, by its content.
        data: the file without the chunks that its pixels do not need.
        width, height: px, as stored.
        decode_bytes: memory that decoding needs, without `data`.
        scans: passes over the image in which its pixels are encoded.
        orientation: EXIF's, 1 to 8; 1 where there is none, or it cannot be read.
        icc_profile: the colour profile; empty where there is none, or it cannot be read.
        reduced_bytes: as `decode_bytes`, for a JPEG decoded at half its size.
        reduced: decode the JPEG at half its size.
        frame_left, frame_top: px; position of the first frame of a WEBP animation in the image.
    """

    kind: Literal["PNG", "JPEG", "WEBP"]
    data: bytes
    width: int
    height: int
    decode_bytes: int
    scans: int = 1
    orientation: int = 1
    icc_profile: bytes = b""
    reduced_bytes: int | None = None
    reduced: bool = False
    frame_left: int = 0
    frame_top: int = 0

    @property
    def is_heavy(self) -> bool:
        """Whether decoding takes so long that other images should not wait for it.

        A scan of a JPEG takes about a fifth of the time of converting and resizing the pixels.
        """
        return self.width * self.height * (5 + self.scans) > 5 * HEAVY_PX


def damaged(detail: str) -> UnsupportedImage:
    """The error for a file with incomplete pixels; `detail` is our own text, never the file's."""
    return UnsupportedImage(f"the image is damaged: {detail}")


def within_limits(file: ImageFile, max_pixels: int) -> ImageFile:
    """`file`; marked to be decoded at half its size where the full size exceeds `MAX_DECODE_BYTES`.

    Raises:
        UnsupportedImage: more than `max_pixels`, a side over `MAX_SIDE_PX`, or too much memory.
    """
    size = f"the image has {file.width} x {file.height} pixels"
    if file.width < 1 or file.height < 1:
        raise damaged("it has no pixels")
    if file.width * file.height > max_pixels:
        raise UnsupportedImage(f"{size}; at most {max_pixels} are allowed")
    if max(file.width, file.height) > MAX_SIDE_PX:
        raise UnsupportedImage(f"{size}; at most {MAX_SIDE_PX} are allowed on a side")
    if file.decode_bytes <= MAX_DECODE_BYTES:
        return file
    if file.reduced_bytes is not None and file.reduced_bytes <= MAX_DECODE_BYTES:
        return replace(file, reduced=True)
    raise UnsupportedImage(
        f"{size}, which in this kind of {file.kind} take {file.decode_bytes // 10**6} MB to decode; "
        f"at most {MAX_DECODE_BYTES // 10**6} MB are allowed"
    )
