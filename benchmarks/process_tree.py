"""A process with its descendants, of which any may end while they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

T = TypeVar("T")


def process_tree(pid: int) -> list[psutil.Process]:
    """The running process and its descendants, itself first; none if it has ended."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def call_each(processes: Iterable[psutil.Process], call: Callable[[psutil.Process], T]) -> list[T]:
    """What `call` returns for each process that has not ended meanwhile."""
    values = []
    for process in processes:
        try:
            values.append(call(process))
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            continue  # it has ended; the last two are of /proc, read without psutil
    return values
