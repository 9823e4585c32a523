"""What the outbox keeps while the rows are away or a process is dead, and that it doubles nothing."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal
from uuid import uuid4

import pytest
from prometheus_client import REGISTRY

from results import (
    Attempt,
    AttemptLost,
    MetadataInvalid,
    Outbox,
    ResultsUnavailable,
    SqliteResults,
    StoredResult,
    Task,
    TaskInProgress,
    TaskNotFound,
    open_outbox,
)
from results.attempt_file import DELETE_AFTER_S, MAX_DEATHS_ALONE, MAX_PAUSE_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from results import Row

pytestmark = pytest.mark.anyio

LEASE_S = 120.0
OUTAGE_LIMIT_S = 900.0
METADATA: dict[str, object] = {"confidence": 0.93}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class Machine:
    """A folder with a results file and an outbox, a clock, and the processes of a server."""

    folder: Path
    now_s: float = 1e6
    version: str = "1"
    alive: set[str] = field(default_factory=set)
    opened: list[Outbox] = field(default_factory=list)

    def process(self) -> Outbox:
        """An outbox as one more process opens it. Its rows keep the real time."""
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
        """All processes are killed, and another begins."""
        self.alive.clear()
        self.now_s += 10
        outbox = self.process()
        await outbox.start_over()
        return outbox

    async def stop(self, outbox: Outbox) -> None:
        self.opened.remove(outbox)
        await outbox.drain(8)
        await outbox.close()

    def take_rows_away(self) -> None:
        self._execute("ALTER TABLE segmentation_results RENAME TO away")

    def bring_rows_back(self) -> None:
        self._execute("ALTER TABLE away RENAME TO segmentation_results")

    def refuse_row(self, task_id: str) -> None:
        self._execute(
            f"""CREATE TRIGGER refuse BEFORE UPDATE ON segmentation_results WHEN old.id = '{task_id}'
            BEGIN SELECT RAISE(ABORT, 'refused'); END"""
        )

    def delete_row(self, task_id: str) -> None:
        self._execute(f"DELETE FROM segmentation_results WHERE id = '{task_id}'")  # noqa: S608 - ours

    async def row(self, task_id: str) -> Row:
        rows = SqliteResults(self.folder / "results.db", LEASE_S)
        row = await rows.get(task_id)
        await rows.close()
        assert row is not None
        return row

    async def take_over(self, task: Task) -> SqliteResults:
        """Another server claims the task as if its lease were over."""
        self._execute("UPDATE segmentation_results SET lease_until_s = 0")
        elsewhere = SqliteResults(self.folder / "results.db", LEASE_S)
        await elsewhere.claim(task, "elsewhere")
        return elsewhere

    def on_disk(self, table: str = "attempts") -> int:
        """How many rows a table of the outbox has."""
        with closing(sqlite3.connect(self.folder / "outbox.db")) as db:
            count: int = db.execute(f"SELECT count(*) FROM {table}").fetchone()[0]  # noqa: S608 - ours
            return count

    def change_file(self, statement: str) -> None:
        with closing(sqlite3.connect(self.folder / "outbox.db")) as db, db:
            db.execute(statement)

    def _execute(self, statement: str) -> None:
        with closing(sqlite3.connect(self.folder / "results.db")) as db, db:
            db.execute(statement)


@pytest.fixture
async def machine(tmp_path: Path) -> AsyncIterator[Machine]:
    machine = Machine(tmp_path)
    yield machine
    for outbox in machine.opened:
        await outbox.close()


def new_task() -> Task:
    return Task(str(uuid4()), "user-1", "uploads/user-1/cat", ("cat", "black dog"))


async def claimed(outbox: Outbox, task: Task) -> Attempt:
    attempt = await outbox.note(task, "request-1")
    assert await outbox.claim(attempt) is None
    return attempt


async def finish(outbox: Outbox, attempt: Attempt, mask_url: str = "mask") -> None:
    await outbox.update_result(attempt, mask_url, ["cat"], METADATA, [mask_url])


async def taken(outbox: Outbox) -> Attempt:
    attempt = await outbox.take_waiting()
    assert attempt is not None
    return attempt


async def test_settled_task_leaves_nothing_on_disk(machine: Machine) -> None:
    """A task that went well is in its row, and in the outbox no more."""
    outbox = machine.process()
    done, failed = await claimed(outbox, new_task()), await claimed(outbox, new_task())
    assert machine.on_disk() == 2
    await finish(outbox, done)
    await outbox.end_as_error(failed, "no")
    assert (await machine.row(done.task.task_id)).status == "done"
    assert (await machine.row(failed.task.task_id)).metadata["error_message"] == "no"
    assert machine.on_disk() == 0


@pytest.mark.parametrize("status", ["done", "error"])
async def test_outcome_is_delivered_when_the_rows_are_back(machine: Machine, status: str) -> None:
    """An outcome that the rows could not take is no error, and reaches the row once they are back."""
    outbox = machine.process()
    attempt = await claimed(outbox, new_task())
    machine.take_rows_away()
    if status == "done":
        await finish(outbox, attempt)
    else:
        await outbox.end_as_error(attempt, "corrupt")
    machine.bring_rows_back()
    assert (await machine.row(attempt.task.task_id)).status == "processing"
    machine.now_s += 2
    await outbox.deliver_due()
    row = await machine.row(attempt.task.task_id)
    assert (row.status, row.mask_url) == (status, "mask" if status == "done" else None)
    assert row.metadata == (METADATA if status == "done" else {"error_message": "corrupt"})
    assert machine.on_disk() == 0


async def test_outcome_waits_longer_each_time(machine: Machine) -> None:
    """While the rows stay away, an outcome is tried with growing pauses, and never given up."""
    outbox = machine.process()
    attempt = await claimed(outbox, new_task())
    machine.take_rows_away()
    await finish(outbox, attempt)
    for _ in range(20):
        machine.now_s += MAX_PAUSE_S * 1.3
        await outbox.deliver_due()
    machine.bring_rows_back()
    machine.now_s += 2  # the first pause is long over, the latest is not
    await outbox.deliver_due()
    assert (await machine.row(attempt.task.task_id)).status == "processing"
    machine.now_s += MAX_PAUSE_S * 1.3
    await outbox.deliver_due()
    assert (await machine.row(attempt.task.task_id)).status == "done"


KILLED = """
import asyncio, os, signal, sqlite3, sys
from pathlib import Path
from results import SqliteResults, Task, open_outbox

