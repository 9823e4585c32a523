"""What the outbox keeps while the rows are away or the server is dead, and that it doubles nothing."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
from prometheus_client import REGISTRY

from results import (
    AttemptLost,
    Claim,
    MetadataInvalid,
    Outbox,
    ResultsUnavailable,
    SqliteResults,
    StoredResult,
    Task,
    TaskInProgress,
    TaskNotFound,
)
from results.attempts import MAX_PAUSE_S
from results.outbox import MAX_STARTS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from results import Row
    from results.attempts import Attempt

pytestmark = pytest.mark.anyio

LEASE_S = 120.0
METADATA: dict[str, object] = {"confidence": 0.93}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class Machine:
    """A folder with a results file and an outbox, a clock for the outbox, and servers one after another."""

    folder: Path
    now_s: float = 1e9
    opened: list[Outbox] = field(default_factory=list)

    def server(self) -> Outbox:
        """An outbox as one more process opens it. Its rows keep the real time."""
        rows = SqliteResults(self.folder / "results.db", LEASE_S)
        outbox = Outbox(self.folder / "outbox.db", rows, lease_s=LEASE_S, now=lambda: self.now_s)
        self.opened.append(outbox)
        return outbox

    async def stop(self, outbox: Outbox) -> None:
        self.opened.remove(outbox)
        await outbox.drain(8)
        await outbox.close()

    def take_rows_away(self) -> None:
        self._execute("ALTER TABLE segmentation_results RENAME TO away")

    def bring_rows_back(self) -> None:
        # An outbox that was opened meanwhile has made a new, empty table.
        self._execute("DROP TABLE IF EXISTS segmentation_results")
        self._execute("ALTER TABLE away RENAME TO segmentation_results")

    def refuse_row(self, task_id: str) -> None:
        self._execute(
            f"""CREATE TRIGGER refuse BEFORE UPDATE ON segmentation_results WHEN old.id = '{task_id}'
            BEGIN SELECT RAISE(ABORT, 'refused'); END"""
        )

    async def row(self, task_id: str) -> Row:
        rows = SqliteResults(self.folder / "results.db", LEASE_S)
        row = await rows.get(task_id)
        await rows.close()
        assert row is not None
        return row

    def on_disk(self) -> int:
        """How many attempts the outbox has noted."""
        with closing(sqlite3.connect(self.folder / "outbox.db")) as db:
            count: int = db.execute("SELECT count(*) FROM attempts").fetchone()[0]
            return count

    def _execute(self, statement: str) -> None:
        with closing(sqlite3.connect(self.folder / "results.db")) as db:
            db.execute(statement)


@pytest.fixture
async def machine(tmp_path: Path) -> AsyncIterator[Machine]:
    machine = Machine(tmp_path)
    yield machine
    for outbox in machine.opened:
        await outbox.close()


def new_task() -> Task:
    return Task(str(uuid4()), "user-1", "uploads/user-1/cat", ("cat", "black dog"))


async def claimed(outbox: Outbox, task: Task) -> Claim:
    claim = await outbox.claim(task)
    assert isinstance(claim, Claim)
    return claim


async def finish(outbox: Outbox, claim: Claim, mask_url: str = "mask") -> None:
    await outbox.update_result(claim.task_id, mask_url, ["cat"], METADATA, attempt_id=claim.attempt_id)


async def taken(outbox: Outbox) -> Attempt:
    attempt = await outbox.take_unfinished()
    assert attempt is not None
    return attempt


async def test_settled_task_leaves_nothing_on_disk(machine: Machine) -> None:
    """A task that went well is in its row, and in the outbox no more."""
    outbox = machine.server()
    done, failed = await claimed(outbox, new_task()), await claimed(outbox, new_task())
    assert machine.on_disk() == 2
    await finish(outbox, done)
    await outbox.update_status(failed.task_id, "error", attempt_id=failed.attempt_id, error_message="no")
    assert (await machine.row(done.task_id)).status == "done"
    assert (await machine.row(failed.task_id)).metadata["error_message"] == "no"
    assert machine.on_disk() == 0


@pytest.mark.parametrize("status", ["done", "error", "pending"])
async def test_outcome_is_told_when_the_rows_are_back(machine: Machine, status: str) -> None:
    """An outcome that the rows could not take is no error, and reaches the row once they are back."""
    outbox = machine.server()
    claim = await claimed(outbox, new_task())
    machine.take_rows_away()
    if status == "done":
        await finish(outbox, claim)
    else:
        await outbox.update_status(
            claim.task_id,
            "error" if status == "error" else "pending",
            attempt_id=claim.attempt_id,
            error_message="corrupt" if status == "error" else None,
        )
    machine.bring_rows_back()
    assert (await machine.row(claim.task_id)).status == "processing"
    machine.now_s += 2
    await outbox.deliver_due()
    row = await machine.row(claim.task_id)
    told: dict[str, dict[str, object]] = {
        "done": METADATA,
        "error": {"error_message": "corrupt"},
        "pending": {},
    }
    assert (row.status, row.mask_url) == (status, "mask" if status == "done" else None)
    assert row.metadata == {**told[status], "attempt": claim.attempt_id}
    assert machine.on_disk() == 0


async def test_outcome_waits_longer_each_time(machine: Machine) -> None:
    """While the rows stay away, an outcome is tried with growing pauses, and never given up."""
    outbox = machine.server()
    claim = await claimed(outbox, new_task())
    machine.take_rows_away()
    await finish(outbox, claim)
    for _ in range(20):
        machine.now_s += MAX_PAUSE_S * 1.3
        await outbox.deliver_due()
    machine.bring_rows_back()
    machine.now_s += 2  # the first pause is long over, the latest is not
    await outbox.deliver_due()
    assert (await machine.row(claim.task_id)).status == "processing"
    machine.now_s += MAX_PAUSE_S * 1.3
    await outbox.deliver_due()
    assert (await machine.row(claim.task_id)).status == "done"


KILLED = """
import asyncio, os, signal, sqlite3, sys
from pathlib import Path
from results import Outbox, SqliteResults, Task

