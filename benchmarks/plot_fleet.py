r"""Draw docs/diagrams/fleet.svg: what the loss of one host does to the tasks that arrive meanwhile.

python -m benchmarks.plot_fleet

The simulation of fleet.py, by the minute of arrival, from fleet_minutes.csv. Its columns say how many hosts
there are, and which share of their capacity arrives. How the file was made:

    for fleet in "2 0.7" "4 0.7" "8 0.85"; do
        python -m benchmarks.fleet --hosts ${fleet% *} --loads ${fleet#* } --runs 1 --seconds 4800 \
            --lose-at-s 600 --replace-minutes 35 35 --minutes benchmarks/fleet_minutes.csv
    done
"""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path

from benchmarks.plot_serve import STYLE

MINUTES = Path(__file__).parent / "fleet_minutes.csv"
PICTURE = Path(__file__).parents[1] / "docs" / "diagrams" / "fleet.svg"
WIDTH_PX, HEIGHT_PX = 760, 420
LEFT_PX, RIGHT_PX, TOP_PX, BOTTOM_PX = 64, 150, 64, 48
TITLE = "Time of a task, against the minute in which it arrived; one of the hosts is lost"
SUBTITLE = "simulated; a call, then a queue; the load is a share of the capacity of all hosts"
LOST_MIN, READY_MIN = 10.0, 46.5
"""When the host is lost, and when its replacement is ready."""
LOW_S, HIGH_S = 0.05, 5000.0
LABELS_S = {0.1: "0.1 s", 1: "1 s", 10: "10 s", 60: "1 min", 600: "10 min", 3600: "1 h"}

Fleet = tuple[int, float]


def read(path: Path) -> dict[Fleet, list[dict[str, str]]]:
    """The rows of each fleet, by its hosts and its load."""
    fleets: dict[Fleet, list[dict[str, str]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            fleets.setdefault((int(row["hosts"]), float(row["load"])), []).append(row)
    return fleets


def draw(fleets: dict[Fleet, list[dict[str, str]]]) -> str:
    """The picture: for each fleet a line of the median and one of the 99th percentile."""
    last_min = max(int(row["minute"]) for rows in fleets.values() for row in rows)

    def x_of(minute: float) -> float:
        return LEFT_PX + (WIDTH_PX - LEFT_PX - RIGHT_PX) * minute / last_min

    lines = _frame()
    for value_s, text in LABELS_S.items():
        y = _y_of(value_s)
        lines += [
            f'<line class="grid" x1="{LEFT_PX}" x2="{WIDTH_PX - RIGHT_PX}" y1="{y:.1f}" y2="{y:.1f}"/>',
            f'<text class="quiet" x="{LEFT_PX - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>',
        ]
    for minute, text in ((LOST_MIN, "lost"), (READY_MIN, "replaced")):
        x = x_of(minute)
        lines += [
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP_PX}" y2="{HEIGHT_PX - BOTTOM_PX}"/>',
            f'<text class="quiet" x="{x + 4:.1f}" y="{TOP_PX + 12}">{text}</text>',
        ]
    for minute in range(0, last_min + 1, 10):
        y = HEIGHT_PX - BOTTOM_PX + 20
        lines.append(
            f'<text class="quiet" x="{x_of(minute):.1f}" y="{y}" text-anchor="middle">{minute}</text>'
        )
    for number, ((hosts, load), rows) in enumerate(fleets.items()):
        for column in ("p50_s", "p99_s"):
            points = [f"{x_of(int(row['minute'])):.1f} {_y_of(float(row[column])):.1f}" for row in rows]
            lines.append(f'<path class="v{number} {column[:3]}" d="M {" L ".join(points)}"/>')
        lines += _legend(number, f"{hosts} hosts, {load:.0%}")
    return "\n".join([*lines, "</svg>", ""])


def _y_of(value_s: float) -> float:
    share = math.log(max(value_s, LOW_S) / LOW_S) / math.log(HIGH_S / LOW_S)
    return HEIGHT_PX - BOTTOM_PX - (HEIGHT_PX - TOP_PX - BOTTOM_PX) * share


def _frame() -> list[str]:
    return [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH_PX} {HEIGHT_PX}" role="img" '
            'aria-label="Time of a task around the loss of a host">'
        ),
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{WIDTH_PX}" height="{HEIGHT_PX}"/>',
        f'<text x="12" y="24">{TITLE}</text>',
        f'<text class="quiet" x="12" y="44">{SUBTITLE}</text>',
    ]


def _legend(number: int, text: str) -> list[str]:
    x, y = WIDTH_PX - RIGHT_PX + 14, TOP_PX + 24 + 44 * number
    return [
        f'<path class="v{number}" d="M {x} {y - 4} h 24"/>',
        f'<text x="{x + 30}" y="{y}">{text}</text>',
        f'<path class="v{number} p99" d="M {x} {y + 14} h 24"/>',
        f'<text class="quiet" x="{x + 30}" y="{y + 18}">p99</text>',
    ]


def main() -> None:
    """Write the picture."""
    PICTURE.write_text(draw(read(MINUTES)), encoding="utf-8")
    sys.stdout.write(f"{PICTURE}\n")


if __name__ == "__main__":
    main()
