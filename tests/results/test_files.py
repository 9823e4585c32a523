"""SQLite files of an earlier or newer version, damaged ones, and paths that cannot be opened."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from results import (
    Outbox,
    ResultsMisconfigured,
    SqliteResults,
    StoredResult,
    Task,
    open_outbox,
    salvage_attempts,
)

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.anyio

DUMPS = Path(__file__).parent / "files"
"""Of files of version 1, by server 0.1.0: seven tasks, in every state; and of version 2: two tasks."""


def load(path: Path, dump: str) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.executescript((DUMPS / dump).read_text())


def version(path: Path) -> int:
    with closing(sqlite3.connect(path)) as db:
        [[number]] = db.execute("PRAGMA user_version").fetchall()
        return int(number)


def outbox_of(folder: Path) -> Outbox:
    return open_outbox(
        folder / "outbox.sqlite",
        SqliteResults(folder / "results.sqlite", 120),
        owner="test",
        is_alive=lambda _: False,
        server_version="1",
        lease_s=120,
        outage_limit_s=900,
    )


def old_task(number: int) -> Task:
    return Task(
        f"{number:08d}-0000-4000-8000-000000000000",
        "user-1",
        f"uploads/user-1/{number}",
        ("cat", "black dog"),
    )


async def test_files_of_version_1(tmp_path: Path) -> None:
    """The tasks of version 1 are delivered or retried, each once."""
    load(tmp_path / "outbox.sqlite", "outbox-1.sql")
    load(tmp_path / "results.sqlite", "results-1.sql")
    outbox = outbox_of(tmp_path)
    assert await outbox.reset_after_restart() == (2, 3)
    await outbox.deliver_due()
    begun = []
    while (attempt := await outbox.acquire_waiting()) is not None:
        assert await outbox.claim(attempt) is None
        await outbox.update_result(attempt, "file:///new", ["cat"], {}, [])
        begun.append(attempt.task)
    assert sorted(begun, key=lambda task: task.task_id) == [old_task(2), old_task(6), old_task(7)]
    await outbox.close()
    rows = SqliteResults(tmp_path / "results.sqlite", 120)
    found = {number: await rows.get(old_task(number).task_id) for number in range(1, 8)}
    assert {number: row.status for number, row in found.items() if row} == {
        **dict.fromkeys((1, 2, 4, 6, 7), "done"),
        **dict.fromkeys((3, 5), "error"),
    }
    assert await rows.claim(old_task(1), "again") == StoredResult(
        old_task(1).task_id, "file:///mask", ["cat"], {"confidence": 0.5}
    )
    assert {number: row.mask_url for number, row in found.items() if row and number in {1, 4}} == {
        1: "file:///mask",
        4: "file:///mask4",
    }
    await rows.close()


async def test_attempts_of_version_2(tmp_path: Path) -> None:
    """A suspect that waits, and a task that was in work when its server died, are retried as suspects."""
    load(tmp_path / "outbox.sqlite", "outbox-2.sql")
    outbox = outbox_of(tmp_path)
    assert await outbox.reset_after_restart() == (0, 2)
    await outbox.begin_other_work("direct")
    await outbox.end_other_work("direct")
    for _ in range(2):
        attempt = await outbox.acquire_waiting()
        assert attempt is not None
        assert attempt.suspect
        assert await outbox.claim(attempt) is None
        assert await outbox.begin_work(attempt, "sha")
        await outbox.update_result(attempt, "file:///new", ["cat"], {}, [])
    await outbox.close()


async def test_unreadable_attempts_of_version_1(tmp_path: Path) -> None:
    """An attempt of version 1 that is not readable does not affect the start or other attempts."""
    load(tmp_path / "outbox.sqlite", "outbox-1.sql")
    with closing(sqlite3.connect(tmp_path / "outbox.sqlite")) as db, db:
        for number, text in enumerate(("no JSON", "{}", '{"task_id": 1, "user_id": "x"}')):
            db.execute("INSERT INTO attempts VALUES (?, ?, NULL, 1, 0, 0)", (f"bad {number}", text))
    outbox = outbox_of(tmp_path)
    assert await outbox.reset_after_restart() == (2, 3)
    await outbox.close()
    with closing(sqlite3.connect(tmp_path / "outbox.sqlite")) as db:
        assert db.execute("SELECT count(*) FROM set_aside").fetchall() == [(3,)]


OPENERS: dict[str, Callable[[Path], object]] = {
    "outbox.sqlite": outbox_of,
    "results.sqlite": lambda folder: SqliteResults(folder / "results.sqlite", 120),
}


@pytest.mark.parametrize("name", OPENERS)
async def test_file_of_a_newer_version_is_refused(tmp_path: Path, name: str) -> None:
    """The error names a file of a newer server, which stays unchanged."""
    outbox = outbox_of(tmp_path)
    await outbox.close()
    with closing(sqlite3.connect(tmp_path / name)) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(ResultsMisconfigured, match=r"newer version of this server.*DATA_DIR") as raised:
        OPENERS[name](tmp_path)
    assert str(tmp_path / name) in str(raised.value)
    assert version(tmp_path / name) == 99


@pytest.mark.parametrize("name", OPENERS)
def test_file_in_place_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    """The error names a folder that cannot be created, and its variable."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ResultsMisconfigured, match="cannot be opened for writing") as raised:
        OPENERS[name](tmp_path / "file")
    assert str(tmp_path / "file") in str(raised.value)
    assert "DATA_DIR" in str(raised.value)


