"""Distributes tests to workers, orders them, and runs tests marked `alone` exclusively."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from xdist.scheduler import LoadScopeScheduling

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    import pytest

ONE_WORKER_FOLDERS = ("tests/deploy/",)
"""One worker runs all tests of such a folder, because they share an image that takes minutes to build."""


class FileScheduling(LoadScopeScheduling):  # type: ignore[misc] # xdist has no types
    """Gives a worker whole files, whose tests share servers, or a whole folder of `ONE_WORKER_FOLDERS`."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return next((folder for folder in ONE_WORKER_FOLDERS if path.startswith(folder)), path)


def ordered(items: list[pytest.Item]) -> list[pytest.Item]:
    """Sort the longest files first, so that all workers stay busy until the end; tests `alone` come last.

    The order within a file stays as it is written.
    """
    ranks: dict[str, int] = {}
    for item in items:
        ranks[_file_of(item)] = min(_rank(item), ranks.get(_file_of(item), len(_LONGEST_FIRST)))
    return sorted(
        items, key=lambda item: (item.get_closest_marker("alone") is not None, ranks[_file_of(item)])
    )


def _file_of(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0]


_LONGEST_FIRST = ("server", "services", "slow")
"""Marks of tests that take long."""


def _rank(item: pytest.Item) -> int:
    if item.nodeid.startswith(ONE_WORKER_FOLDERS):
        return -1
    marks = (number for number, mark in enumerate(_LONGEST_FIRST) if item.get_closest_marker(mark))
    return next(marks, len(_LONGEST_FIRST))


def machine_lock(item: pytest.Item) -> AbstractContextManager[None]:
    """Hold the machine for this test: exclusively if it is marked `alone`, otherwise shared with others."""
    if not hasattr(item.config, "workerinput"):  # the only worker
        return nullcontext()
    # The folder of this run; each worker has a folder in it.
    folder: Path = item.config._tmp_path_factory.getbasetemp().parent  # type: ignore[attr-defined]
    return _locked(folder, alone=item.get_closest_marker("alone") is not None)


@contextmanager
def _locked(folder: Path, *, alone: bool) -> Iterator[None]:
    import fcntl  # noqa: PLC0415 - missing on Windows, where `make` is not used

    with (folder / "queue.lock").open("wb") as queue, (folder / "machine.lock").open("wb") as machine:
        # The queue lock keeps later tests from overtaking one that waits for exclusive access.
        fcntl.flock(queue, fcntl.LOCK_EX)
        fcntl.flock(machine, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(queue, fcntl.LOCK_UN)
        yield
