"""Which tests go to one worker, in which order, and which may run beside others."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from xdist.scheduler import LoadScopeScheduling

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    import pytest

TOGETHER = ("tests/deploy/",)
"""Folders that one worker does: what they share, an image, takes minutes to build."""


class ByFile(LoadScopeScheduling):  # type: ignore[misc] # xdist has no types
    """Gives a worker whole files, whose tests share servers, or all files of a folder of `TOGETHER`."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return next((folder for folder in TOGETHER if path.startswith(folder)), path)


def in_order(items: list[pytest.Item]) -> list[pytest.Item]:
    """What takes longest first, so that in the end all workers are busy; what runs alone last."""
    return sorted(
        items,
        key=lambda item: (
            item.get_closest_marker("alone") is not None,
            not item.nodeid.startswith(TOGETHER),
            item.get_closest_marker("server") is None,
        ),
    )


def turn(item: pytest.Item) -> AbstractContextManager[None]:
    """Wait until this test may run: one that is `alone`, until no other does. For the length of the block."""
    if not hasattr(item.config, "workerinput"):  # the only worker
        return nullcontext()
    # Of this run; below it each worker has a folder.
    folder: Path = item.config._tmp_path_factory.getbasetemp().parent  # type: ignore[attr-defined]
    return _locked(folder, alone=item.get_closest_marker("alone") is not None)


@contextmanager
def _locked(folder: Path, *, alone: bool) -> Iterator[None]:
    import fcntl  # noqa: PLC0415 - Windows has none, and `make` is not for it

    with (folder / "queue.lock").open("wb") as queue, (folder / "machine.lock").open("wb") as machine:
        # Who waits to be alone is not overtaken.
        fcntl.flock(queue, fcntl.LOCK_EX)
        fcntl.flock(machine, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(queue, fcntl.LOCK_UN)
        yield
