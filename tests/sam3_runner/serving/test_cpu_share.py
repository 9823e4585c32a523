"""The share of the host's CPU that a process may use, from cgroups as kernels and containers lay them out."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sam3_runner.serving.cpu_share import CpuShare, cpu_share, quota_cores
from tests.cgroups import V1_MEMORY, V2_MOUNT, cpu_quota, write_cgroups

ROOT = Path(__file__).parents[3]
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="cgroups and affinity are Linux's")

V1_CPU = "36 32 0:33 {root} /sys/fs/cgroup/cpu,cpuacct rw,nosuid - cgroup cgroup rw,cpu,cpuacct"

V2 = "/sys/fs/cgroup"
V1 = "/sys/fs/cgroup/cpu,cpuacct"

LAYOUTS: dict[str, tuple[str, str, dict[str, str], float]] = {
    "version 2, a container of its own namespace": (
        "0::/",
        V2_MOUNT,
        {f"{V2}/cpu.max": "250000 100000\n"},
        2.5,
    ),
    "version 2, no quota": ("0::/", V2_MOUNT, {f"{V2}/cpu.max": "max 100000\n"}, math.inf),
    "version 2, the controller is off": ("0::/", V2_MOUNT, {}, math.inf),
    "version 2, a service of the host": (
        "0::/system.slice/sam3.service",
        V2_MOUNT,
        {f"{V2}/system.slice/sam3.service/cpu.max": "50000 100000"},
        0.5,
    ),
    "version 2, a parent is tighter": (
        "0::/pod/container",
        V2_MOUNT,
        {
            f"{V2}/pod/container/cpu.max": "800000 100000",
            f"{V2}/pod/cpu.max": "300000 100000",
            f"{V2}/other/cpu.max": "1000 100000",
        },
        3.0,
    ),
    "version 2, a cgroup outside of the namespace": (
        "0::/../sibling",
        V2_MOUNT,
        {f"{V2}/cpu.max": "150000 100000", "/sys/fs/sibling/cpu.max": "1000 100000"},
        1.5,
    ),
    "version 1, a container": (
        "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc",
        f"{V1_MEMORY}\n{V1_CPU.format(root='/docker/abc')}",
        {f"{V1}/cpu.cfs_quota_us": "125000\n", f"{V1}/cpu.cfs_period_us": "50000\n"},
        2.5,
    ),
    "version 1, a service of the host": (
        "3:cpu,cpuacct:/a/b",
        V1_CPU.format(root="/"),
        {
            f"{V1}/a/b/cpu.cfs_quota_us": "-1",
            f"{V1}/a/b/cpu.cfs_period_us": "100000",
            f"{V1}/a/cpu.cfs_quota_us": "400000",
            f"{V1}/a/cpu.cfs_period_us": "100000",
        },
        4.0,
    ),
    "version 1, no quota": (
        "3:cpu,cpuacct:/",
        V1_CPU.format(root="/"),
        {f"{V1}/cpu.cfs_quota_us": "-1", f"{V1}/cpu.cfs_period_us": "100000"},
        math.inf,
    ),
    "version 1 beside version 2": (
        "3:cpu,cpuacct:/x\n0::/y",
        f"{V1_CPU.format(root='/')}\n30 23 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw",
        {f"{V1}/x/cpu.cfs_quota_us": "200000", f"{V1}/x/cpu.cfs_period_us": "100000"},
        2.0,
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_quota_is_found(tmp_path: Path, layout: str) -> None:
    """The smallest quota of the process' own cgroup and its parents applies; other cgroups do not."""
    own, mounts, files, cores = LAYOUTS[layout]
    write_cgroups(tmp_path, own, mounts, files)
    assert quota_cores(tmp_path) == cores


def test_no_quota_without_linux(tmp_path: Path) -> None:
    """Without /proc there is no quota."""
    assert quota_cores(tmp_path) == math.inf


@pytest.mark.parametrize(
    ("cores", "threads", "text"),
    [
        (0.2, 1, "0.2 of 64 cores"),
        (2.5, 3, "2.5 of 64 cores"),
        (64, 64, "64 of 64 cores"),
        (7 / 3, 3, "2.33 of 64 cores"),
    ],
)
def test_threads_of_a_share(cores: float, threads: int, text: str) -> None:
    """A fraction of a core needs a thread too."""
    share = CpuShare(cores, 64)
    assert share.threads == threads
    assert str(share) == text


def share_of_a_child(setup: str = "") -> list[float]:
    """Cores and threads of a process that runs `setup` first."""
    code = (
        f"import os\n{setup}\nfrom sam3_runner.serving.cpu_share import cpu_share\n"
        "share = cpu_share(); print(share.cores, share.threads)"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return [float(word) for word in ended.stdout.split()]


@LINUX
def test_affinity_applies() -> None:
    """A process that is bound to one core has one, however many the host has."""
    assert share_of_a_child("os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})") == [1.0, 1.0]


@LINUX
def test_real_quota_applies() -> None:
    """The kernel's own files, for a process in a cgroup with a quota."""
    with cpu_quota(0.75):
        assert share_of_a_child() == [0.75, 1.0]


def test_this_process() -> None:
    """The share of this process is at most the host's cores."""
    share = cpu_share()
    assert 0 < share.cores <= share.host_cores == os.cpu_count()
