"""Cgroups: real ones with a CPU quota, and files as kernels and containers lay them out."""

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

V2_MOUNT = "29 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup rw,nsdelegate"
V1_MEMORY = "37 32 0:34 / /sys/fs/cgroup/memory rw,nosuid - cgroup cgroup rw,memory"
_OTHERS = "22 27 0:21 / /proc rw,relatime shared:5 - proc proc rw\n24 27 0:6 / /mnt rw - tmpfs  rw,mode=755"


def write_cgroups(root: Path, own: str, mounts: str, files: dict[str, str]) -> None:
    """Write what a process sees of its cgroups below `root`.

    Args:
        root: in place of `/`.
        own: lines of /proc/self/cgroup.
        mounts: lines of /proc/self/mountinfo, beside those of other file systems.
        files: contents by their absolute paths.
    """
    of_process = {"/proc/self/cgroup": own + "\n", "/proc/self/mountinfo": f"{_OTHERS}\n{mounts}\n"}
    for name, content in (of_process | files).items():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


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