async def main():
    folder, task_id, moment = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    outbox = Outbox(folder / "outbox.db", SqliteResults(folder / "results.db", 120), lease_s=120)
    claim = await outbox.claim(Task(task_id, "user-1", "uploads/user-1/cat", ("cat", "black dog")))
    if moment == "after the work":
        db = sqlite3.connect(folder / "results.db")
        db.execute("ALTER TABLE segmentation_results RENAME TO away")
        await outbox.update_result(task_id, "mask", ["cat"], {}, attempt_id=claim.attempt_id)
    print(claim.attempt_id, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def killed_server(folder: Path, task_id: str, moment: str) -> str:
    """A process that ends by kill -9; its attempt id."""
    command = [sys.executable, "-c", KILLED, str(folder), task_id, moment]
    ended = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    assert ended.returncode == -9
    return ended.stdout.strip()


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
async def test_kill_in_the_work_is_begun_again(machine: Machine) -> None:
    """What a killed server had claimed is begun again after the next start, under the same attempt id."""
    task = new_task()
    attempt_id = killed_server(machine.folder, task.task_id, "in the work")
    outbox = machine.server()
    assert await outbox.release() == (0, 1)
    attempt = await taken(outbox)
    assert (attempt.task, attempt.attempt_id) == (task, attempt_id)
    claim = await outbox.claim_again(attempt)
    assert claim == Claim(task.task_id, attempt_id)
    await finish(outbox, claim)
    assert (await machine.row(task.task_id)).status == "done"
    assert machine.on_disk() == 0


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
async def test_kill_before_the_row_is_told(machine: Machine) -> None:
    """An outcome that a killed server could not tell is told after the next start, without new work."""
    task = new_task()
    killed_server(machine.folder, task.task_id, "after the work")
    machine.bring_rows_back()
    outbox = machine.server()
    assert await outbox.release() == (1, 0)
    await outbox.deliver_due()
    row = await machine.row(task.task_id)
    assert (row.status, row.mask_url, row.labels) == ("done", "mask", ["cat"])


async def test_attempt_at_work_is_left_alone(machine: Machine) -> None:
    """Another process begins an attempt again only when its lease is over."""
    first, second = machine.server(), machine.server()
    await claimed(first, new_task())
    assert await second.take_unfinished() is None
    machine.now_s += LEASE_S + 1
    await taken(second)
    assert await first.take_unfinished() is None


async def test_task_is_kept_when_the_rows_are_away(machine: Machine) -> None:
    """A task that could not be claimed is told to the caller as such, and is begun later all the same."""
    outbox, task = machine.server(), new_task()
    machine.take_rows_away()
    with pytest.raises(ResultsUnavailable, match="kept"):
        await outbox.claim(task)
    for _ in range(MAX_STARTS + 3):  # an absent database does not count as a start
        machine.now_s += MAX_PAUSE_S * 1.3
        with pytest.raises(ResultsUnavailable):
            await outbox.claim_again(await taken(outbox))
    machine.bring_rows_back()
    machine.now_s += MAX_PAUSE_S * 1.3
    attempt = await taken(outbox)
    assert attempt.task == task
    assert isinstance(await outbox.claim_again(attempt), Claim)


async def test_refused_claim_is_not_kept(machine: Machine) -> None:
    """A task that is another's, or in work elsewhere, is nothing to come back to."""
    outbox, task = machine.server(), new_task()
    await claimed(outbox, task)
    for refused, error in (
        (task, TaskInProgress),
        (Task(task.task_id, "user-2", "uploads/user-2/cat", ("cat",)), TaskNotFound),
    ):
        with pytest.raises(error):
            await outbox.claim(refused)
    assert machine.on_disk() == 1


async def test_replay_is_not_kept(machine: Machine) -> None:
    """A claim of a done task gives its result and leaves nothing on disk."""
    outbox, task = machine.server(), new_task()
    await finish(outbox, await claimed(outbox, task))
    assert await outbox.claim(task) == StoredResult(task.task_id, "mask", ["cat"], METADATA)
    assert machine.on_disk() == 0


async def test_task_that_kills_the_server_is_given_up(machine: Machine) -> None:
    """A task that was begun five times and never ended is ended as an error that says so."""
    task = new_task()
    await claimed(machine.server(), task)
    for _ in range(MAX_STARTS - 1):
        server = machine.server()
        await server.release()
        await server.claim_again(await taken(server))
    server = machine.server()
    await server.release()
    assert await server.take_unfinished() is None
    await server.deliver_due()
    row = await machine.row(task.task_id)
    assert row.status == "error"
    assert row.metadata["error_message"] == "the server stopped 5 times while it worked on this task"
    assert machine.on_disk() == 0


async def test_taken_over_outcome_is_dropped(machine: Machine) -> None:
    """An outcome that comes after another attempt's leaves that one's row as it is."""
    outbox, task = machine.server(), new_task()
    claim = await claimed(outbox, task)
    machine.take_rows_away()
    await finish(outbox, claim, "late mask")
    machine.bring_rows_back()
    elsewhere = SqliteResults(machine.folder / "results.db", lease_s=0)
    await elsewhere.claim(task, "elsewhere")
    await elsewhere.update_result(task.task_id, "mask", [], {}, attempt_id="elsewhere")
    await elsewhere.close()
    machine.now_s += 2
    await outbox.deliver_due()
    assert (await machine.row(task.task_id)).mask_url == "mask"
    assert machine.on_disk() == 0


async def test_lost_attempt_is_told_to_its_caller(machine: Machine) -> None:
    """A finish that comes after another attempt's raises, and leaves nothing on disk."""
    outbox, task = machine.server(), new_task()
    claim = await claimed(outbox, task)
    elsewhere = SqliteResults(machine.folder / "results.db", lease_s=0)
    await elsewhere.claim(task, "elsewhere")
    await elsewhere.close()
    with pytest.raises(AttemptLost):
        await finish(outbox, claim)
    assert machine.on_disk() == 0


async def test_refused_outcome_does_not_hold_up_others(machine: Machine) -> None:
    """One row that takes no update keeps its own outcome waiting, and nobody else's."""
    outbox = machine.server()
    claims = [await claimed(outbox, new_task()) for _ in range(4)]
    machine.take_rows_away()
    for claim in claims:
        await finish(outbox, claim)
    machine.bring_rows_back()
    machine.refuse_row(claims[0].task_id)
    machine.now_s += 2
    await outbox.deliver_due()
    assert [(await machine.row(claim.task_id)).status for claim in claims] == ["processing"] + ["done"] * 3
    assert machine.on_disk() == 1


async def test_unfinished_attempts_are_shared_out(machine: Machine) -> None:
    """Of 30 attempts left behind, processes that look at the same time take each exactly once."""
    first = machine.server()
    tasks = [new_task() for _ in range(30)]
    for task in tasks:
        await claimed(first, task)
    servers = [machine.server() for _ in range(4)]
    await servers[0].release()

    async def take_all(outbox: Outbox) -> list[str]:
        found = []
        while (attempt := await outbox.take_unfinished()) is not None:
            found.append(attempt.task.task_id)
        return found

    found = [task_id for each in await asyncio.gather(*map(take_all, servers)) for task_id in each]
    assert Counter(found) == Counter(task.task_id for task in tasks)


async def test_stop_tells_what_it_can(machine: Machine) -> None:
    """A stop tells every outcome that the rows take, due or not."""
    outbox = machine.server()
    claims = [await claimed(outbox, new_task()) for _ in range(30)]
    machine.take_rows_away()
    for claim in claims:
        await finish(outbox, claim)
    machine.bring_rows_back()
    await machine.stop(outbox)
    assert {(await machine.row(claim.task_id)).status for claim in claims} == {"done"}
    assert machine.on_disk() == 0


async def test_stop_with_the_rows_away_keeps_the_outcome(machine: Machine) -> None:
    """A stop while the rows are away ends soon, and the next start tells them."""
    outbox = machine.server()
    claim = await claimed(outbox, new_task())
    machine.take_rows_away()
    await finish(outbox, claim)
    await machine.stop(outbox)
    machine.bring_rows_back()
    successor = machine.server()
    assert await successor.release() == (1, 0)
    await successor.deliver_due()
    assert (await machine.row(claim.task_id)).status == "done"


async def test_depth_is_a_metric(machine: Machine) -> None:
    """sam3_outbox_depth tells how many outcomes wait."""
    outbox = machine.server()
    claims = [await claimed(outbox, new_task()) for _ in range(3)]
    machine.take_rows_away()
    for claim in claims:
        await finish(outbox, claim)
    await outbox.deliver_due()
    assert REGISTRY.get_sample_value("sam3_outbox_depth") == 3
    machine.bring_rows_back()
    machine.now_s += MAX_PAUSE_S
    await outbox.deliver_due()
    assert REGISTRY.get_sample_value("sam3_outbox_depth") == 0


async def test_metadata_that_is_no_json_is_refused(machine: Machine) -> None:
    """NaN is refused before anything is written, and the attempt may still end as an error."""
    outbox = machine.server()
    claim = await claimed(outbox, new_task())
    with pytest.raises(MetadataInvalid):
        await outbox.update_result(
            claim.task_id, "mask", [], {"score": float("nan")}, attempt_id=claim.attempt_id
        )
    await outbox.update_status(claim.task_id, "error", attempt_id=claim.attempt_id)
    assert (await machine.row(claim.task_id)).status == "error"


async def test_row_is_told_without_the_file(machine: Machine) -> None:
    """When the outbox's own file fails in the middle of the work, the row ends all the same."""
    outbox = machine.server()
    claim = await claimed(outbox, new_task())
    with closing(sqlite3.connect(machine.folder / "outbox.db")) as db:
        db.execute("ALTER TABLE attempts RENAME TO lost")
    await finish(outbox, claim)
    assert (await machine.row(claim.task_id)).status == "done"
    with closing(sqlite3.connect(machine.folder / "outbox.db")) as db:
        db.execute("ALTER TABLE lost RENAME TO attempts")
