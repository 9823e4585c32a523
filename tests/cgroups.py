"""Real cgroups with a CPU quota, for what this test starts."""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

_CPU = Path("/sys/fs/cgroup/cpu")
PERIOD_US = 100_000


@contextmanager
def cpu_quota(cores: float) -> Iterator[None]:
    """What this thread starts in the block has so much CPU time; it must have ended when the block ends.

    Skips the test where this process may set no quota. Version 1 alone: there a thread can be moved, and with
    it what it starts, while version 2 moves whole processes.
    """
    home = _CPU / _own_cgroup().lstrip("/")
    folder = home / f"sam3-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no CPU quota of version 1 can be set here: {error.strerror}")
    try:
        (folder / "cpu.cfs_period_us").write_text(str(PERIOD_US))
        (folder / "cpu.cfs_quota_us").write_text(str(int(cores * PERIOD_US)))
        (folder / "tasks").write_text(str(threading.get_native_id()))
        yield
    finally:
        (home / "tasks").write_text(str(threading.get_native_id()))
        folder.rmdir()


def _own_cgroup() -> str:
    for line in Path("/proc/thread-self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "cpu" in controllers.split(","):
            return path
    return "/"
