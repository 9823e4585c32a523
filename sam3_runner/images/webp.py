"""Parses a WEBP's chunks (RFC 9649)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sam3_runner.images.image_file import MAX_PROFILE_BYTES, ImageFile, damaged

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_CHUNKS = 1_000
"""Later chunks are not read. A still image has at most eight."""
FRAME_HEADER_BYTES = 16
LOSSY, LOSSLESS = b"VP8 ", b"VP8L"
ALPHA_FLAG = 0x10
BYTES_PER_PIXEL = 4
UNPACKED_BYTES_PER_PIXEL = 5
"""Memory of libwebp 1.6 for lossless pixels or alpha, beside the decoded pixels; measured: 4.7."""


@dataclass(frozen=True, slots=True)
class _Frame:
    """One frame: its encoded pixels, and its position in the image."""

    kind: bytes
    data: bytes
    alpha: bytes
    left: int = 0
    top: int = 0

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in px, from the encoded pixels (RFC 6386 9.1, RFC 9649 3.4)."""
        if self.kind == LOSSY and self.data[3:6] == b"\x9d\x01\x2a" and len(self.data) >= 10:
            width, height = struct.unpack_from("<HH", self.data, 6)
            return width & 0x3FFF, height & 0x3FFF
        if self.kind == LOSSLESS and self.data[:1] == b"\x2f" and len(self.data) >= 5:
            [bits] = struct.unpack_from("<L", self.data, 1)
            return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        raise damaged("its frame is not valid")

    @property
    def decode_bytes(self) -> int:
        """Memory that decoding needs."""
        width, height = self.size
        unpacked = self.kind == LOSSLESS or bool(self.alpha)
        return width * height * (BYTES_PER_PIXEL + unpacked * UNPACKED_BYTES_PER_PIXEL)

    def as_still(self) -> bytes:
        """A file of this frame only."""
        chunks = _chunk(self.kind, self.data)
        if self.kind == LOSSY and self.alpha:
            width, height = self.size
            size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
            header = _chunk(b"VP8X", bytes([ALPHA_FLAG, 0, 0, 0]) + size)
            chunks = header + _chunk(b"ALPH", self.alpha) + chunks
        return b"RIFF" + struct.pack("<L", 4 + len(chunks)) + b"WEBP" + chunks


def is_webp(data: bytes) -> bool:
    """Whether `data` starts as a WEBP."""
    return data[:4] == b"RIFF" and data[8:12] == b"WEBP"


def read_webp(data: bytes) -> ImageFile:
    """Parse a WEBP; of an animation the first frame. EXIF is ignored, as in browsers.

    Raises:
        UnsupportedImage: it is truncated or has no frame.
    """
    first: dict[bytes, bytes] = {}
    for kind, body in _chunks(data, 12):
        first.setdefault(kind, body)
    frame = _animated(first[b"ANMF"]) if b"ANMF" in first else _frame(first)
    width, height = frame.size
    if b"ANMF" in first and len(first.get(b"VP8X", b"")) >= 10:
        width, height = (1 + _uint24(first[b"VP8X"], at) for at in (4, 7))
    if frame.left + frame.size[0] > width or frame.top + frame.size[1] > height:
        raise damaged("its frame is larger than the image")
    icc_profile = first.get(b"ICCP", b"")
    return ImageFile(
        "WEBP",
        frame.as_still(),
        width,
        height,
        decode_bytes=frame.decode_bytes
        + (width * height * BYTES_PER_PIXEL if frame.size != (width, height) else 0),
        icc_profile=icc_profile if len(icc_profile) <= MAX_PROFILE_BYTES else b"",
        frame_left=frame.left,
        frame_top=frame.top,
    )


def _animated(body: bytes) -> _Frame:
    """The frame of an ANMF chunk."""
    parts: dict[bytes, bytes] = {}
    for kind, part in _chunks(body, FRAME_HEADER_BYTES):
        parts.setdefault(kind, part)
    return _frame(parts, left=2 * _uint24(body, 0), top=2 * _uint24(body, 3))


def _frame(chunks: dict[bytes, bytes], *, left: int = 0, top: int = 0) -> _Frame:
    kind = LOSSY if LOSSY in chunks else LOSSLESS
    if kind not in chunks:
        raise damaged("it has no frame")
    return _Frame(kind, chunks[kind], chunks.get(b"ALPH", b""), left, top)


def _chunks(data: bytes, position: int) -> Iterator[tuple[bytes, bytes]]:
    """Kind and body of each chunk from `position` on."""
    for _ in range(MAX_CHUNKS):
        if position + 8 > len(data):
            return
        kind, length = struct.unpack_from("<4sL", data, position)
        start, end = position + 8, position + 8 + length
        if end > len(data):
            raise damaged("it ends early")
        yield kind, data[start:end]
        position = end + length % 2


def _chunk(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("<L", len(body)) + body + b"\0" * (len(body) % 2)


def _uint24(data: bytes, position: int) -> int:
    return int.from_bytes(data[position : position + 3], "little")
