"""The dataset of the stages, as Ray takes it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.alone]  # Ray is started

ROOT = Path(__file__).parents[2]
DATASET = """
import sys
from dataclasses import replace
from bulk.cluster import Sizes, ray_session
from bulk.errors import RunError
from bulk.objects import open_objects
from bulk.plan import make_plan
from bulk.settings import Run, RunSettings
from bulk.sources import Picture
run = Run(RunSettings(("star",), "0" * 64), "in", sys.argv[1], "/no/weights.pt", side_px=336)
plan = make_plan(open_objects(run.folder), [Picture("/no/picture.png")], 64)
with ray_session(run) as sizes:
    from bulk.pipeline import _dataset, segment_shards
    _dataset(run, plan, [0], Sizes.of(cpus=16, gpus=2))
    try:
        list(segment_shards(run, plan, [0], sizes))
    except RunError as error:
        print(type(error).__name__, error, file=sys.stderr)
"""


def test_ray_takes_the_stages(tmp_path: Path) -> None:
    """Ray has conditions of its own for stages on GPUs, and hides why a process cannot start."""
    made = subprocess.run(
        [sys.executable, "-c", DATASET, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert made.returncode == 0, made.stderr[-2000:]
    assert made.stderr.startswith("ModelUnavailable the model cannot be loaded: no weights at /no/weights.pt")
