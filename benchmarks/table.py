"""Tables of the benchmarks: the machine's name, and appending rows."""

from __future__ import annotations

import argparse
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


def parse_out(description: str | None) -> Path | None:
    """The CSV file of --out, the only option of a benchmark; None: it was not given."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="append to this CSV file")
    out: Path | None = parser.parse_args().out
    return out


def add_settings(parser: argparse.ArgumentParser, example: str) -> None:
    """Add `--setting NAME=VALUE...`: pairs of names and values for the servers' environment."""
    parser.add_argument(
        "--setting",
        nargs="+",
        default=[],
        type=lambda setting: tuple(setting.split("=", 1)),
        metavar="NAME=VALUE",
        help=f"settings of the server, for example {example}",
    )


def record(path: Path, rows: list[dict[str, object]]) -> None:
    """Append `rows`, which have the same keys, to the CSV file at `path`."""
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if is_new:
            writer.writeheader()
        writer.writerows(rows)
