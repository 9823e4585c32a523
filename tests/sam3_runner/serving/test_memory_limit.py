"""The memory that a process may use, from cgroups as kernels and containers lay them out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest

from sam3_runner.serving.memory_limit import memory_limit_bytes
from tests.cgroups import V1_MEMORY, V2_MOUNT, write_cgroups

if TYPE_CHECKING:
    from pathlib import Path

V2, V1 = "/sys/fs/cgroup", "/sys/fs/cgroup/memory"
LAYOUTS: dict[str, tuple[str, str, dict[str, str], float]] = {
    "version 2, a container": ("0::/", V2_MOUNT, {f"{V2}/memory.max": "17179869184\n"}, 2**34),
    "version 2, no limit": ("0::/", V2_MOUNT, {f"{V2}/memory.max": "max\n"}, math.inf),
    "version 2, the host": ("0::/", V2_MOUNT, {}, math.inf),
    "version 2, a parent is tighter": (
        "0::/pod/container",
        V2_MOUNT,
        {f"{V2}/pod/container/memory.max": "max\n", f"{V2}/pod/memory.max": "1073741824\n"},
        2**30,
    ),
    "version 1, a container": (
        "5:cpu:/docker/abc\n4:memory:/docker/abc",
        V1_MEMORY,
        {f"{V1}/docker/abc/memory.limit_in_bytes": "2147483648\n"},
        2**31,
    ),
    "version 1, no limit": (
        "4:memory:/",
        V1_MEMORY,
        {f"{V1}/memory.limit_in_bytes": "9223372036854771712\n"},
        9223372036854771712,
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_limit_is_found(tmp_path: Path, layout: str) -> None:
    """The smallest limit of the process' own cgroup and its parents applies."""
    own, mounts, files, limit_bytes = LAYOUTS[layout]
    write_cgroups(tmp_path, own, mounts, files)
    assert memory_limit_bytes(tmp_path) == limit_bytes


def test_no_limit_without_linux(tmp_path: Path) -> None:
    """Without /proc there is no limit."""
    assert memory_limit_bytes(tmp_path) == math.inf
