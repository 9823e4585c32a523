"""Measure encoders of masks' PNGs, from packed bits to the file: time on one thread, and length.

The masks: an empty one, 5 and 200 discs of 100 px at random places, and smooth noise of which half is
positive. Encoders differ in the deflate library and in the filter of the rows: none (type 0), up (type 2), or
mixed (type 0 in the empty part, else 2), as in `encode_png`. Every row is the median and the highest time of
several calls, after a first one whose file is decoded and compared. The encoders take turns, so that a slow
phase of the machine meets all of them. isal and zlib-ng's own package are measured where they are installed
(`pip install isal zlib-ng`).

    python -m benchmarks.png                  # table
    python -m benchmarks.png --out png.csv    # also appends to the CSV file
"""

from __future__ import annotations

import importlib.util
import io
import itertools
import statistics
import struct
import sys
import time
import zlib
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import imagecodecs
import numpy as np
import numpy.typing as npt
from PIL import Image, PngImagePlugin

from benchmarks.table import machine_name, parse_out, record
from outputs.mask_png import encode_png

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from sam3_runner.instances import Mask, PackedMask

    Encoder = Callable[[PackedMask, int], bytes]
    Rows = npt.NDArray[np.uint8]

PICTURES = [(1920, 1080), (3840, 2160)]
OBJECT_PX = 100
NOISE_CELLS = 36
"""Cells of the noise along each side, as in benchmarks/masks.py."""

REPEATS = 15
SEED = 0
WINDOW_BITS, MEMORY_LEVEL = 15, 9
UP = 2
WIDTHS = (13, 13, 31, 16, 11, 9, 0)
"""Of the printed table's columns."""


def objects(width: int, height: int, count: int) -> Mask:
    """`count` discs of OBJECT_PX inside the picture, (height, width) bool."""
    mask = np.zeros((height, width), np.bool_)
    y, x = np.ogrid[:height, :width]
    corners = np.random.default_rng(SEED).random((count, 2)) * (width - OBJECT_PX, height - OBJECT_PX)
    for left, top in corners:
        mask |= np.hypot(x - left - OBJECT_PX / 2, y - top - OBJECT_PX / 2) < OBJECT_PX / 2
    return mask


def noise(width: int, height: int) -> Mask:
    """Smooth noise, half of it positive, (height, width) bool."""
    cells = np.random.default_rng(SEED).standard_normal((NOISE_CELLS, NOISE_CELLS)).astype(np.float32)
    return np.asarray(Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)) > 0


MASKS: dict[str, Callable[[int, int], Mask]] = {
    "empty": lambda width, height: objects(width, height, 0),
    "5 objects": lambda width, height: objects(width, height, 5),
    "200 objects": lambda width, height: objects(width, height, 200),
    "full-frame": noise,
}


def grey(mask: PackedMask, width: int) -> Rows:
    """Px of 0 and 255, (height, width)."""
    pixels = np.unpackbits(mask, axis=1, count=width)
    return np.negative(pixels, out=pixels)


BYTES_OF_BITS = np.negative(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)).view(np.uint64)


def grey_by_table(mask: PackedMask, width: int) -> Rows:
    """`grey`, from a table of the 8 px of each byte."""
    return BYTES_OF_BITS[:, 0].take(mask).view(np.uint8)[:, :width]


def rows_none(mask: PackedMask, width: int) -> Rows:
    """Rows for deflate, (height, 1 + width): filter type 0, the px."""
    rows = np.zeros((len(mask), 1 + width), np.uint8)
    np.negative(np.unpackbits(mask, axis=1, count=width), out=rows[:, 1:])
    return rows


def rows_by_table(mask: PackedMask, width: int) -> Rows:
    """`rows_none` with `grey_by_table`."""
    rows = np.zeros((len(mask), 1 + width), np.uint8)
    rows[:, 1:] = grey_by_table(mask, width)
    return rows


def rows_up(mask: PackedMask, width: int) -> Rows:
    """Rows for deflate, (height, 1 + width): filter type 2, the differences from the row above."""
    rows = np.full((len(mask), 1 + width), UP, np.uint8)
    bits = np.unpackbits(mask, axis=1, count=width)
    np.negative(bits[0], out=rows[0, 1:])
    np.subtract(bits[:-1], bits[1:], out=rows[1:, 1:])
    return rows


def rows_mixed(mask: PackedMask, width: int) -> Rows:
    """`rows_up`, with type 0 where a row and the one above are empty."""
    rows = rows_up(mask, width)
    is_set = mask.max(axis=1) > 0
    rows[0, 0] = UP if is_set[0] else 0
    rows[1:, 0] = np.where(is_set[1:] | is_set[:-1], UP, 0)
    return rows


FILTERS = {"none": rows_none, "up": rows_up, "mixed": rows_mixed}


def by_pillow(mask: PackedMask, width: int) -> bytes:
    """With Pillow, which tries all filters for each row, and zlib's run-length strategy."""
    buffer = io.BytesIO()
    image = Image.fromarray(np.unpackbits(mask, axis=1, count=width) * np.uint8(255))
    image.save(buffer, format="PNG", compress_level=1, compress_type=zlib.Z_RLE)
    return buffer.getvalue()


def by_libpng(filter_type: imagecodecs.PNG.FILTER) -> Encoder:
    """With libpng and zlib's run-length strategy."""
    return lambda mask, width: bytes(
        imagecodecs.png_encode(
            grey(mask, width), level=1, strategy=imagecodecs.PNG.STRATEGY.RLE, filter=filter_type
        )
    )