@pytest.mark.parametrize("name", OPENERS)
def test_folder_in_place_of_the_file_is_refused(tmp_path: Path, name: str) -> None:
    """The error names a file that cannot be opened."""
    (tmp_path / name).mkdir()
    with pytest.raises(ResultsMisconfigured, match="cannot be opened for writing") as raised:
        OPENERS[name](tmp_path)
    assert str(tmp_path / name) in str(raised.value)


@pytest.mark.parametrize("name", OPENERS)
def test_file_that_is_no_database_is_refused(tmp_path: Path, name: str) -> None:
    """The error names a file that is no database."""
    (tmp_path / name).write_bytes(b"no database" * 100)
    with pytest.raises(ResultsMisconfigured, match="is damaged") as raised:
        OPENERS[name](tmp_path)
    assert str(tmp_path / name) in str(raised.value)


async def filled_outbox(folder: Path, tasks: int) -> Path:
    """The outbox of a dead process that worked on this number of tasks."""
    outbox = outbox_of(folder)
    for number in range(tasks):
        await outbox.record(old_task(number), "request")
    await outbox.close()
    path = folder / "outbox.sqlite"
    with closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE attempts SET owner = 'gone'")
        db.commit()
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return path


def test_intact_file_is_unchanged(tmp_path: Path) -> None:
    """Salvage does not change an intact file, or create a missing one."""
    salvage_attempts(tmp_path / "outbox.sqlite")
    assert not list(tmp_path.iterdir())
    path = asyncio.run(filled_outbox(tmp_path, 3))
    before = path.read_bytes()
    salvage_attempts(path)
    assert path.read_bytes() == before


def set_aside(folder: Path) -> Path:
    [aside] = [path for path in folder.glob("outbox.sqlite.damaged-*") if path.suffix != "-wal"]
    return aside


@pytest.mark.parametrize("damage", ["a page of the table", "all", "the second half is missing"])
async def test_damaged_outbox_is_set_aside(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The readable tasks of a damaged file are retried; the file is set aside, and the log names it."""
    path = await filled_outbox(tmp_path, 200)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2 // 4096 * 4096
    if damage == "all":
        content = bytearray(b"no database" * 100)
    elif damage == "a page of the table":
        content[middle : middle + 4096] = b"\xff" * 4096
    else:
        del content[middle:]
    path.write_bytes(content)
    salvage_attempts(path)
    outbox = outbox_of(tmp_path)
    undelivered, waiting = await outbox.reset_after_restart()
    assert undelivered == 0
    assert (waiting == 0) if damage == "all" else (20 < waiting < 200)
    assert f"{waiting} tasks were read from it" in caplog.text
    aside = set_aside(tmp_path)
    assert aside.read_bytes() == content
    assert aside.name in caplog.text
    if waiting:
        attempt = await outbox.acquire_waiting()
        assert attempt is not None
        assert await outbox.claim(attempt) is None
    await outbox.close()
