"""Real cgroups with a CPU quota, for processes that a test starts."""

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
    """Limit the CPU time of processes that this thread starts in the block; they must end before its end.

    Skips the test if this process may not set a quota. It uses cgroups version 1 only: there a thread can be
    moved together with its children, while version 2 moves whole processes.
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
