"""How much memory this process may use: in a container often less than the host has."""

from __future__ import annotations

import math
from pathlib import Path

from sam3_runner.serving.cgroups import smallest_limit

LIMIT_FILES = ("memory.max", "memory.limit_in_bytes")
"""Of a cgroup, by its version."""


def memory_limit_bytes(root: Path = Path("/")) -> float:
    """The smallest limit of the process' cgroups; infinity, or more than any host has, without one.

    Args:
        root: of the file system with /proc and the cgroups, of either version.
    """
    return smallest_limit("memory", _limit, root)


def _limit(folder: Path) -> float:
    for name in LIMIT_FILES:
        if (file := folder / name).exists():
            text = file.read_text().strip()
            # Without a limit version 2 has the word max, version 1 a number beyond any memory.
            return int(text) if text.isdecimal() else math.inf
    return math.inf
