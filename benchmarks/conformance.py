"""Decode every file of a corpus of images; report the result, message, time and memory of each.

    python -m benchmarks.conformance FOLDER ...      # a table of results, and the costliest files
    python -m benchmarks.conformance FOLDER ... --record FILE.csv

Each file goes through the server's reading and decoding, in this process. Time is CPU time; memory is the
increase of the peak resident memory (Linux). The table has each file's path, size and result, so that two
runs can be compared.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from sam3_runner import UnsupportedImage
from sam3_runner.images.decode import decode_square
from sam3_runner.images.read import read_image_file

if TYPE_CHECKING:
    from collections.abc import Iterator

SIDE_PX = 1008
MAX_PIXELS = 2**26
OTHER_FORMAT = "the image is not a PNG, JPEG or WEBP"
COSTLIEST = 5


@dataclass(frozen=True, slots=True)
class DecodeResult:
    """The result of one file.

    Attributes:
        path: relative to the folder, with slashes.
        bytes: size of the file.
        answer: `decoded WIDTHxHEIGHT`, or the message of the refusal.
        cpu_s: CPU time of reading and decoding.
        added_mb: increase of the process's peak resident memory.
    """

    path: str
    bytes: int
    answer: str
    cpu_s: float
    added_mb: float


def main() -> int:
    """Decode every file, print the report, and write the table if --record is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--record", type=Path, help="write the table of results to this file")
    arguments = parser.parse_args()
    results = [result for folder in arguments.folders for result in decode_folder(folder)]
    if not results:
        parser.error("there are no files")
    if arguments.record:
        write_table(arguments.record, results)
    sys.stdout.write(report(results))
    return 0


def decode_folder(folder: Path) -> Iterator[DecodeResult]:
    """Decode each file below `folder`, sorted by name."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in tqdm(paths, desc=folder.name, disable=None):
        yield decode_file(path, path.relative_to(folder).as_posix())


def decode_file(path: Path, name: str) -> DecodeResult:
    """Decode one file. Only `UnsupportedImage` is a result; other errors are raised."""
    data = path.read_bytes()
    _reset_peak()
    before_mb, started_s = _peak_mb(), time.process_time()
    try:
        square = decode_square(read_image_file(data, max_pixels=MAX_PIXELS), SIDE_PX)
        answer = f"decoded {square.width}x{square.height}"
    except UnsupportedImage as refusal:
        answer = str(refusal)
    return DecodeResult(name, len(data), answer, time.process_time() - started_s, _peak_mb() - before_mb)


def write_table(path: Path, results: list[DecodeResult]) -> None:
    """Write the answers, without the costs, which differ from run to run."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("path", "bytes", "answer"))
        writer.writerows((result.path, result.bytes, result.answer) for result in results)


def read_table(path: Path) -> dict[str, str]:
    """Read the answers of a table, by the file's path."""
    with path.open(newline="", encoding="utf-8") as file:
        return {row["path"]: row["answer"] for row in csv.DictReader(file)}


def report(results: list[DecodeResult]) -> str:
    """Format the number of files for each answer, and the costliest files."""
    kinds = Counter(
        result.answer.partition(" ")[0] if _is_decoded(result) else result.answer for result in results
    )
    images = [result for result in results if result.answer != OTHER_FORMAT]
    lines = [f"{len(results)} files, {len(images)} of them PNG, JPEG or WEBP", ""]
    lines += [f"{count:6} {answer}" for answer, count in kinds.most_common()]
    lines += ["", "costliest in time:"]
    lines += [_line(result) for result in sorted(images, key=lambda result: -result.cpu_s)[:COSTLIEST]]
    lines += ["", "costliest in memory:"]
    lines += [_line(result) for result in sorted(images, key=lambda result: -result.added_mb)[:COSTLIEST]]
    return "\n".join(lines) + "\n"


def _is_decoded(result: DecodeResult) -> bool:
    return result.answer.startswith("decoded ")


def _line(result: DecodeResult) -> str:
    cost = f"{result.cpu_s:6.2f} s {result.added_mb:6.0f} MB"
    return f"{cost}  {result.path} ({result.bytes} bytes): {result.answer}"


def _reset_peak() -> None:
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def _peak_mb() -> float:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) / 1000 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    sys.exit(main())
