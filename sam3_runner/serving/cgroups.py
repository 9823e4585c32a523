"""Limits of this process in its cgroups, as containers and services of Linux have them."""

from __future__ import annotations

import math
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


def smallest_limit(controller: str, limit_of: Callable[[Path], float], root: Path) -> float:
    """The smallest limit among the process' own cgroups and their parents; infinity without one.

    Args:
        controller: `cpu` or `memory`.
        limit_of: reads the limit of the cgroup in a folder; infinity where it has none.
        root: of the file system with /proc and the cgroups, of either version.
    """
    try:
        return min(map(limit_of, _folders(controller, root)), default=math.inf)
    except OSError:  # no /proc: not Linux
        return math.inf


def _folders(controller: str, root: Path) -> Iterator[Path]:
    """The own cgroups and their parents, up to the mount point."""
    own = _own_cgroups(root)
    for line in (root / "proc/self/mountinfo").read_text().splitlines():
        mount, _, file_system = line.partition(" - ")
        mount_root, mount_point = mount.split()[3:5]
        kind, _, options = file_system.split(" ", 2)  # the source may be empty
        if kind == "cgroup2":
            cgroup = own.get("")
        elif kind == "cgroup" and controller in options.split(","):
            cgroup = own.get(controller)
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