async def main():
    folder, task_id, moment = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    outbox = open_outbox(
        folder / "outbox.db", SqliteResults(folder / "results.db", 120), owner="killed",
        is_alive=lambda _: True, server_version="1", lease_s=120, outage_limit_s=900,
    )
    task = Task(task_id, "user-1", "uploads/user-1/cat", ("cat", "black dog"))
    attempt = await outbox.note(task, "request-1")
    await outbox.claim(attempt)
    if moment == "after the work":
        db = sqlite3.connect(folder / "results.db")
        db.execute("ALTER TABLE segmentation_results RENAME TO away")
        await outbox.update_result(attempt, "mask", ["cat"], {}, [])
    print(attempt.attempt_id, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def killed_process(folder: Path, task_id: str, moment: str) -> str:
    """A process that ends by kill -9; its attempt id."""
    command = [sys.executable, "-c", KILLED, str(folder), task_id, moment]
    ended = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    assert ended.returncode == -9
    return ended.stdout.strip()


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize("by", ["a server's start", "another process"])
async def test_kill_in_the_work_is_begun_again(machine: Machine, by: str) -> None:
    """What a killed process had claimed is begun again, under the same attempt id."""
    task = new_task()
    attempt_id = killed_process(machine.folder, task.task_id, "in the work")
    outbox = machine.process()
    if by == "a server's start":
        assert await outbox.start_over() == (0, 1)
    else:
        await outbox.release_dead()
    attempt = await taken(outbox)
    assert (attempt.task, attempt.attempt_id, attempt.request_id) == (task, attempt_id, "request-1")
    assert await outbox.claim(attempt) is None
    await finish(outbox, attempt)
    assert (await machine.row(task.task_id)).status == "done"
    assert machine.on_disk() == 0


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
async def test_kill_before_the_row_is_settled(machine: Machine) -> None:
    """An outcome that a killed server could not deliver is delivered after the next start, without work."""
    task = new_task()
    machine.process()  # makes the file of rows
    killed_process(machine.folder, task.task_id, "after the work")
    machine.bring_rows_back()
    outbox = machine.process()
    assert await outbox.start_over() == (1, 0)
    await outbox.deliver_due()
    row = await machine.row(task.task_id)
    assert (row.status, row.mask_url, row.labels) == ("done", "mask", ["cat"])


async def test_attempt_at_work_is_left_alone(machine: Machine) -> None:
    """However long a living process works on a task, no other begins it; a start of the server neither."""
    first, second = machine.process(), machine.process()
    await claimed(first, new_task())
    machine.now_s += 100 * LEASE_S
    await second.release_dead()
    assert await second.take_waiting() is None
    assert await second.start_over() == (0, 0)
    assert await second.take_waiting() is None


async def test_one_attempt_a_task(machine: Machine) -> None:
    """Calls for one task while the database is away keep one attempt, and begin it once."""
    first, second = machine.process(), machine.process()
    task = new_task()
    machine.take_rows_away()
    for outbox in [first, second] * 3:
        with pytest.raises(ResultsUnavailable, match="kept"):
            await claimed(outbox, task)
        machine.now_s += 1
    assert machine.on_disk() == 1
    machine.bring_rows_back()
    machine.now_s += MAX_PAUSE_S * 1.3
    attempt = await taken(first)
    assert await second.take_waiting() is None
    with pytest.raises(TaskInProgress):
        await second.note(task, "request-2")
    assert await first.claim(attempt) is None


@pytest.mark.parametrize("change", [{"prompts": ("dog",)}, {"source_image_url": "uploads/user-1/dog"}])
async def test_kept_task_is_not_begun_for_another_request(
    machine: Machine, change: dict[str, tuple[str, ...]]
) -> None:
    """While a task waits, a request under its id for something else is told that it is in progress."""
    outbox, task = machine.process(), new_task()
    machine.take_rows_away()
    with pytest.raises(ResultsUnavailable):
        await claimed(outbox, task)
    with pytest.raises(TaskInProgress):
        await outbox.note(replace(task, **change), "request-2")  # type: ignore[arg-type]
    assert machine.on_disk() == 1


async def test_task_is_kept_when_the_rows_are_away(machine: Machine) -> None:
    """A task that could not be claimed is begun when the rows are back, however long that takes."""
    outbox, task = machine.process(), new_task()
    machine.take_rows_away()
    with pytest.raises(ResultsUnavailable, match="kept"):
        await claimed(outbox, task)
    for _ in range(40):
        machine.now_s += MAX_PAUSE_S * 1.3
        with pytest.raises(ResultsUnavailable):
            await outbox.claim(await taken(outbox))
        await outbox.renew_leases(model_is_there=True)
    machine.bring_rows_back()
    machine.now_s += MAX_PAUSE_S * 1.3
    attempt = await taken(outbox)
    assert attempt.task == task
    assert await outbox.claim(attempt) is None


async def test_refused_claim_is_not_kept(machine: Machine) -> None:
    """A task that is another's, or in work elsewhere, is nothing to come back to."""
    outbox, task = machine.process(), new_task()
    await (await machine.take_over(task)).close()
    with pytest.raises(TaskInProgress):
        await claimed(outbox, task)
    with pytest.raises(TaskNotFound):
        await claimed(outbox, Task(task.task_id, "user-2", "uploads/user-2/cat", ("cat",)))
    assert machine.on_disk() == 0


async def test_replay_is_not_kept(machine: Machine) -> None:
    """A claim of a done task gives its result and leaves nothing on disk."""
    outbox, task = machine.process(), new_task()
    await finish(outbox, await claimed(outbox, task))
    attempt = await outbox.note(task, "request-2")
    assert await outbox.claim(attempt) == StoredResult(task.task_id, "mask", ["cat"], METADATA)
    assert machine.on_disk() == 0


async def wait_for_r2(outbox: Outbox, attempt: Attempt) -> bool:
    return await outbox.keep(attempt, "the object store does not answer", pause=True)


async def test_outage_after_the_claim_keeps_the_task(machine: Machine) -> None:
    """A claimed task that waits keeps its row under its own attempt, lease after lease, and ends well."""
    outbox = machine.process()
    attempt = await claimed(outbox, new_task())
    assert await wait_for_r2(outbox, attempt)
    for _ in range(5):
        machine.now_s += LEASE_S / 2
        # As if the lease had all but run out: only its renewal keeps others away.
        machine._execute("UPDATE segmentation_results SET lease_until_s = 0")
        await outbox.renew_leases(model_is_there=True)
        row = await machine.row(attempt.task.task_id)
        assert (row.status, row.attempt_id) == ("processing", attempt.attempt_id)
        elsewhere = SqliteResults(machine.folder / "results.db", LEASE_S)
        with pytest.raises(TaskInProgress):
            await elsewhere.claim(attempt.task, "elsewhere")
        await elsewhere.close()
    again = await taken(outbox)
    assert again.attempt_id == attempt.attempt_id
    assert await outbox.claim(again) is None
    await finish(outbox, again)
    assert (await machine.row(attempt.task.task_id)).status == "done"


@pytest.mark.parametrize("ended_by", ["a failed try", "the look at leases"])
async def test_outage_has_a_limit(machine: Machine, ended_by: str) -> None:
    """A claimed task that waits longer than the limit ends as an error that says what it waited for."""
    outbox = machine.process()
    attempt = await claimed(outbox, new_task())
    assert await wait_for_r2(outbox, attempt)
    machine.now_s += OUTAGE_LIMIT_S + 1
    if ended_by == "a failed try":
        again = await taken(outbox)
        assert not await wait_for_r2(outbox, again)
        assert await outbox.take_waiting() is None  # it is still in the hands of its process
        return
    await outbox.renew_leases(model_is_there=True)
    await outbox.deliver_due()
    row = await machine.row(attempt.task.task_id)
    assert row.status == "error"
    assert row.metadata["error_message"] == (
        "the object store does not answer; given up after waiting 15 minutes"
    )
    assert machine.on_disk() == 0


async def test_task_of_a_database_outage_survives_a_restart(machine: Machine) -> None:
    """A task that could not be claimed waits without a limit, also across restarts in the outage."""
    outbox, task = machine.process(), new_task()
    machine.take_rows_away()
    with pytest.raises(ResultsUnavailable, match="kept"):
        await claimed(outbox, task)
    for _ in range(3):
        outbox = await machine.restart()
        for _ in range(5):
            await outbox.renew_leases(model_is_there=False)
            machine.now_s += OUTAGE_LIMIT_S
    machine.bring_rows_back()
    await outbox.renew_leases(model_is_there=False)
    attempt = await taken(outbox)
    assert attempt.task == task
    assert await outbox.claim(attempt) is None


async def test_turn_of_a_suspect_is_no_outage(machine: Machine) -> None:
    """While the model is there, a task that only waits for its turn may wait longer than the limit."""
    outbox = machine.process()
    attempts = [await claimed(outbox, new_task()) for _ in range(2)]
    await work_and_die(machine, outbox, attempts, "runner")
    for _ in range(5):
        await outbox.renew_leases(model_is_there=True)
        machine.now_s += OUTAGE_LIMIT_S / 2
    await outbox.renew_leases(model_is_there=False)
    machine.now_s += OUTAGE_LIMIT_S + 1
    assert machine.on_disk() == 2
    await outbox.renew_leases(model_is_there=False)  # the model is away: that has a limit
    await outbox.deliver_due()
    assert machine.on_disk() == 0


async def test_task_that_was_begun_again_is_not_given_up(machine: Machine) -> None:
    """The limit ends a task that waits, and none that a process has just begun."""
    outbox = machine.process()
    attempt = await claimed(outbox, new_task())
    await wait_for_r2(outbox, attempt)
    machine.now_s += OUTAGE_LIMIT_S + 1
    lease = await outbox._attempts.take_lease(1.0, OUTAGE_LIMIT_S)
    assert lease is not None
    assert lease.is_over
    again = await taken(outbox)
    await outbox._renew(lease, model_is_there=True)
    await finish(outbox, again)
    assert (await machine.row(attempt.task.task_id)).status == "done"


async def test_attempt_that_its_process_forgot_is_begun_again(machine: Machine) -> None:
    """What an error has left in the hands of a living process is found; what is at work stays."""
    outbox = machine.process()
    left, at_work = await claimed(outbox, new_task()), await claimed(outbox, new_task())
    await outbox.begin_work(left, None)
    outbox.let_go(left)
    await outbox.release_dead()
    again = await taken(outbox)
    assert (again.attempt_id, again.suspect) == (left.attempt_id, False)
    assert await outbox.take_waiting() is None
    await finish(outbox, at_work)


async def test_attempt_may_be_begun_again_before_its_last_run_has_let_go(machine: Machine) -> None:
    """A run that ends late takes its successor's attempt out of nobody's hands."""
    outbox = machine.process()
    first = await claimed(outbox, new_task())
    await work_and_die(machine, outbox, [first], "runner")
    second = await taken(outbox)
    outbox.let_go(first)
    await outbox.release_dead()
    assert await outbox.take_waiting() is None
    outbox.let_go(second)
    await outbox.release_dead()
    assert (await taken(outbox)).attempt_id == first.attempt_id


async def test_undelivered_outcome_of_a_suspect_holds_up_no_other(machine: Machine) -> None:
    """The next suspect begins when the work of the former is over, whether or not its row can be settled."""
    outbox = machine.process()
    attempts = [await claimed(outbox, new_task()) for _ in range(2)]
    await work_and_die(machine, outbox, attempts, "runner")
    first = await taken(outbox)
    await outbox.claim(first)
    machine.take_rows_away()
    await finish(outbox, first)
    assert (await taken(outbox)).attempt_id != first.attempt_id
    machine.bring_rows_back()


async def test_waiting_task_that_was_taken_over_is_dropped(machine: Machine) -> None:
    """When its lease was lost to another server, a waiting task is that server's."""
    outbox = machine.process()
    attempt = await claimed(outbox, new_task())
    await wait_for_r2(outbox, attempt)
    elsewhere = await machine.take_over(attempt.task)
    machine.now_s += LEASE_S
    await outbox.renew_leases(model_is_there=True)
    assert machine.on_disk() == 0
    assert (await machine.row(attempt.task.task_id)).attempt_id == "elsewhere"
    await elsewhere.close()


Death = Literal["runner", "server"]


async def work_and_die(machine: Machine, outbox: Outbox, attempts: list[Attempt], death: Death) -> Outbox:
    """All of `attempts` are at work when the model's process, or the whole server, dies."""
    for attempt in attempts:
        await outbox.begin_work(attempt, "sha" if attempt.suspect else None)
    if death == "server":
        return await machine.restart()
    for attempt in attempts:
        await outbox.keep_after_death(attempt)
    return outbox


@pytest.mark.parametrize("death", ["runner", "server"])
async def test_task_that_kills_is_given_up(machine: Machine, death: Death) -> None:
    """A task that kills a process each time it is begun ends as an error, and stays so when sent again."""
    task, outbox = new_task(), machine.process()
    outbox = await work_and_die(machine, outbox, [await claimed(outbox, task)], death)
    for _ in range(MAX_DEATHS_ALONE):
        attempt = await taken(outbox)
        assert attempt.suspect
        assert await outbox.claim(attempt) is None
        outbox = await work_and_die(machine, outbox, [attempt], death)
    assert await outbox.take_waiting() is None
    await outbox.deliver_due()
    row = await machine.row(task.task_id)
    assert row.status == "error"
    assert str(row.metadata["error_message"]).startswith("the server's process stopped 3 times")
    assert machine.on_disk() == 0
    known = await outbox.given_up(task)
    assert known is not None
    assert (known.image_sha256, known.error_message) == ("sha", row.metadata["error_message"])


async def given_up(machine: Machine, task: Task) -> Outbox:
    outbox = machine.process()
    outbox = await work_and_die(machine, outbox, [await claimed(outbox, task)], "runner")
    for _ in range(MAX_DEATHS_ALONE):
        outbox = await work_and_die(machine, outbox, [await taken(outbox)], "runner")
    await outbox.deliver_due()
    return outbox


async def test_given_up_task_may_be_tried_after_a_change(machine: Machine) -> None:
    """Other prompts, another image, another version or an operator's word make a given-up task a new one."""
    tasks = [new_task() for _ in range(4)]
    for task in tasks:
        outbox = await given_up(machine, task)
        assert await outbox.given_up(task) is not None
    assert await outbox.given_up(replace(tasks[0], prompts=("dog",))) is None
    assert await outbox.given_up(tasks[0]) is None
    # Its bytes tell another image, not its URL: that may be signed anew each time.
    assert await outbox.given_up(replace(tasks[1], source_image_url="uploads/user-1/dog")) is not None
    await outbox.forgive(tasks[2].task_id)
    assert await outbox.given_up(tasks[2]) is None
    assert await outbox.given_up(replace(tasks[3], user_id="user-2")) is None
    assert await outbox.given_up(tasks[3]) is not None
    machine.version = "2"
    assert await machine.process().given_up(tasks[3]) is None


async def test_neighbours_of_a_killer_are_not_blamed(machine: Machine) -> None:
    """Of ten tasks that share the deaths of a server, nine end well, and the one that kills is given up."""
    outbox = machine.process()
    attempts = [await claimed(outbox, new_task()) for _ in range(10)]
    killer = attempts[0].task.task_id
    outbox = await work_and_die(machine, outbox, attempts, "server")
    for _ in range(100):
        attempt = await outbox.take_waiting()
        if attempt is None:
            break
        assert await outbox.take_waiting() is None  # one suspect at a time, in any process
        if attempt.task.task_id == killer:
            outbox = await work_and_die(machine, outbox, [attempt], "server")
            continue
        await outbox.claim(attempt)
        await outbox.begin_work(attempt, "sha")
        await finish(outbox, attempt)
    await outbox.deliver_due()
    assert machine.on_disk() == 0
    statuses = {each.task.task_id: (await machine.row(each.task.task_id)).status for each in attempts}
    assert statuses.pop(killer) == "error"
    assert set(statuses.values()) == {"done"}


async def test_death_counts_only_for_work_that_had_begun(machine: Machine) -> None:
    """A task that waited for its image, or whose work was over, is no suspect when the server dies."""
    outbox = machine.process()
    waiting, storing = await claimed(outbox, new_task()), await claimed(outbox, new_task())
    await outbox.begin_work(storing, None)
    await outbox.begin_storing(storing, ["masks/a.png"])
    outbox = await machine.restart()
    assert {(await taken(outbox)).suspect for _ in (waiting, storing)} == {False}


async def test_death_after_the_order_to_stop_is_excused(machine: Machine) -> None:
    """A host that kills a server which was told to stop proves nothing against its tasks."""
    outbox = machine.process()
    attempt = await claimed(outbox, new_task())
    await outbox.begin_work(attempt, None)
    late = await claimed(outbox, new_task())
    await outbox.excuse()
    assert await outbox.begin_work(late, None)  # it goes on, but is not noted
    successor = await machine.restart()
    assert not any([(await taken(successor)).suspect for _ in range(2)])


async def test_suspect_does_not_begin_in_a_process_that_stops(machine: Machine) -> None:
    """It waits for the next start: this one may be killed at any moment."""
    outbox = machine.process()
    await work_and_die(machine, outbox, [await claimed(outbox, new_task())], "runner")
    suspect = await taken(outbox)
    await outbox.excuse()
    assert not await outbox.begin_work(suspect, "sha")


async def begins(outbox: Outbox, attempt: Attempt) -> asyncio.Task[bool]:
    """`begin_work` on its way, after a few looks at whether it may."""
    beginning = asyncio.create_task(outbox.begin_work(attempt, "sha"))
    await asyncio.wait([beginning], timeout=0.3)
    return beginning


async def test_attempt_that_waits_does_not_begin(machine: Machine) -> None:
    """Work that comes too late, when its attempt waits already, is not noted, and so stops no suspect."""
    outbox = machine.process()
    attempt = await claimed(outbox, new_task())
    await wait_for_r2(outbox, attempt)
    late = await begins(outbox, attempt)
    assert not late.done()
    late.cancel()
    await work_and_die(machine, outbox, [await claimed(outbox, new_task())], "runner")
    await asyncio.wait_for(outbox.begin_work(await taken(outbox), "sha"), 5)


async def test_suspect_works_alone(machine: Machine) -> None:
    """A suspect begins when nothing else is at work in any process; meanwhile nothing else begins."""
    first, second = machine.process(), machine.process()
    await work_and_die(machine, first, [await claimed(first, new_task())], "runner")
    busy, fresh = await claimed(second, new_task()), await claimed(second, new_task())
    await second.begin_work(busy, None)
    suspect = await taken(first)
    beginning = await begins(first, suspect)
    assert not beginning.done()  # another is at work
    assert not second.turns_are_awaited()
    follower = await begins(second, fresh)
    assert not follower.done()  # the suspect comes first
    assert second.turns_are_awaited()
    await second.begin_storing(busy, [])
    await beginning
    assert not follower.done()  # it is alone
    await first.begin_storing(suspect, [])
    await follower
    assert not second.turns_are_awaited()


async def test_taken_over_outcome_is_dropped(machine: Machine) -> None:
    """An outcome that comes after another attempt's leaves that one's row as it is, and its mask goes."""
    outbox, task = machine.process(), new_task()
    attempt = await claimed(outbox, task)
    await outbox.begin_storing(attempt, ["late mask"])
    machine.take_rows_away()
    await finish(outbox, attempt, "late mask")
    machine.bring_rows_back()
    elsewhere = await machine.take_over(task)
    await elsewhere.update_result(task.task_id, "mask", [], {}, attempt_id="elsewhere")
    await elsewhere.close()
    machine.now_s += 2
    await outbox.deliver_due()
    assert (await machine.row(task.task_id)).mask_url == "mask"
    assert machine.on_disk() == 0
    machine.now_s += DELETE_AFTER_S
    assert await outbox.unneeded_mask() == "late mask"


async def test_lost_attempt_is_told_to_its_caller(machine: Machine) -> None:
    """A finish that comes after another attempt's raises, and leaves nothing on disk."""
    outbox, task = machine.process(), new_task()
    attempt = await claimed(outbox, task)
    await (await machine.take_over(task)).close()
    with pytest.raises(AttemptLost):
        await finish(outbox, attempt)
    assert machine.on_disk() == 0


@pytest.mark.parametrize("end", ["done", "error", "row deleted", "done by another"])
async def test_masks_that_nobody_was_told_of_are_deleted(machine: Machine, end: str) -> None:
    """Stored masks stay when the row names them; after any other end they are to be deleted."""
    outbox, task = machine.process(), new_task()
    attempt = await claimed(outbox, task)
    await outbox.begin_storing(attempt, ["masks/first.png"])  # by a try that a kill cut short
    await outbox.begin_storing(attempt, ["masks/second.png"])
    unneeded = {"masks/first.png", "masks/second.png"}
    if end == "done":
        await finish(outbox, attempt, "masks/second.png")
        unneeded = {"masks/first.png"}
    elif end == "error":
        await outbox.end_as_error(attempt, "no")
    elif end == "row deleted":
        machine.delete_row(task.task_id)
        with pytest.raises(TaskNotFound):
            await finish(outbox, attempt, "masks/second.png")
    else:
        elsewhere = await machine.take_over(task)
        await elsewhere.update_result(
            task.task_id, "https://x/masks/second.png", [], {}, attempt_id="elsewhere"
        )
        await elsewhere.close()
        await wait_for_r2(outbox, attempt)
        assert await outbox.claim(attempt) is not None
        unneeded = {"masks/first.png"}
    assert await outbox.unneeded_mask() is None  # its upload may still be on the way
    machine.now_s += DELETE_AFTER_S
    found = set()
    while (key := await outbox.unneeded_mask()) is not None:
        found.add(key)
        await outbox.mask_deleted(key)
    assert found == unneeded
    assert machine.on_disk("unneeded_masks") == 0


async def test_mask_that_could_not_be_deleted_is_due_again(machine: Machine) -> None:
    """While R2 is away a mask is asked for again and again, until it is deleted."""
    outbox = machine.process()
    attempt = await claimed(outbox, new_task())
    await outbox.begin_storing(attempt, ["masks/a.png"])
    await outbox.end_as_error(attempt, "no")
    for _ in range(3):
        machine.now_s += 61
        assert await outbox.unneeded_mask() == "masks/a.png"
        assert await outbox.unneeded_mask() is None


async def test_refused_outcome_does_not_hold_up_others(machine: Machine) -> None:
    """One row that takes no update keeps its own outcome waiting, and nobody else's."""
    outbox = machine.process()
    attempts = [await claimed(outbox, new_task()) for _ in range(4)]
    machine.take_rows_away()
    for attempt in attempts:
        await finish(outbox, attempt)
    machine.bring_rows_back()
    machine.refuse_row(attempts[0].task.task_id)
    machine.now_s += 2
    await outbox.deliver_due()
    statuses = [(await machine.row(attempt.task.task_id)).status for attempt in attempts]
    assert statuses == ["processing"] + ["done"] * 3
    assert machine.on_disk() == 1


async def test_waiting_attempts_are_shared_out(machine: Machine) -> None:
    """Of 30 attempts left behind, processes that look at the same time take each exactly once."""
    first = machine.process()
    tasks = [new_task() for _ in range(30)]
    for task in tasks:
        await claimed(first, task)
    await machine.restart()
    processes = [machine.process() for _ in range(4)]

    async def take_all(outbox: Outbox) -> list[str]:
        found = []
        while (attempt := await outbox.take_waiting()) is not None:
            found.append(attempt.task.task_id)
        return found

    found = [task_id for each in await asyncio.gather(*map(take_all, processes)) for task_id in each]
    assert Counter(found) == Counter(task.task_id for task in tasks)


async def test_stop_delivers_what_it_can(machine: Machine) -> None:
    """A stop delivers every outcome that the rows take, due or not."""
    outbox = machine.process()
    attempts = [await claimed(outbox, new_task()) for _ in range(30)]
    machine.take_rows_away()
    for attempt in attempts:
        await finish(outbox, attempt)
    machine.bring_rows_back()
    await machine.stop(outbox)
    assert {(await machine.row(attempt.task.task_id)).status for attempt in attempts} == {"done"}
    assert machine.on_disk() == 0


async def test_stop_with_the_rows_away_keeps_the_outcome(machine: Machine) -> None:
    """A stop while the rows are away ends soon, and the next start delivers."""
    outbox = machine.process()
    attempt = await claimed(outbox, new_task())
    machine.take_rows_away()
    await finish(outbox, attempt)
    await machine.stop(outbox)
    machine.bring_rows_back()
    successor = await machine.restart()
    await successor.deliver_due()
    assert (await machine.row(attempt.task.task_id)).status == "done"


async def test_depths_are_metrics(machine: Machine) -> None:
    """sam3_outbox_depth counts outcomes that wait, sam3_tasks_waiting tasks that wait to be begun."""
    outbox = machine.process()
    attempts = [await claimed(outbox, new_task()) for _ in range(3)]
    kept = await claimed(outbox, new_task())
    await wait_for_r2(outbox, kept)
    machine.take_rows_away()
    for attempt in attempts:
        await finish(outbox, attempt)
    await outbox.deliver_due()
    assert REGISTRY.get_sample_value("sam3_outbox_depth") == 3
    assert REGISTRY.get_sample_value("sam3_tasks_waiting") == 1
    machine.bring_rows_back()
    machine.now_s += MAX_PAUSE_S
    await finish(outbox, await taken(outbox))
    await outbox.deliver_due()
    assert REGISTRY.get_sample_value("sam3_outbox_depth") == 0
    assert REGISTRY.get_sample_value("sam3_tasks_waiting") == 0


async def test_given_up_tasks_are_a_metric(machine: Machine) -> None:
    """sam3_tasks_given_up counts the tasks that are refused until an operator forgives them."""
    outbox = await given_up(machine, task := new_task())
    assert REGISTRY.get_sample_value("sam3_tasks_given_up") == 1
    await outbox.forgive(task.task_id)
    await outbox.deliver_due()
    assert REGISTRY.get_sample_value("sam3_tasks_given_up") == 0


async def test_metadata_that_is_no_json_is_refused(machine: Machine) -> None:
    """NaN is refused before anything is written, and the attempt may still end as an error."""
    outbox = machine.process()
    attempt = await claimed(outbox, new_task())
    with pytest.raises(MetadataInvalid):
        await outbox.update_result(attempt, "mask", [], {"score": float("nan")}, [])
    await outbox.end_as_error(attempt, "no")
    assert (await machine.row(attempt.task.task_id)).status == "error"


@pytest.mark.parametrize("rows", ["there", "away"])
async def test_work_ends_without_the_file(machine: Machine, rows: str) -> None:
    """When the outbox's own file fails in the middle of the work, nothing is lost, and later nothing left."""
    outbox = machine.process()
    attempt = await claimed(outbox, new_task())
    machine.change_file("ALTER TABLE attempts RENAME TO lost")
    if rows == "away":
        machine.take_rows_away()
    await outbox.begin_work(attempt, None)
    await outbox.begin_storing(attempt, ["mask"])
    await finish(outbox, attempt)
    if rows == "away":
        machine.bring_rows_back()
    machine.change_file("ALTER TABLE lost RENAME TO attempts")
    await outbox.deliver_due()
    assert (await machine.row(attempt.task.task_id)).status == "done"
    assert machine.on_disk() == 0


async def test_task_is_kept_without_the_file(machine: Machine) -> None:
    """A task that must wait while the file fails is begun again when the file can be written."""
    outbox = machine.process()
    attempts = [await claimed(outbox, new_task()) for _ in range(3)]
    machine.change_file("ALTER TABLE attempts RENAME TO lost")
    assert await wait_for_r2(outbox, attempts[0])
    await outbox.keep_after_death(attempts[1])
    machine.take_rows_away()
    with pytest.raises(ResultsUnavailable):
        await outbox.claim(attempts[2])
    machine.bring_rows_back()
    machine.change_file("ALTER TABLE lost RENAME TO attempts")
    await outbox.deliver_due()
    machine.now_s += MAX_PAUSE_S * 1.3
    again = {(await taken(outbox)).attempt_id for _ in attempts}
    assert again == {attempt.attempt_id for attempt in attempts}


@pytest.mark.parametrize(
    "spoil",
    [
        "task = 'no JSON'",
        """task = '{"task_id": 3}'""",
        "task = json_remove(task, '$.prompts')",
        """outcome = '{"colour": "blue"}', due_s = 0""",
        "outcome = '[', due_s = 0",
    ],
)
async def test_unreadable_attempt_is_set_aside(machine: Machine, spoil: str) -> None:
    """One attempt that cannot be read costs one look, and no other attempt."""
    outbox = machine.process()
    spoiled, whole = await claimed(outbox, new_task()), await claimed(outbox, new_task())
    await wait_for_r2(outbox, whole)
    await wait_for_r2(outbox, spoiled)
    machine.change_file(f"UPDATE attempts SET {spoil} WHERE attempt_id = '{spoiled.attempt_id}'")  # noqa: S608
    machine.now_s += MAX_PAUSE_S
    await outbox.deliver_due()
    await outbox.renew_leases(model_is_there=True)
    assert (await taken(outbox)).attempt_id == whole.attempt_id
    assert await outbox.take_waiting() is None
    assert (machine.on_disk(), machine.on_disk("set_aside")) == (1, 1)
