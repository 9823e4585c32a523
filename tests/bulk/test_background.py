"""A bulk run in the background leaves the CPU to others."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack

import psutil
import pytest

from commands.local_server import ROOT
from tests.edge import wait_for

WORK = "while True: pass"
IN_BACKGROUND = (
    f"from bulk.stages.background import yield_to_others\nyield_to_others()\nprint(flush=True)\n{WORK}"
)
SEEN_CPU_S = 1.5
MOST_CPU_S = 0.3
"""More than it gets beside that, and while the other process starts."""


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="needs Linux, which binds processes to a core"
)
def test_process_in_background_leaves_a_core_to_another_session() -> None:
    """Of one core, it gets next to nothing while another session's process wants all of it."""
    core = min(os.sched_getaffinity(0))
    with ExitStack() as stack:

        def started(code: str) -> psutil.Process:
            child = subprocess.Popen(
                [sys.executable, "-c", code],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                start_new_session=True,
                preexec_fn=lambda: os.sched_setaffinity(0, {core}),  # noqa: PLW1509 - sets nothing else
            )
            stack.enter_context(child)
            stack.callback(child.kill)
            if code is IN_BACKGROUND:
                assert child.stdout is not None
                child.stdout.readline()
            return psutil.Process(child.pid)

        background = started(IN_BACKGROUND)
        before_s = background.cpu_times().user
        usual = started(WORK)
        wait_for(lambda: usual.cpu_times().user, lambda used_s: used_s > SEEN_CPU_S)
        assert background.cpu_times().user - before_s < MOST_CPU_S