def by_deflate(filtered: Callable[[PackedMask, int], Rows], compress: Callable[[Any], bytes]) -> Encoder:
    """With a deflate library over filtered rows, and our chunks."""

    def encode(mask: PackedMask, width: int) -> bytes:
        buffer = io.BytesIO(b"\x89PNG\r\n\x1a\n")
        buffer.seek(0, io.SEEK_END)
        PngImagePlugin.putchunk(buffer, b"IHDR", struct.pack(">2I5B", width, len(mask), 8, 0, 0, 0, 0))
        PngImagePlugin.putchunk(buffer, b"IDAT", compress(filtered(mask, width)))
        PngImagePlugin.putchunk(buffer, b"IEND")
        return buffer.getvalue()

    return encode


def run_length(library: Any) -> Callable[[Any], bytes]:
    """The run-length strategy, of a library with the interface of Python's zlib."""

    def compress(rows: Rows) -> bytes:
        deflate = library.compressobj(1, zlib.DEFLATED, WINDOW_BITS, MEMORY_LEVEL, zlib.Z_RLE)
        return bytes(deflate.compress(rows) + deflate.flush())

    return compress


def libraries() -> dict[str, Callable[[Any], bytes]]:
    """Deflate libraries with their level or strategy; those of packages that are installed."""
    found: dict[str, Callable[[Any], bytes]] = {"zlib, run-length": run_length(zlib)}
    for level in (0, 1, 2, 3):
        found[f"zlib-ng, level {level}"] = _at_level(imagecodecs.zlibng_encode, level)
    for level in (0, 1):
        found[f"libdeflate, level {level}"] = _at_level(imagecodecs.deflate_encode, level)
    if importlib.util.find_spec("isal"):
        isal = importlib.import_module("isal.isal_zlib")
        for level in (0, 1, 2):
            found[f"isal, level {level}"] = _at_level(isal.compress, level)
    if importlib.util.find_spec("zlib_ng"):
        found["zlib-ng's package, run-length"] = run_length(importlib.import_module("zlib_ng.zlib_ng"))
    return found


def _at_level(compress: Callable[..., bytes | bytearray], level: int) -> Callable[[Any], bytes]:
    return lambda rows: bytes(compress(rows, level=level))


def encoders() -> dict[tuple[str, str], Encoder]:
    """All encoders by their name and filter."""
    fastest = _at_level(imagecodecs.zlibng_encode, 2)
    return {
        ("encode_png", "mixed"): encode_png,
        ("Pillow, run-length", "adaptive"): by_pillow,
        ("libpng, run-length", "none"): by_libpng(imagecodecs.PNG.FILTER.NONE),
        ("libpng, run-length", "up"): by_libpng(imagecodecs.PNG.FILTER.UP),
        ("libspng, level 1", "adaptive"): lambda mask, width: bytes(
            imagecodecs.spng_encode(grey(mask, width), level=1)
        ),
        ("zlib-ng, level 2", "none, by table"): by_deflate(rows_by_table, fastest),
    } | {
        (name, kind): by_deflate(filtered, compress)
        for (name, compress), (kind, filtered) in itertools.product(libraries().items(), FILTERS.items())
    }


def measure(mask: Mask) -> list[dict[str, object]]:
    """A row of the table for each encoder."""
    packed, width, files = np.packbits(mask, axis=1), mask.shape[1], {}
    candidates = encoders()
    for name, encode in candidates.items():  # Not timed: the first call allocates memory.
        files[name] = encode(packed, width)
        with Image.open(io.BytesIO(files[name])) as image:
            assert image.mode == "L"
            assert np.array_equal(np.asarray(image), np.where(mask, 255, 0)), name
    times_ms: dict[tuple[str, str], list[float]] = {name: [] for name in candidates}
    for _ in range(REPEATS):
        for name, encode in candidates.items():
            encode(packed, width)  # Not timed: the memory that others have freed is mapped again.
            start_s = time.perf_counter()
            encode(packed, width)
            times_ms[name].append((time.perf_counter() - start_s) * 1000)
    return [
        {
            "encoder": name,
            "filter": kind,
            "median_ms": round(statistics.median(times_ms[name, kind]), 2),
            "max_ms": round(max(times_ms[name, kind]), 2),
            "file_bytes": len(files[name, kind]),
        }
        for name, kind in candidates
    ]


def main() -> None:
    """Measure, print, and append to the CSV file if --out is given."""
    out = parse_out(__doc__)
    machine = machine_name()
    sys.stdout.write(f"{machine}, imagecodecs {imagecodecs.__version__}, zlib {zlib.ZLIB_RUNTIME_VERSION}\n")
    rows: list[dict[str, object]] = []
    for (width, height), (kind, draw) in itertools.product(PICTURES, MASKS.items()):
        for measured in measure(draw(width, height)):
            row = {"picture": f"{width} x {height}", "mask": kind} | measured
            if not rows:
                sys.stdout.write(_line(row.keys()))
            sys.stdout.write(_line(row.values()))
            rows.append(
                {
                    "measured": datetime.now(UTC).date(),
                    "machine": machine,
                    "imagecodecs": imagecodecs.__version__,
                    "zlib": zlib.ZLIB_RUNTIME_VERSION,
                }
                | row
            )
    if out:
        record(out, rows)


def _line(cells: Iterable[object]) -> str:
    return "".join(f"{cell!s:<{width}}" for cell, width in zip(cells, WIDTHS, strict=True)) + "\n"


if __name__ == "__main__":
    main()
