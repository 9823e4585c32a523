"""Which tests may run beside others, when several workers share them out."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    import pytest


def by_turns(items: list[pytest.Item]) -> list[pytest.Item]:
    """The order in which workers get the tests: long files first, and what runs alone last.

    A worker that has nothing left to do while the other one is at a long file would lose the most time.
    """
    return sorted(
        items,
        key=lambda item: (
            item.get_closest_marker("alone") is not None,
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
