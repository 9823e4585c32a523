"""The demo, with the command of `make demo`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from commands.local_server import ROOT

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.server

SAMPLE = ROOT / "examples" / "sample.jpg"


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sam3_client", "demo", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_demo_prints_its_answer_and_writes_its_files(tmp_path: Path) -> None:
    """The last line is the JSON answer; mask and overlay are at the printed paths; the exit status is 0."""
    ended = run_demo("--out", str(tmp_path), "--prompt", "purple circle", "--prompt", "blue star")
    assert ended.returncode == 0, ended.stderr
    circle, star = json.loads(ended.stdout.splitlines()[-1])["results"]
    assert (circle["labels"], star["labels"]) == (["purple circle"], [])
    paths = dict(re.findall(r"^demo: (mask|overlay): +(.*)$", ended.stderr, re.MULTILINE))
    mask = np.asarray(Image.open(paths["mask"])) > 0
    overlay = np.asarray(Image.open(paths["overlay"])).astype(int)
    picture = np.asarray(Image.open(SAMPLE)).astype(int)
    assert mask.sum() == circle["instances"][0]["area"]
    changed = np.abs(overlay - picture).max(axis=2)
    assert (changed[mask] > 15).mean() > 0.9, "the found circle is tinted"
    assert (changed[mask] < 60).mean() > 0.9, "its colour is still seen"
    assert (changed[: mask.shape[0] // 4] > 30).mean() < 0.01, "the rest is unchanged"


def test_missing_image_is_refused(tmp_path: Path) -> None:
    """A missing image gives an error message, before the server starts."""
    ended = run_demo("--out", str(tmp_path), "--image", str(tmp_path / "none.jpg"))
    assert ended.returncode == 2
    assert "no such image" in ended.stderr
    assert not list(tmp_path.iterdir())
