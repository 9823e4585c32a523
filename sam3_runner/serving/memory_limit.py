"""How much memory this process may use: in a container often less than the host has."""

from __future__ import annotations

import math
from pathlib import Path

from sam3_runner.serving.cgroups import cgroup_folders

LIMIT_FILES = ("memory.max", "memory.limit_in_bytes")
"""Of a cgroup, by its version."""
NO_LIMIT_BYTES = 2**62
"""Without a limit version 2 has the word max, version 1 the largest number of whole pages."""


def memory_limit_bytes(root: Path = Path("/")) -> float:
    """The smallest limit of the process' cgroups; infinity without one.

    Args:
        root: of the file system with /proc and the cgroups, of either version.
    """
    try:
        return min((_limit(folder) for folder in cgroup_folders("memory", root)), default=math.inf)
    except OSError:  # no /proc: not Linux
        return math.inf


def _limit(folder: Path) -> float:
    for name in LIMIT_FILES:
        if (file := folder / name).exists():
            text = file.read_text().strip()
            return int(text) if text.isdecimal() and int(text) < NO_LIMIT_BYTES else math.inf
    return math.inf
