"""A process with its descendants, of which any may end while they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Read = TypeVar("Read")


def process_tree(pid: int) -> list[psutil.Process]:
    """The running process and its descendants, itself first; none if it has ended."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def read_each(processes: Iterable[psutil.Process], read: Callable[[psutil.Process], Read]) -> list[Read]:
    """What `read` returns for each process that has not ended meanwhile."""
    values = []
    for process in processes:
        try:
            values.append(read(process))
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            continue  # psutil's error; /proc's before and after the file is opened
    return values
