"""Runs the smoke script, and parses its output."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).parent.parent.parent


class Ended:
    """The script's output: its steps with their outcomes, and its verdict."""

    def __init__(self, process: subprocess.CompletedProcess[str]) -> None:
        self.status = process.returncode
        self.output = process.stdout
        self.errors = process.stderr
        *lines, self.verdict = process.stdout.splitlines() or [""]
        parts = [re.fullmatch(r"(ok|FAIL) +(\S[\w ]*?) +[\d.]+ s  (.*)", line) for line in lines]
        self.steps = [(part[1], part[2], part[3]) for part in parts if part]
        assert len(self.steps) == len(lines), self.output

    @property
    def failure(self) -> tuple[str, str]:
        """Name and note of the failed step, which is the last; checks the verdict and the status."""
        assert [outcome for outcome, _, _ in self.steps].count("FAIL") == 1, self.output
        outcome, name, note = self.steps[-1]
        assert outcome == "FAIL"
        assert self.status == 1
        assert self.verdict.startswith(f"FAILED at {name}: task ")
        return name, note


def smoke(url: str, variables: Mapping[str, str], *arguments: str) -> Ended:
    """Run the script with these variables, without the caller's."""
    return Ended(
        subprocess.run(
            [sys.executable, str(ROOT / "deploy" / "smoke.py"), url, *arguments],
            cwd="/",
            env={"PATH": os.environ["PATH"], **variables},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    )
