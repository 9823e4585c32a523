"""Faults of the file of attempts itself: it cannot be written, or an attempt is not readable."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from results import ResultsUnavailable
from results.attempt_file import MAX_BACKOFF_S
from tests.results.outbox_host import acquired, finish, new_task, record_and_claim, requeue_for_r2

if TYPE_CHECKING:
    from tests.results.outbox_host import Host

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("rows", ["available", "unavailable"])
async def test_attempt_ends_while_the_file_fails(host: Host, rows: str) -> None:
    """When the file fails during the work, the outcome is still delivered, and the attempt removed later."""
    outbox = host.process()
    attempt = await record_and_claim(outbox, new_task())
    host.edit_file("ALTER TABLE attempts RENAME TO lost")
    if rows == "unavailable":
        host.make_rows_unavailable()
    await outbox.begin_work(attempt, None)
    await outbox.begin_storing(attempt, ["mask"])
    await finish(outbox, attempt)
    if rows == "unavailable":
        host.restore_rows()
    host.edit_file("ALTER TABLE lost RENAME TO attempts")
    await outbox.deliver_due()
    assert (await host.row(attempt.task.task_id)).status == "done"
    assert host.count_rows() == 0


async def test_task_waits_while_the_file_fails(host: Host) -> None:
    """A task that must wait while the file fails is retried when the file can be written."""
    outbox = host.process()
    attempts = [await record_and_claim(outbox, new_task()) for _ in range(3)]
    host.edit_file("ALTER TABLE attempts RENAME TO lost")
    assert await requeue_for_r2(outbox, attempts[0])
    await outbox.requeue_after_death(attempts[1])
    host.make_rows_unavailable()
    with pytest.raises(ResultsUnavailable):
        await outbox.claim(attempts[2])
    host.restore_rows()
    host.edit_file("ALTER TABLE lost RENAME TO attempts")
    await outbox.deliver_due()
    host.now_s += MAX_BACKOFF_S * 1.3
    again = {(await acquired(outbox)).attempt_id for _ in attempts}
    assert again == {attempt.attempt_id for attempt in attempts}


@pytest.mark.parametrize(
    "damage",
    [
        "task = 'no JSON'",
        """task = '{"task_id": 3}'""",
        "task = json_remove(task, '$.prompts')",
        """outcome = '{"colour": "blue"}', due_s = 0""",
        "outcome = '[', due_s = 0",
    ],
)
async def test_unreadable_attempt_is_set_aside(host: Host, damage: str) -> None:
    """An attempt that is not readable is set aside, and the others are not affected."""
    outbox = host.process()
    damaged, whole = await record_and_claim(outbox, new_task()), await record_and_claim(outbox, new_task())
    await requeue_for_r2(outbox, whole)
    await requeue_for_r2(outbox, damaged)
    host.edit_file(f"UPDATE attempts SET {damage} WHERE attempt_id = '{damaged.attempt_id}'")  # noqa: S608
    host.now_s += MAX_BACKOFF_S
    await outbox.deliver_due()
    await outbox.renew_leases(model_is_ready=True)
    assert (await acquired(outbox)).attempt_id == whole.attempt_id
    assert await outbox.acquire_waiting() is None
    assert (host.count_rows(), host.count_rows("set_aside")) == (1, 1)
