"""How many cores this process may use: in a container often fewer than the host has.

Two limits apply: the cores that it may run on (affinity, cpuset), and the CPU quota of its cgroups. Python
3.11 reads neither; `loky.cpu_count` reads the topmost cgroup only. Does not import torch.
"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class CpuShare:
    """What a process may use of its host's CPU.

    Attributes:
        cores: cores' worth of CPU time; a quota may be a fraction.
        host_cores: cores of the host.
    """

    cores: float
    host_cores: int

    @property
    def threads(self) -> int:
        """Threads for these cores: `cores` rounded up, at least 1."""
        return max(1, math.ceil(self.cores))

    def __str__(self) -> str:
        return f"{round(self.cores, 2):g} of {self.host_cores} cores"


def cpu_share() -> CpuShare:
    """The current share of this process."""
    host_cores = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if sys.platform.startswith("linux") else host_cores
    return CpuShare(min(allowed, quota_cores()), host_cores)


def quota_cores(root: Path = Path("/")) -> float:
    """Cores' worth of CPU time in the smallest quota of the process' cgroups; infinity without a quota.

    Args:
        root: of the file system with /proc and the cgroups, of either version.
    """
    try:
        return min((_quota(folder) for folder in _cgroup_folders(root)), default=math.inf)
    except OSError:  # no /proc: not Linux
        return math.inf


def _cgroup_folders(root: Path) -> Iterator[Path]:
    """The process' own cgroups and their parents, up to the mount point."""
    own = _own_cgroups(root)
    for line in (root / "proc/self/mountinfo").read_text().splitlines():
        mount, _, file_system = line.partition(" - ")
        mount_root, mount_point = mount.split()[3:5]
        kind, _, options = file_system.split(" ", 2)  # the source may be empty
        if kind == "cgroup2":
            cgroup = own.get("")
        elif kind == "cgroup" and "cpu" in options.split(","):
            cgroup = own.get("cpu")
        else:
            continue
        top = root / mount_point.lstrip("/")
        below = _below(mount_root, cgroup)
        yield from (top / folder for folder in (below, *below.parents))


def _own_cgroups(root: Path) -> dict[str, str]:
    """Path of the process' cgroup for each controller; version 2 has one for all, under an empty name."""
    own: dict[str, str] = {}
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own |= dict.fromkeys(controllers.split(","), path)
    return own


def _below(mount_root: str, cgroup: str | None) -> PurePosixPath:
    """Path of a cgroup below the mount; empty when it is not visible there, as in a container."""
    path = PurePosixPath(cgroup or "/")
    if ".." in path.parts or not path.is_relative_to(mount_root):
        return PurePosixPath()
    return path.relative_to(mount_root)


def _quota(folder: Path) -> float:
    if (version_2 := folder / "cpu.max").exists():
        quota, period = version_2.read_text().split()
    elif (version_1 := folder / "cpu.cfs_quota_us").exists():
        quota, period = version_1.read_text(), (folder / "cpu.cfs_period_us").read_text()
    else:
        return math.inf
    # Without a quota version 2 has max, version 1 has -1.
    return int(quota) / int(period) if quota.strip().isdecimal() else math.inf
