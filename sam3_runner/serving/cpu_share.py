"""How many cores this process may use: in a container often fewer than the host has.

Two limits apply: the cores that it may run on (affinity, cpuset), and the CPU quota of its cgroups. Python
3.11 reads neither; `loky.cpu_count` reads the topmost cgroup only. Does not import torch.
"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from sam3_runner.serving.cgroups import smallest_limit


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
    return smallest_limit("cpu", _quota, root)


def _quota(folder: Path) -> float:
    if (version_2 := folder / "cpu.max").exists():
        quota, period = version_2.read_text().split()
    elif (version_1 := folder / "cpu.cfs_quota_us").exists():
        quota, period = version_1.read_text(), (folder / "cpu.cfs_period_us").read_text()
    else:
        return math.inf
    # Without a quota version 2 has max, version 1 has -1.
    return int(quota) / int(period) if quota.strip().isdecimal() else math.inf
