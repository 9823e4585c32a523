"""What an image file says of itself, read before any pixel is decoded.

A file comes from a stranger. It is walked piece by piece in one cheap pass: how large the image is, how it
lies, what its decoding will cost. The decoder gets the pieces that make the pixels and no others, so nothing
that it would do with metadata can fail or take time.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import Literal

from sam3_runner.errors import UnsupportedImage

MAX_SIDE_PX = 65_535
"""JPEG's own limit; WEBP's is lower. Only a PNG can be longer, and then it is no photo."""

MAX_DECODE_BYTES = 405_000_000
"""What decoding one image may hold at once. With code and bands of pixels a process stays below 450 MB."""

LENGTH = struct.Struct(">Q")
"""Stands before all that crosses between a worker and a decoder: how many bytes follow."""

HEAVY_PX = 24_000_000
"""What `is_heavy` compares with: a photo of 20 megapixels, a progressive one of 8. Half a core's second."""

MAX_PROFILE_BYTES = 4 * 2**20
"""Longer colour profiles are left out. Those of printers, the longest in use, have 0.5 to 3 MB."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image file that may be decoded.

    Attributes:
        kind: of the file, by its content.
        data: the file without the pieces that its pixels do not need.
        width, height: px, as they are stored.
        decode_bytes: what decoding holds at once, without `data`.
        scans: passes over the image in which its pixels are coded.
        orientation: EXIF's, 1 to 8; 1 where there is none, or none that can be read.
        icc_profile: the colour profile; empty where there is none, or none that can be read.
        reduced_bytes: the same as `decode_bytes` when a JPEG is decoded at half its size.
        reduced: decode the JPEG at half its size.
        frame_left, frame_top: px; where the first frame of a WEBP animation lies in the image.
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
        """Whether decoding takes so long that such images should not keep others waiting.

        A scan of a JPEG costs about a fifth of what making and resizing the pixels does.
        """
        return self.width * self.height * (5 + self.scans) > 5 * HEAVY_PX


def damaged(detail: str) -> UnsupportedImage:
    """The refusal of a file whose pixels are not whole; `detail` is one of ours, never the file's text."""
    return UnsupportedImage(f"the image is damaged: {detail}")


def within_limits(file: ImageFile, max_pixels: int) -> ImageFile:
    """`file`, to be decoded at half its size where only that is within `MAX_DECODE_BYTES`.

    Raises:
        UnsupportedImage: more than `max_pixels`, a side over `MAX_SIDE_PX`, or too much memory either way.
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
