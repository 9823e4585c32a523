"""The load benchmark as a user runs it, on the demo checkpoint."""

from __future__ import annotations

import csv
import subprocess
import sys
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING

import pytest

from benchmarks.plot_serve import draw
from commands.local_server import ROOT

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.server, pytest.mark.slow]


def run(path: Path, *options: str) -> tuple[list[dict[str, str]], str]:
    """Run the command with short loads; returns the rows of its CSV file, and its output."""
    command = [
        *(sys.executable, "-m", "benchmarks.serve", "--seconds", "1", "--drawings", "2"),
        *("--setting", "API_WORKERS=1", "--record", str(path), *options),
    ]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file)), ended.stdout


def test_scenarios_are_measured_on_the_real_server(tmp_path: Path) -> None:
    """Each scenario has its rows, with the server's own stages; files differ unless the picture repeats."""
    scenarios = ("closed", "same-picture", "overload", "crowded")
    options = ("--scenarios", *scenarios, "--clients", "2", "--label", "new", "--deadline-ms", "900")
    rows, printed = run(tmp_path / "serve.csv", *options)
    found = [(row["scenario"], row["kind"], row["clients"]) for row in rows]
    assert found == [
        ("closed", "one prompt", "2"),
        ("same-picture", "one prompt", "1"),
        *(
            (scenario, kind, "")
            for scenario in ("overload", "overload 900 ms")
            for kind in ("one prompt", "refused", "failed", "/health", "/api/v1/model/info")
        ),
        ("crowded", "one prompt", "1"),
    ]
    closed, same, overload, *_, crowded = rows
    assert {row["version"] for row in rows} == {"new"}
    assert {row["weights"] for row in rows} == {"demo"}
    assert int(closed["n"]) > 0
    assert closed["errors"] == same["errors"] == crowded["errors"] == ""
    for stage in ("claim", "fetch", "decode", "queue", "encode_image", "segment", "store", "settle"):
        assert f"{stage}=" in closed["stage_means_ms"]
        assert stage in printed
    assert float(closed["pss_mb"]) > 300
    assert "sam3_features_miss" in closed["caches"]
    assert "sam3_features_hit" not in closed["caches"]
    assert "sam3_features_hit" in same["caches"]
    assert float(overload["rate_per_s"]) > 9 * float(closed["throughput_per_s"])
    health, info = rows[5:7]
    assert int(health["n"]) > 0
    assert health["errors"] == info["errors"] == ""
    assert float(crowded["masks_mean"]) == 24


def test_two_checkouts_are_measured_in_turn(tmp_path: Path) -> None:
    """Both have the same rows, and the ratio of the first by the second is printed."""
    options = ("--scenarios", "closed", "--clients", "1", "--label", "one", "--against-label", "other")
    rows, printed = run(tmp_path / "serve.csv", *options, "--rounds", "1", "--against", str(ROOT))
    assert [row["version"] for row in rows] == ["one", "other"]
    assert {row["seconds"] for row in rows} == {"1.0"}
    ratio = float(rows[0]["throughput_per_s"]) / float(rows[1]["throughput_per_s"])
    assert f"throughput_per_s {ratio:.2f}" in printed.partition("one / other\n")[2]
    picture = ET.fromstring(draw(rows))  # noqa: S314 - our own picture
    texts = "".join(picture.itertext())
    assert "one" in texts
    assert "other" in texts
