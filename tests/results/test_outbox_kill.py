"""The attempts of a process that is killed with SIGKILL."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.results.outbox_host import acquired, finish, new_task

if TYPE_CHECKING:
    from pathlib import Path

    from tests.results.outbox_host import Host

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL"),
]

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
    attempt = await outbox.record(task, "request-1")
    await outbox.claim(attempt)
    if moment == "after the work":
        db = sqlite3.connect(folder / "results.db")
        db.execute("ALTER TABLE segmentation_results RENAME TO unavailable")
        await outbox.update_result(attempt, "mask", ["cat"], {}, [])
    print(attempt.attempt_id, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def killed_process(folder: Path, task_id: str, moment: str) -> str:
    """Run a process that kills itself with SIGKILL; returns its attempt id."""
    command = [sys.executable, "-c", KILLED, str(folder), task_id, moment]
    ended = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    assert ended.returncode == -9
    return ended.stdout.strip()


@pytest.mark.parametrize("by", ["a server's start", "another process"])
async def test_kill_during_work(host: Host, by: str) -> None:
    """A killed process's task is retried under the same attempt id, by a start or another process."""
    task = new_task()
    attempt_id = killed_process(host.folder, task.task_id, "during the work")
    outbox = host.process()
    if by == "a server's start":
        assert await outbox.reset_after_restart() == (0, 1)
    else:
        await outbox.requeue_abandoned()
    attempt = await acquired(outbox)
    assert (attempt.task, attempt.attempt_id, attempt.request_id) == (task, attempt_id, "request-1")
    assert await outbox.claim(attempt) is None
    await finish(outbox, attempt)
    assert (await host.row(task.task_id)).status == "done"
    assert host.count_rows() == 0


async def test_kill_before_delivery(host: Host) -> None:
    """The next start delivers the stored outcome of a killed server, without repeating the work."""
    task = new_task()
    host.process()  # creates the file of rows
    killed_process(host.folder, task.task_id, "after the work")
    host.restore_rows()
    outbox = host.process()
    assert await outbox.reset_after_restart() == (1, 0)
    await outbox.deliver_due()
    row = await host.row(task.task_id)
    assert (row.status, row.mask_url, row.labels) == ("done", "mask", ["cat"])
