"""Salvage of a damaged file of attempts: it is set aside, and its readable rows are copied to a new file."""

from __future__ import annotations

import logging
import shutil
import sqlite3
import time
from contextlib import closing, suppress
from os import SEEK_END
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

_MAX_PADDED_BYTES: Final = 1 << 30
_TABLES: Final = ("attempts", "given_up", "unneeded_masks", "set_aside", "other_work")


def salvage_attempts(path: Path) -> None:
    """Replace a damaged file; call it while no other process has the file open. An intact one stays as it is.

    Any other fault of the file or its folder is left to the next opening, which reports it.
    """
    if not path.exists() or (damage := _damage(path)) is None:
        return
    aside = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%dT%H%M%S')}")
    with TemporaryDirectory(dir=path.parent) as folder:
        new = Path(folder) / path.name
        saved = _copy(_padded_copy(path, Path(folder)), new)
        # Only now: if this process dies earlier, the next one finds the damaged file unchanged.
        for suffix in ("", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                path.with_name(path.name + suffix).rename(f"{aside}{suffix}")
        new.rename(path)
    logger.error(
        "%s is damaged (%s): it is set aside as %s, and %d tasks were read from it. A task that could not be "
        "read ends as error when its lease has expired; send it again",
        *(path, damage, aside.name, saved),
    )


def _damage(path: Path) -> str | None:
    """The damage to the file's content; None when it is intact, or cannot be opened at all."""
    try:
        with closing(sqlite3.connect(path)) as db:
            [[found]] = db.execute("PRAGMA quick_check(1)").fetchall()
            return None if found == "ok" else str(found)
    except sqlite3.OperationalError:
        return None
    except sqlite3.DatabaseError as error:
        return str(error)


def _padded_copy(damaged: Path, folder: Path) -> Path:
    """A copy of the file, padded to the size in its header: SQLite reads nothing of a shorter file."""
    copy = folder / "damaged.sqlite"
    shutil.copy(damaged, copy)
    with suppress(FileNotFoundError):
        # It holds the last writes; SQLite verifies its checksums.
        shutil.copy(f"{damaged}-wal", f"{copy}-wal")
    with copy.open("r+b") as file:
        header = file.read(32)
        if len(header) == 32:
            page_bytes, pages = int.from_bytes(header[16:18]), int.from_bytes(header[28:32])
            full_bytes = min(page_bytes * pages, _MAX_PADDED_BYTES)
            file.truncate(max(full_bytes, file.seek(0, SEEK_END)))
    return copy


def _copy(damaged: Path, path: Path) -> int:
    """Copy all readable tables and rows; returns the number of attempts copied."""
    saved = 0
    with closing(sqlite3.connect(path)) as new, closing(sqlite3.connect(damaged)) as old, new:
        for table in _TABLES:
            with suppress(sqlite3.DatabaseError):
                [[schema]] = old.execute("SELECT sql FROM sqlite_schema WHERE name = ?", (table,)).fetchall()
                new.execute(schema)
                for row in _readable_rows(old, table):
                    values = ", ".join("?" * len(row))
                    with suppress(sqlite3.DatabaseError):  # a row that violates its table's constraints
                        new.execute(f"INSERT INTO {table} VALUES ({values})", row)
                        saved += table == "attempts"
        with suppress(sqlite3.DatabaseError):
            for (index,) in old.execute(
                "SELECT sql FROM sqlite_schema WHERE type = 'index' AND sql IS NOT NULL"
            ).fetchall():
                new.execute(index)
            [[version]] = old.execute("PRAGMA user_version").fetchall()
            new.execute(f"PRAGMA user_version = {version}")
    return saved


def _readable_rows(old: sqlite3.Connection, table: str) -> Iterator[tuple[Any, ...]]:
    """The rows, read in both orders: the second one reaches the rows behind a damaged page."""
    seen = set()
    for order in ("ASC", "DESC"):
        cursor = old.execute(f"SELECT rowid, * FROM {table} ORDER BY rowid {order}")
        with suppress(sqlite3.DatabaseError):
            for rowid, *row in cursor:
                if rowid in seen:
                    break
                seen.add(rowid)
                yield tuple(row)
