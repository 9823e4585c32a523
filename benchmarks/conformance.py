"""How does each file of a corpus of images fare: decoded or refused, by which sentence, at what cost?

    python -m benchmarks.conformance FOLDER ...      # a table of answers, and the costliest files
    python -m benchmarks.conformance FOLDER ... --record FILE.csv

Files that begin as a PNG, JPEG or WEBP go through the server's own reading and decoding, in this process; of
the others one sentence is right, and checked. Time is CPU time; memory is what a file adds to the highest
resident memory (Linux). The table keeps a file's path, size and answer, so that two runs can be compared.
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
class Fate:
    """What became of one file.

    Attributes:
        path: below its corpus' folder, with slashes.
        bytes: of the file.
        answer: `decoded WIDTHxHEIGHT`, or the refusal.
        cpu_s: of reading and decoding.
        added_mb: to the process's highest resident memory.
    """

    path: str
    bytes: int
    answer: str
    cpu_s: float
    added_mb: float


def main() -> int:
    """Decode everything, print, and record if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--record", type=Path, help="write the table of answers to this file")
    arguments = parser.parse_args()
    fates = [fate for folder in arguments.folders for fate in fates_of(folder)]
    if not fates:
        parser.error("there are no files")
    if arguments.record:
        write_answers(arguments.record, fates)
    sys.stdout.write(report(fates))
    return 0


def fates_of(folder: Path) -> Iterator[Fate]:
    """What becomes of each file below `folder`, in the order of their names."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in tqdm(paths, desc=folder.name, disable=None):
        yield fate_of(path, path.relative_to(folder).as_posix())


def fate_of(path: Path, name: str) -> Fate:
    """What becomes of one file. Whatever is not a square or a refusal is an error, and is raised."""
    data = path.read_bytes()
    _forget_peak()
    before_mb, started_s = _peak_mb(), time.process_time()
    try:
        square = decode_square(read_image_file(data, max_pixels=MAX_PIXELS), SIDE_PX)
        answer = f"decoded {square.width}x{square.height}"
    except UnsupportedImage as refusal:
        answer = str(refusal)
    return Fate(name, len(data), answer, time.process_time() - started_s, _peak_mb() - before_mb)


def write_answers(path: Path, fates: list[Fate]) -> None:
    """Write what may be compared: costs differ from run to run, answers do not."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("path", "bytes", "answer"))
        writer.writerows((fate.path, fate.bytes, fate.answer) for fate in fates)


def read_answers(path: Path) -> dict[str, str]:
    """The answers of a table, by the file's path."""
    with path.open(newline="", encoding="utf-8") as file:
        return {row["path"]: row["answer"] for row in csv.DictReader(file)}


def report(fates: list[Fate]) -> str:
    """The answers, counted, and the files that cost most."""
    kinds = Counter(fate.answer.partition(" ")[0] if _is_decoded(fate) else fate.answer for fate in fates)
    images = [fate for fate in fates if fate.answer != OTHER_FORMAT]
    lines = [f"{len(fates)} files, {len(images)} of them PNG, JPEG or WEBP", ""]
    lines += [f"{count:6} {answer}" for answer, count in kinds.most_common()]
    lines += ["", "costliest in time:"]
    lines += [_line(fate) for fate in sorted(images, key=lambda fate: -fate.cpu_s)[:COSTLIEST]]
    lines += ["", "costliest in memory:"]
    lines += [_line(fate) for fate in sorted(images, key=lambda fate: -fate.added_mb)[:COSTLIEST]]
    return "\n".join(lines) + "\n"


def _is_decoded(fate: Fate) -> bool:
    return fate.answer.startswith("decoded ")


def _line(fate: Fate) -> str:
    return f"{fate.cpu_s:6.2f} s {fate.added_mb:6.0f} MB  {fate.path} ({fate.bytes} bytes): {fate.answer}"


def _forget_peak() -> None:
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def _peak_mb() -> float:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) / 1000 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    sys.exit(main())
