"""Counts the shared files of pixels that processes hold."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from sam3_runner.images.pixel_file import NAME_PREFIX

if TYPE_CHECKING:
    from collections.abc import Iterable


def held_files(pids: Iterable[int] | None = None) -> set[str]:
    """The names of the files of pixels that processes have open; by default this process.

    A process that has ended holds none.
    """
    names: set[str] = set()
    for pid in [os.getpid()] if pids is None else pids:
        with contextlib.suppress(OSError):
            for descriptor in list(Path(f"/proc/{pid}/fd").iterdir()):
                with contextlib.suppress(OSError):
                    target = descriptor.readlink().name
                    if target.startswith(f"memfd:{NAME_PREFIX}"):
                        names.add(target.removeprefix("memfd:").removesuffix(" (deleted)"))
    return names


def all_pids() -> list[int]:
    """The processes of this machine."""
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
