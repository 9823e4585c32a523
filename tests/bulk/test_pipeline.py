"""The dataset of the stages, as Ray takes it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.alone]  # Ray is started

ROOT = Path(__file__).parents[2]
DATASET = """
from bulk.cluster import Sizes, ray_session
from bulk.plan import Plan
from bulk.settings import Run, RunSettings
run = Run(RunSettings(("star",), "0" * 64), "in", "out", "demo", side_px=336)
with ray_session(run):
    from bulk.pipeline import _dataset
    _dataset(run, Plan(64, 64), [0], Sizes.of(cpus=16, gpus=2))
"""


def test_ray_takes_the_stages_of_a_host_with_gpus() -> None:
    """Ray has conditions of its own for stages on GPUs, which this machine may not have."""
    made = subprocess.run(
        [sys.executable, "-c", DATASET], cwd=ROOT, capture_output=True, text=True, timeout=180, check=False
    )
    assert made.returncode == 0, made.stderr[-2000:]
