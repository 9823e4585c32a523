"""Reads the orientation from EXIF data. No other EXIF tag is read, and none is ever written."""

from __future__ import annotations

import struct

ORIENTATION_TAG = 0x0112
SHORT = 3
ENTRY_BYTES = 12
EXIF_PREFIX = b"Exif\0\0"


def orientation_of(tiff: bytes) -> int:
    """EXIF's orientation, 1 to 8; 1 (as stored) where there is none, or it cannot be read.

    Args:
        tiff: EXIF data after its prefix: a TIFF header and its first directory. Other entries are skipped
            without being read (TIFF 6.0, section 2; EXIF 2.32, 4.6.4).
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 8:
        return 1
    [directory] = struct.unpack_from(f"{order}L", tiff, 4)
    if directory + 2 > len(tiff):
        return 1
    [entries] = struct.unpack_from(f"{order}H", tiff, directory)
    complete_entries = min(entries, (len(tiff) - directory - 2) // ENTRY_BYTES)
    for position in range(directory + 2, directory + 2 + complete_entries * ENTRY_BYTES, ENTRY_BYTES):
        tag, kind, count, value = struct.unpack_from(f"{order}HHLH", tiff, position)
        if tag == ORIENTATION_TAG:
            return value if kind == SHORT and count == 1 and 1 <= value <= 8 else 1
    return 1


def viewed_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Width and height as a viewer shows an image whose stored size is `size`."""
    width, height = size
    return (height, width) if orientation >= 5 else size  # rotated by 90 degrees
