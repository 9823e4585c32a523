"""Parses a JPEG's segments (ITU-T T.81 annex B; EXIF and ICC profiles in APP1 and APP2)."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field

from sam3_runner.errors import UnsupportedImage
from sam3_runner.images.exif import EXIF_PREFIX, orientation_of
from sam3_runner.images.image_file import MAX_PROFILE_BYTES, ImageFile, damaged

SIGNATURE = b"\xff\xd8\xff"
MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")
"""Of a segment: not a stuffed byte (FF00), a restart (FFD0 to FFD7) or fill (FFFF) in entropy-coded data."""

SOF0, SOF2, DHT, SOI, EOI, SOS, DNL, APP0, APP1, APP2, APP14, APP15, COM = (
    *(0xC0, 0xC2, 0xC4, 0xD8, 0xD9, 0xDA, 0xDC, 0xE0, 0xE1, 0xE2, 0xEE, 0xEF, 0xFE),
)
FRAMES = frozenset(range(SOF0, SOF0 + 16)) - {DHT, 0xC8, 0xCC}
PROGRESSIVE = frozenset({SOF2, 0xC6, 0xCA, 0xCE})
DROPPED = (frozenset(range(APP0, APP15 + 1)) | {COM}) - {APP0, APP14}
"""Decoders do not need these. Of the APPn segments they need JFIF's and Adobe's, for the colour space."""
PROFILE_PREFIX = b"ICC_PROFILE\0"

MAX_SEGMENTS = 2_000
"""A 50-megapixel photo with thumbnails, profiles and editor data has about a hundred."""
MAX_SCANS = 100
"""Progressive encoders write 10 to 20; each may update every coefficient of the image."""
MAX_SCANNED_PIXELS = 1_500_000_000
"""Scans times pixels: 30 scans of 50 megapixels, which take 1.5 s longer than one."""
BYTES_PER_PIXEL = 4
BYTES_PER_COEFFICIENT = 2


@dataclass(slots=True)
class _Segments:
    """The segments parsed so far."""

    kept: list[bytes] = field(default_factory=lambda: [SIGNATURE[:2]])
    frame: bytes = b""
    is_progressive: bool = False
    is_buffered: bool = False
    scans: int = 0
    exif: bytes = b""
    profile_parts: list[bytes] = field(default_factory=list)


def read_jpeg(data: bytes) -> ImageFile:
    """Parse a JPEG; of a multi-picture file the first picture.

    Raises:
        UnsupportedImage: it is truncated, has no frame, or too many segments or scans.
    """
    segments = _parse(data)
    if len(segments.frame) < 6:
        raise damaged("it has no frame")
    height, width, components = struct.unpack_from(">HHB", segments.frame, 1)
    if len(segments.frame) < 6 + 3 * components or not components:
        raise damaged("its frame header is incomplete")
    if segments.scans * width * height > MAX_SCANNED_PIXELS:
        raise UnsupportedImage(
            f"the image has {segments.scans} scans, too many for {width} x {height} pixels"
        )
    coefficients = _coefficients(segments.frame, width, height, components) if segments.is_buffered else 0
    coefficient_bytes = coefficients * BYTES_PER_COEFFICIENT
    pixel_bytes = width * height * BYTES_PER_PIXEL
    return ImageFile(
        "JPEG",
        b"".join(segments.kept),
        width,
        height,
        decode_bytes=coefficient_bytes + pixel_bytes,
        reduced_bytes=coefficient_bytes + pixel_bytes // 4,
        scans=segments.scans,
        orientation=orientation_of(segments.exif),
        icc_profile=_profile(segments.profile_parts),
    )


def _parse(data: bytes) -> _Segments:
    segments, position = _Segments(), 2
    for _ in range(MAX_SEGMENTS):
        found = MARKER.search(data, position)
        if found is None:
            raise damaged("it ends early")
        start, marker = found.start(), data[found.start() + 1]
        if marker in {SOI, EOI}:
            segments.kept.append(data[start : start + 2])
            if marker == EOI:
                return segments
            position = start + 2
            continue
        end = start + 2 + int.from_bytes(data[start + 2 : start + 4])
        if end < start + 4 or end > len(data):
            raise damaged("it ends early")
        _add_segment(segments, marker, data[start + 4 : end])
        if marker == SOS:
            following = MARKER.search(data, end)
            end = following.start() if following else len(data)
        if marker not in DROPPED:
            segments.kept.append(data[start:end])
        position = end
    raise UnsupportedImage(f"the image is in more than {MAX_SEGMENTS} segments")


def _add_segment(segments: _Segments, marker: int, body: bytes) -> None:
    if marker in FRAMES and not segments.frame:
        segments.frame = body
        segments.is_progressive = segments.is_buffered = marker in PROGRESSIVE
    elif marker == SOS:
        segments.scans += 1
        if segments.scans > MAX_SCANS:
            raise UnsupportedImage(f"the image has more than {MAX_SCANS} scans")
        # A scan of some components only: the decoder must keep all coefficients until the other scans.
        segments.is_buffered |= segments.frame[5:6] != body[:1]
    elif marker == APP1 and body.startswith(EXIF_PREFIX) and not segments.exif:
        segments.exif = body.removeprefix(EXIF_PREFIX)
    elif marker == APP2 and body.startswith(PROFILE_PREFIX):
        segments.profile_parts.append(body.removeprefix(PROFILE_PREFIX))


def _coefficients(frame: bytes, width: int, height: int, components: int) -> int:
    """Number of coefficients of all components; a subsampled component has fewer."""
    sampling = [frame[6 + 3 * index + 1] for index in range(components)]
    factors = [(byte >> 4, byte & 15) for byte in sampling]
    finest = max(across for across, _ in factors) * max(down for _, down in factors)
    if not finest:
        raise damaged("its frame header is incomplete")
    return width * height * sum(across * down for across, down in factors) // finest


def _profile(parts: list[bytes]) -> bytes:
    """The colour profile, joined by its parts' numbers (ICC.1, B.4); empty where one is missing."""
    numbered = {part[0]: part[2:] for part in parts if len(part) > 2 and part[1] == len(parts)}
    complete = sorted(numbered) == list(range(1, len(parts) + 1))
    profile = b"".join(numbered[number] for number in sorted(numbered)) if complete else b""
    return profile if len(profile) <= MAX_PROFILE_BYTES else b""
