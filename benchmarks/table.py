"""Tables of the benchmarks: the machine's name, and appending rows."""

from __future__ import annotations

import csv
import platform
from pathlib import Path

from sam3_runner.serving.cpu_share import cpu_share


def processor() -> str:
    """The model name of this machine's processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine_name() -> str:
    """The number of cores that a benchmark may use, and the processor."""
    return f"{cpu_share().threads} x {processor()}"


def record(path: Path, rows: list[dict[str, object]]) -> None:
    """Append `rows`, which have the same keys, to the CSV file at `path`."""
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if is_new:
            writer.writeheader()
        writer.writerows(rows)
