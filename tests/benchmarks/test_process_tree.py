"""The memory and CPU time of a process with its descendants, of which any may end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.process_tree import call_each, process_tree

if TYPE_CHECKING:
    import psutil


def test_descendant_that_ends_meanwhile_is_left_out() -> None:
    """What a benchmark reads of the other processes is kept, whether it asks psutil or /proc."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        tree = process_tree(os.getpid())
        child.kill()
    assert {os.getpid(), child.pid} <= {process.pid for process in tree}
    for read in (_memory, _statistics):
        pids = call_each(tree, read)
        assert child.pid not in pids
        assert os.getpid() in pids


def test_process_that_has_ended_has_no_tree() -> None:
    """It is no error of the benchmark either."""
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    assert process_tree(ended.pid) == []


def _memory(process: psutil.Process) -> int:
    """The pid, if psutil can read the memory."""
    process.memory_full_info()
    return process.pid


def _statistics(process: psutil.Process) -> int:
    """The pid, as /proc has it."""
    return int(Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8").partition(" ")[0])
