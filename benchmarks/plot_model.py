r"""Draw docs/diagrams/model.svg from the last table in benchmarks/model.csv.

python -m benchmarks.plot_model
"""

from __future__ import annotations

import csv
import sys
from html import escape
from pathlib import Path

from benchmarks.model import RESULTS

PICTURE = Path(__file__).parents[1] / "docs" / "diagrams" / "model.svg"
LABEL_PX, BARS_PX, ROW_PX, TOP_PX = 190, 430, 26, 64
WIDTH_PX = LABEL_PX + BARS_PX + 190
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.quiet { fill: #59636e }
.bar { fill: #2f6feb }
.first { fill: #8c959f }
rect.page { fill: #ffffff }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc } .quiet { fill: #9198a1 } .bar { fill: #4493f8 } .first { fill: #656c76 }
  rect.page { fill: #0d1117 }
}
"""


def last_table() -> list[dict[str, str]]:
    """The rows of the last run: those from the last eager fp32 row on."""
    with RESULTS.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    first = max(number for number, row in enumerate(rows) if row["technique"] == "eager float32")
    return rows[first:]


def draw(rows: list[dict[str, str]]) -> str:
    """A bar a technique: the time of a whole pass, with the mask IoU beside it."""
    longest_ms = max(float(row["whole_1_ms"]) for row in rows)
    height_px = TOP_PX + ROW_PX * len(rows) + 12
    lines = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH_PX} {height_px}" role="img" '
            'aria-label="Time of one pass by technique">'
        ),
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{WIDTH_PX}" height="{height_px}"/>',
        '<text x="12" y="24">One image and one prompt, ms on the device; each row adds a technique</text>',
        (
            f'<text class="quiet" x="12" y="44">{escape(rows[0]["device"])}, random weights of full size, '
            f"{escape(rows[0]['measured'])}</text>"
        ),
    ]
    for number, row in enumerate(rows):
        y = TOP_PX + ROW_PX * number
        time_ms = float(row["whole_1_ms"])
        bar_px = BARS_PX * time_ms / longest_ms
        kind = "bar" if number else "first"
        lines += [
            f'<text x="{LABEL_PX - 8}" y="{y + 14}" text-anchor="end">{escape(row["technique"])}</text>',
            f'<rect class="{kind}" x="{LABEL_PX}" y="{y}" width="{bar_px:.1f}" height="{ROW_PX - 8}"/>',
            (
                f'<text x="{LABEL_PX + bar_px + 6:.1f}" y="{y + 14}">{time_ms:.1f}'
                f'<tspan class="quiet">  IoU {float(row["iou_mean"]):.4f}</tspan></text>'
            ),
        ]
    return "\n".join([*lines, "</svg>", ""])


def main() -> None:
    """Write the picture."""
    PICTURE.write_text(draw(last_table()), encoding="utf-8")
    sys.stdout.write(f"{PICTURE}\n")


if __name__ == "__main__":
    main()
