"""The SQLite store alone: several processes, start-up, clocks and faults of the file."""

import asyncio
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest

from results import Claim, ResultsUnavailable, SqliteResults, StoredResult, Task, TaskInProgress

pytestmark = pytest.mark.anyio


def new_task() -> Task:
    return Task(str(uuid4()), "user-1", "uploads/user-1/cat", ("cat",))


# Five concurrent claims in each process, which start at a line of standard input.
CLAIMER = """
import asyncio, sys
from pathlib import Path
from uuid import uuid4
from results import Claim, SqliteResults, Task, TaskInProgress

async def main():
    print("ready", flush=True)
    sys.stdin.readline()
    store = SqliteResults(Path(sys.argv[1]), 60)
    task = Task(sys.argv[2], "user-1", "uploads/user-1/cat", ("cat",))
    claims = (store.claim(task, str(uuid4())) for _ in range(5))
    answers = await asyncio.gather(*claims, return_exceptions=True)
    await store.close()
    print(*(type(answer).__name__ for answer in answers))

asyncio.run(main())
"""


def answers_of_processes(path: Path, task_id: str, processes: int) -> list[str]:
    command = [sys.executable, "-c", CLAIMER, str(path), task_id]
    running = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    for process in running:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in running:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return [answer for process in running for answer in process.communicate(timeout=30)[0].split()]


@pytest.mark.parametrize("new_file", [True, False])
def test_one_claim_wins_across_processes(tmp_path: Path, *, new_file: bool) -> None:
    """Of 20 concurrent claims of one new task in 4 processes, exactly one succeeds."""
    path = tmp_path / "results.db"
    if not new_file:
        asyncio.run(SqliteResults(path, 60).close())
    for _ in range(3):
        answers = answers_of_processes(path, str(uuid4()), 4)
        assert sorted(answers) == ["Claim"] + ["TaskInProgress"] * 19


OPENER = """
import asyncio, multiprocessing, sys
from pathlib import Path
from results import SqliteResults

def open_all(together, folder):
    for number in range(50):
        together.wait(20)
        asyncio.run(SqliteResults(Path(folder) / f"{number}.db", 60).close())

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    together = context.Barrier(4)
    openers = [context.Process(target=open_all, args=(together, sys.argv[1])) for _ in range(4)]
    for opener in openers:
        opener.start()
    for opener in openers:
        opener.join()
    sys.exit(max(abs(opener.exitcode) for opener in openers))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_processes_may_create_the_file_together(tmp_path: Path) -> None:
    """Processes that open one new file at the same time all succeed."""
    opened = subprocess.run([sys.executable, "-c", OPENER, str(tmp_path)], check=False, capture_output=True)
    assert (opened.returncode, opened.stderr) == (0, b"")


async def test_missing_row_is_inserted_by_its_claim(tmp_path: Path) -> None:
    """The claim inserts a missing row with the task's values, since there is no Edge."""
    store = SqliteResults(tmp_path / "new" / "results.db", 60)
    task = new_task()
    assert isinstance(await store.claim(task, str(uuid4())), Claim)
    await store.close()
    db = sqlite3.connect(tmp_path / "new" / "results.db")
    row = db.execute("SELECT id, user_id, source_image_url, text_prompt FROM segmentation_results").fetchall()
    db.close()
    assert row == [(task.task_id, "user-1", "uploads/user-1/cat", "cat")]


async def test_rows_survive_the_process(tmp_path: Path) -> None:
    """A claim holds after its store is closed."""
    task = new_task()
    first = SqliteResults(tmp_path / "results.db", 60)
    await first.claim(task, str(uuid4()))
    await first.close()
    second = SqliteResults(tmp_path / "results.db", 60)
    with pytest.raises(TaskInProgress):
        await second.claim(task, str(uuid4()))
    await second.close()


KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
from results import SqliteResults, Task

async def main():
    store = SqliteResults(Path(sys.argv[1]), 60)
    claim = await store.claim(Task(sys.argv[2], "user-1", "uploads/user-1/cat", ("cat",)), "first attempt")
    await store.update_result(claim.task_id, "mask", ["cat"], {}, attempt_id=claim.attempt_id)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_finished_task_survives_a_kill(tmp_path: Path) -> None:
    """A result that was stored before a kill -9 is there after it."""
    task = new_task()
    command = [sys.executable, "-c", KILLED, str(tmp_path / "results.db"), task.task_id]
    assert subprocess.run(command, check=False).returncode == -9

    async def result_after() -> Claim | StoredResult:
        store = SqliteResults(tmp_path / "results.db", 60)
        try:
            return await store.claim(task, str(uuid4()))
        finally:
            await store.close()

    assert asyncio.run(result_after()) == StoredResult(task.task_id, "mask", ["cat"], {})


@pytest.mark.parametrize("hours", [-24, 24])
async def test_wall_clock_does_not_change_leases(tmp_path: Path, hours: int) -> None:
    """Setting the wall clock forward ends no lease, and setting it back extends none."""
    wall, clock_s = [datetime(2026, 1, 2, tzinfo=UTC)], [1000.0]
    path = tmp_path / "results.db"
    store = SqliteResults(path, 60, now=lambda: wall[0], clock_s=lambda: clock_s[0])
    task = new_task()
    await store.claim(task, str(uuid4()))
    wall[0] += timedelta(hours=hours)
    with pytest.raises(TaskInProgress) as raised:
        await store.claim(task, str(uuid4()))
    assert raised.value.retry_after_s == pytest.approx(60)
    assert await store.end_stale(0) == 0
    clock_s[0] += 61
    assert isinstance(await store.claim(task, str(uuid4())), Claim)
    await store.close()


async def test_lease_of_an_earlier_boot_has_expired(tmp_path: Path) -> None:
    """A lease by the monotonic clock of an earlier boot has expired."""
    clock_s = [1e6]
    store = SqliteResults(tmp_path / "results.db", 60, clock_s=lambda: clock_s[0])
    task = new_task()
    await store.claim(task, str(uuid4()))
    clock_s[0] = 5.0
    assert isinstance(await store.claim(task, str(uuid4())), Claim)
    await store.close()


async def test_locked_file_does_not_block_the_event_loop(tmp_path: Path) -> None:
    """While another process writes, a claim waits and the event loop runs."""
    store = SqliteResults(tmp_path / "results.db", 60)
    other = sqlite3.connect(tmp_path / "results.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    claim = asyncio.create_task(store.claim(new_task(), str(uuid4())))
    await asyncio.sleep(0.2)
    assert not claim.done()
    other.execute("COMMIT")
    other.close()
    assert isinstance(await claim, Claim)
    await store.close()


async def test_lost_table_is_unavailable(tmp_path: Path) -> None:
    """An SQLite error after the start raises ResultsUnavailable."""
    store = SqliteResults(tmp_path / "results.db", 60)
    db = sqlite3.connect(tmp_path / "results.db")
    db.execute("DROP TABLE segmentation_results")
    db.close()
    with pytest.raises(ResultsUnavailable):
        await store.claim(new_task(), str(uuid4()))
    await store.close()


async def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    """A closed store may be closed again."""
    store = SqliteResults(tmp_path / "results.db", 60)
    await store.close()
    await store.close()
