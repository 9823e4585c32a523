"""Lets other processes of the machine go first."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

LOWEST_PRIORITY = 19
AUTOGROUP_TRIES = 20


def yield_to_others() -> None:
    """Give this process, and those that it starts, only the CPU time that no other process wants.

    Raises:
        OSError: the kernel does not let this process have a lower priority.
    """
    os.nice(LOWEST_PRIORITY)
    if sys.platform.startswith("linux"):
        # Stronger than nice: a process of the usual policy that wakes up runs at once.
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        _yield_as_session()


def _yield_as_session() -> None:
    """Lower the session too: Linux shares the time out among sessions first (sched(7), autogroup)."""
    autogroup = Path("/proc/self/autogroup")
    if not autogroup.exists():
        return
    for _ in range(AUTOGROUP_TRIES):
        try:
            autogroup.write_text(str(LOWEST_PRIORITY))
        except BlockingIOError:  # Linux takes one change in 100 ms from the whole machine
            time.sleep(0.1)
        else:
            return
