"""One SQLite file for several processes, with many readers and one writer, used off the event loop."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, TypeVar

from results.errors import ResultsMisconfigured, ResultsUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_BUSY_TIMEOUT_S: Final = 5.0
_DAMAGED: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})


class SqliteFile:
    """The SQLite file `path`, created with its folder when it is missing.

    Args:
        path: below DATA_DIR.
        migrations: the statements of each version of the file; `PRAGMA user_version` counts those that were
            applied, and the missing ones are applied when the file is opened.

    Autocommit; `transaction` groups statements. Raises ResultsMisconfigured, which names the path and the
    remedy, when the file cannot be opened, is damaged, or was written by a newer version of this server.
    """

    def __init__(self, path: Path, migrations: Sequence[Sequence[str]]) -> None:
        self._path = path
        with _open_errors(path):
            self.db: Final = _open(path, migrations)
        # SQLite allows one writer at a time; one thread keeps the wait for it off the event loop.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sqlite")

    async def run(self, work: Callable[[], _T]) -> _T:
        """The result of `work`, called on the file's own thread. SQLite's errors raise ResultsUnavailable."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except (sqlite3.Error, OSError) as error:
            # Only the log may hold the path: the error's text reaches callers.
            logger.error("%s failed: %s", self._path, error)  # noqa: TRY400 - a traceback adds nothing
            raise ResultsUnavailable(
                f"this server's file of tasks cannot be used ({type(error).__name__}); try again later"
            ) from error

    async def execute(self, statement: str, values: Mapping[str, object]) -> list[tuple[Any, ...]]:
        """All rows that one statement returns, on the file's own thread. Raises ResultsUnavailable."""
        # An UPDATE with RETURNING is committed when its last row is read.
        return await self.run(lambda: self.db.execute(statement, values).fetchall())

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit all statements of the block, or none."""
        with _transaction(self.db):
            yield

    async def close(self) -> None:
        """Finish running work and close the file; closing twice is harmless."""
        await asyncio.to_thread(self._thread.shutdown)
        self.db.close()


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    # IMMEDIATE: a transaction that begins with a read can fail at its first write, despite the busy timeout.
    db.execute("BEGIN IMMEDIATE")
    with db:
        yield


def _open(path: Path, migrations: Sequence[Sequence[str]]) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Autocommit: transactions are explicit. The thread that uses the connection is not the one that opens it.
    db = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    try:
        _set_wal(db)
        # No fsync per commit: kill -9 loses nothing, a power failure may undo the last commits. The file
        # stays consistent, and such a task is claimed again once its lease has expired.
        db.execute("PRAGMA synchronous = NORMAL")
        _migrate(db, path, migrations)
    except BaseException:  # the connection is closed whatever stops the start
        db.close()
        raise
    return db


def _migrate(db: sqlite3.Connection, path: Path, migrations: Sequence[Sequence[str]]) -> None:
    # The transaction serialises processes that start together: each reads the version inside it.
    with _transaction(db):
        [[version]] = db.execute("PRAGMA user_version").fetchall()
        if version > len(migrations):
            raise ResultsMisconfigured(
                f"{path} was written by a newer version of this server (file version {version}, this server "
                f"knows {len(migrations)}): start that version, or name another DATA_DIR"
            )
        for migration in migrations[version:]:
            for statement in migration:
                db.execute(statement)
        db.execute(f"PRAGMA user_version = {len(migrations)}")


def _set_wal(db: sqlite3.Connection) -> None:
    """Let readers and the writer work at the same time; the file keeps this mode."""
    deadline_s = time.monotonic() + _BUSY_TIMEOUT_S
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            # When processes start together, SQLite refuses all but one at once and ignores the busy timeout.
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline_s:
                raise
            time.sleep(0.01)
        else:
            return


@contextmanager
def _open_errors(path: Path) -> Iterator[None]:
    """Raise ResultsMisconfigured, a sentence for the operator, for an error that stops the opening."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode & 0xFF in _DAMAGED:
            raise ResultsMisconfigured(
                f"{path} is damaged ({error}): put a copy of it back, or move it away to begin an empty one"
            ) from error
        raise _not_writable(path, error) from error
    except OSError as error:
        raise _not_writable(path, error) from error


def _not_writable(path: Path, error: Exception) -> ResultsMisconfigured:
    return ResultsMisconfigured(
        f"{path} cannot be opened for writing ({error}): let this server's user write to the folder that "
        "DATA_DIR names, free some space if its disk is full, or name another folder"
    )
