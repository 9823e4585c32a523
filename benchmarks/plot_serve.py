r"""Draw docs/diagrams/serve.svg from the last table in benchmarks/serve.csv.

python -m benchmarks.plot_serve

Latency against throughput: for each version, a line of the median and one of the 99th percentile over the
closed loops, whose points have the number of callers.
"""

from __future__ import annotations

import csv
import math
import sys
from html import escape
from pathlib import Path

from benchmarks.serve import RESULTS

PICTURE = Path(__file__).parents[1] / "docs" / "diagrams" / "serve.svg"
WIDTH_PX, HEIGHT_PX = 760, 420
LEFT_PX, RIGHT_PX, TOP_PX, BOTTOM_PX = 64, 150, 64, 48
TABLE = ("measured", "hardware", "weights", "picture")
"""Rows of one table have these in common."""
VERSIONS = 3
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.quiet { fill: #59636e }
.grid { stroke: #d1d9e0 }
path { fill: none; stroke-width: 2 }
.p99 { stroke-dasharray: 5 4 }
.v0 { stroke: #2f6feb } circle.v0 { fill: #2f6feb }
.v1 { stroke: #8c959f } circle.v1 { fill: #8c959f }
.v2 { stroke: #bf3989 } circle.v2 { fill: #bf3989 }
rect.page { fill: #ffffff }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc } .quiet { fill: #9198a1 } .grid { stroke: #3d444d }
  .v0 { stroke: #4493f8 } circle.v0 { fill: #4493f8 }
  .v1 { stroke: #9198a1 } circle.v1 { fill: #9198a1 }
  .v2 { stroke: #db61a2 } circle.v2 { fill: #db61a2 }
  rect.page { fill: #0d1117 }
}
"""


def last_table(path: Path) -> list[dict[str, str]]:
    """The rows of the last date, machine and weights that have closed loops."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["scenario"] == "closed"]
    return [row for row in rows if all(row[name] == rows[-1][name] for name in TABLE)]


def draw(rows: list[dict[str, str]]) -> str:
    """The picture of closed loops.

    Raises:
        ValueError: more than VERSIONS versions.
    """
    # Of two rows for the same load, the later one.
    last = {(row["version"], int(row["clients"])): row for row in rows if row["p50_ms"]}
    versions = list(dict.fromkeys(version for version, _ in last))
    if len(versions) > VERSIONS:
        raise ValueError(f"the table has {len(versions)} versions, and the picture room for {VERSIONS}")
    most_per_s = max(float(row["throughput_per_s"]) for row in last.values()) * 1.05
    low_ms = 10 ** math.floor(math.log10(min(float(row["p50_ms"]) for row in last.values())))
    high_ms = 10 ** math.ceil(math.log10(max(float(row["p99_ms"]) for row in last.values())))

    def at(row: dict[str, str], column: str) -> tuple[float, float]:
        share = math.log(float(row[column]) / low_ms) / math.log(high_ms / low_ms)
        x = LEFT_PX + (WIDTH_PX - LEFT_PX - RIGHT_PX) * float(row["throughput_per_s"]) / most_per_s
        return x, HEIGHT_PX - BOTTOM_PX - (HEIGHT_PX - TOP_PX - BOTTOM_PX) * share

    lines = [*_frame(rows[-1]), *_grid(most_per_s, low_ms, high_ms)]
    for number, version in enumerate(versions):
        of_version = [row for (each, _), row in sorted(last.items()) if each == version]
        for column in ("p50_ms", "p99_ms"):
            points = [at(row, column) for row in of_version]
            way = " L ".join(f"{x:.1f} {y:.1f}" for x, y in points)
            lines.append(f'<path class="v{number} {column[:3]}" d="M {way}"/>')
            for row, (x, y) in zip(of_version, points, strict=True):
                lines.append(f'<circle class="v{number}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
                if column == "p50_ms":
                    lines.append(
                        f'<text class="quiet" x="{x + 6:.1f}" y="{y + 16:.1f}">{row["clients"]}</text>'
                    )
        y = TOP_PX + 24 + 44 * number
        x = WIDTH_PX - RIGHT_PX + 14
        lines += [
            f'<path class="v{number}" d="M {x} {y - 4} h 24"/>',
            f'<text x="{x + 30}" y="{y}">{escape(version)}, p50</text>',
            f'<path class="v{number} p99" d="M {x} {y + 14} h 24"/>',
            f'<text x="{x + 30}" y="{y + 18}">p99</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])


def _frame(row: dict[str, str]) -> list[str]:
    return [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH_PX} {HEIGHT_PX}" role="img" '
            'aria-label="Latency against throughput">'
        ),
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{WIDTH_PX}" height="{HEIGHT_PX}"/>',
        '<text x="12" y="24">ms a request, against requests/s; the numbers are callers</text>',
        (
            f'<text class="quiet" x="12" y="44">{escape(row["hardware"])}, {escape(row["weights"])} weights, '
            f"{escape(row['picture'])} pictures, {escape(row['measured'])}</text>"
        ),
    ]


def _grid(most_per_s: float, low_ms: float, high_ms: float) -> list[str]:
    """Lines at 1, 2 and 5 times each power of ten, and the scale of the throughput."""
    lines = []
    powers = range(round(math.log10(low_ms)), round(math.log10(high_ms)) + 1)
    for value in (times * 10**power for power in powers for times in (1, 2, 5)):
        if not low_ms <= value <= high_ms:
            continue
        share = math.log(value / low_ms) / math.log(high_ms / low_ms)
        y = HEIGHT_PX - BOTTOM_PX - (HEIGHT_PX - TOP_PX - BOTTOM_PX) * share
        lines += [
            f'<line class="grid" x1="{LEFT_PX}" x2="{WIDTH_PX - RIGHT_PX}" y1="{y:.1f}" y2="{y:.1f}"/>',
            f'<text class="quiet" x="{LEFT_PX - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>',
        ]
    step = 10 ** math.floor(math.log10(most_per_s))
    step = step / 2 if most_per_s / step < 4 else step
    for number in range(int(most_per_s / step) + 1):
        x = LEFT_PX + (WIDTH_PX - LEFT_PX - RIGHT_PX) * number * step / most_per_s
        y = HEIGHT_PX - BOTTOM_PX + 20
        lines.append(f'<text class="quiet" x="{x:.1f}" y="{y}" text-anchor="middle">{number * step:g}</text>')
    return lines


def main() -> None:
    """Write the picture."""
    PICTURE.write_text(draw(last_table(RESULTS)), encoding="utf-8")
    sys.stdout.write(f"{PICTURE}\n")


if __name__ == "__main__":
    main()
