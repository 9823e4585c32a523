"""Lets other processes of the machine go first."""

from __future__ import annotations

import os
import sys


def yield_to_others() -> None:
    """Give this process, and those that it starts, only the CPU time that no other process wants."""
    os.nice(19)
    if sys.platform.startswith("linux"):
        # Stronger than nice: a process of the usual policy that wakes up runs at once.
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
