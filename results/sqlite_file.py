"""One SQLite file for several processes: opened for many readers and one writer, used off the event loop."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, TypeVar

from results.errors import ResultsUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_T = TypeVar("_T")

_BUSY_TIMEOUT_S: Final = 5.0


class SqliteFile:
    """The SQLite file `path`, made with its folder and `schema` when it is missing.

    Autocommit; `transaction` groups statements. Raises ResultsUnavailable when it cannot be opened.
    """

    def __init__(self, path: Path, schema: str) -> None:
        with _sqlite_errors():
            self.db: Final = _opened(path, schema)
        # SQLite has one writer at a time anyway; one thread keeps waiting for it off the event loop.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sqlite")

    async def run(self, work: Callable[[], _T]) -> _T:
        """What `work` gives, on the file's own thread. Raises ResultsUnavailable for what SQLite raises."""
        with _sqlite_errors():
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of the block's statements or none."""
        # IMMEDIATE: a reader that turns writer in the middle could fail at once, whatever the busy timeout.
        self.db.execute("BEGIN IMMEDIATE")
        with self.db:
            yield

    async def close(self) -> None:
        """Finish what was begun; closing twice is harmless."""
        await asyncio.to_thread(self._thread.shutdown)
        self.db.close()


def _opened(path: Path, schema: str) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Autocommit: transactions begin where we say. The store's one thread is not the one that opens.
    db = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    try:
        _set_wal(db)
        # No fsync per commit: kill -9 loses nothing, but power loss may take the last transitions back.
        # The file stays whole, and such a task is claimed again once its lease has run out.
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute(schema)
    except BaseException:  # whatever stops the start, the file is let go
        db.close()
        raise
    return db


def _set_wal(db: sqlite3.Connection) -> None:
    """Readers and the writer don't wait for each other; the file remembers it."""
    deadline = time.monotonic() + _BUSY_TIMEOUT_S
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            # When processes start together SQLite refuses all but one at once, without its busy timeout.
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


@contextmanager
def _sqlite_errors() -> Iterator[None]:
    """The only place where a failure of SQLite or of its folder becomes one of ours."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise ResultsUnavailable(f"the file of tasks failed: {type(error).__name__}") from error
