"""A server's host for the tests of the outbox, and the steps that these tests share."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal
from uuid import uuid4

from results import Attempt, Outbox, SqliteResults, Task, open_outbox
from results.given_up import MAX_EXCLUSIVE_DEATHS

if TYPE_CHECKING:
    from pathlib import Path

    from results import Row

LEASE_S = 120.0
OUTAGE_LIMIT_S = 900.0
METADATA: dict[str, object] = {"confidence": 0.93}


@dataclass
class Host:
    """One server's host: its files of rows and attempts, its clock, and the names of its processes."""

    folder: Path
    now_s: float = 1e6
    version: str = "1"
    alive: set[str] = field(default_factory=set)
    opened: list[Outbox] = field(default_factory=list)

    def process(self) -> Outbox:
        """The outbox of a new process. Only the outbox uses `now_s`; the rows use the real clock."""
        name = f"process {len(self.opened)}"
        self.alive.add(name)
        rows = SqliteResults(self.folder / "results.db", LEASE_S)
        outbox = open_outbox(
            self.folder / "outbox.db",
            rows,
            owner=name,
            is_alive=lambda owner: owner in self.alive,
            server_version=self.version,
            lease_s=LEASE_S,
            outage_limit_s=OUTAGE_LIMIT_S,
            now=lambda: self.now_s,
        )
        self.opened.append(outbox)
        return outbox

    async def restart(self) -> Outbox:
        """Kill all processes and start another one."""
        self.alive.clear()
        self.now_s += 10
        outbox = self.process()
        await outbox.reset_after_restart()
        return outbox

    async def stop(self, outbox: Outbox) -> None:
        self.opened.remove(outbox)
        await outbox.drain(8)
        await outbox.close()

    def make_rows_unavailable(self) -> None:
        self._execute("ALTER TABLE segmentation_results RENAME TO unavailable")

    def restore_rows(self) -> None:
        self._execute("ALTER TABLE unavailable RENAME TO segmentation_results")

    def reject_updates(self, task_id: str) -> None:
        self._execute(
            f"""CREATE TRIGGER refuse BEFORE UPDATE ON segmentation_results WHEN old.id = '{task_id}'
            BEGIN SELECT RAISE(ABORT, 'refused'); END"""
        )

    def delete_row(self, task_id: str) -> None:
        self._execute(f"DELETE FROM segmentation_results WHERE id = '{task_id}'")  # noqa: S608 - no outside input

    async def row(self, task_id: str) -> Row:
        rows = SqliteResults(self.folder / "results.db", LEASE_S)
        row = await rows.get(task_id)
        await rows.close()
        assert row is not None
        return row

    async def take_over(self, task: Task) -> SqliteResults:
        """Let another server claim the task, as after the end of its lease."""
        self._execute("UPDATE segmentation_results SET lease_until_s = 0")
        elsewhere = SqliteResults(self.folder / "results.db", LEASE_S)
        await elsewhere.claim(task, "elsewhere")
        return elsewhere

    def count_rows(self, table: str = "attempts") -> int:
        """The number of rows in a table of the outbox."""
        with closing(sqlite3.connect(self.folder / "outbox.db")) as db:
            count: int = db.execute(f"SELECT count(*) FROM {table}").fetchone()[0]  # noqa: S608 - no outside input
            return count

    def edit_file(self, statement: str) -> None:
        with closing(sqlite3.connect(self.folder / "outbox.db")) as db, db:
            db.execute(statement)

    def _execute(self, statement: str) -> None:
        with closing(sqlite3.connect(self.folder / "results.db")) as db, db:
            db.execute(statement)


def new_task() -> Task:
    return Task(str(uuid4()), "user-1", "uploads/user-1/cat", ("cat", "black dog"))


async def record_and_claim(outbox: Outbox, task: Task) -> Attempt:
    attempt = await outbox.record(task, "request-1")
    assert await outbox.claim(attempt) is None
    return attempt


async def finish(outbox: Outbox, attempt: Attempt, mask_url: str = "mask") -> None:
    await outbox.update_result(attempt, mask_url, ["cat"], METADATA, [mask_url])


async def acquired(outbox: Outbox) -> Attempt:
    attempt = await outbox.acquire_waiting()
    assert attempt is not None
    return attempt


async def requeue_for_r2(outbox: Outbox, attempt: Attempt) -> bool:
    return await outbox.requeue(attempt, "the object store does not answer", with_backoff=True)


Death = Literal["runner", "server"]


async def die_during_work(host: Host, outbox: Outbox, attempts: list[Attempt], death: Death) -> Outbox:
    """Let the model's process, or the whole server, die while all of `attempts` are at work."""
    for attempt in attempts:
        await outbox.begin_work(attempt, "sha" if attempt.suspect else None)
    if death == "server":
        return await host.restart()
    for attempt in attempts:
        await outbox.requeue_after_death(attempt)
    return outbox


async def give_up(host: Host, task: Task) -> Outbox:
    """Let a task die until it is given up."""
    outbox = host.process()
    outbox = await die_during_work(host, outbox, [await record_and_claim(outbox, task)], "runner")
    for _ in range(MAX_EXCLUSIVE_DEATHS):
        outbox = await die_during_work(host, outbox, [await acquired(outbox)], "runner")
    await outbox.deliver_due()
    return outbox
