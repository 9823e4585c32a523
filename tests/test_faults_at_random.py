"""Random faults from a seed: no task is lost, stuck or done twice, and every answer is correct."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

import pytest

from tests import random_faults
from tests.tiers import need

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.server, pytest.mark.alone]

MINUTES = float(os.environ.get("FAULT_MINUTES", "3"))
SEED = int(os.environ.get("FAULT_SEED", str(int(time.time()))))


def report(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def test_every_invariant_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """FAULT_MINUTES is the duration, FAULT_SEED the seed."""
    need(random_faults.missing())
    with capsys.disabled():
        sys.stdout.write(f"\nrandom faults: FAULT_SEED={SEED}\n")
    outcome = random_faults.run(MINUTES, SEED, tmp_path, report)
    report(outcome.summary)
    assert not outcome.violations, outcome.details
