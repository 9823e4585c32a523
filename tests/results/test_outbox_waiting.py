"""Attempts that wait for the rows, the object store or a process, and their leases."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from results import ResultsUnavailable, SqliteResults, StoredResult, Task, TaskInProgress, TaskNotFound
from results.attempt_file import MAX_BACKOFF_S
from tests.results.outbox_host import (
    LEASE_S,
    METADATA,
    OUTAGE_LIMIT_S,
    acquired,
    die_during_work,
    finish,
    new_task,
    record_and_claim,
    requeue_for_r2,
)

if TYPE_CHECKING:
    from results import Outbox
    from tests.results.outbox_host import Host

pytestmark = pytest.mark.anyio


async def test_active_attempt_is_not_acquired(host: Host) -> None:
    """While its owner lives, no other process acquires an attempt, whatever the time; nor does a start."""
    first, second = host.process(), host.process()
    await record_and_claim(first, new_task())
    host.now_s += 100 * LEASE_S
    await second.requeue_abandoned()
    assert await second.acquire_waiting() is None
    assert await second.reset_after_restart() == (0, 0)
    assert await second.acquire_waiting() is None


async def test_one_attempt_per_task(host: Host) -> None:
    """Repeated calls during an outage of the database leave one attempt, which one process acquires."""
    first, second = host.process(), host.process()
    task = new_task()
    host.make_rows_unavailable()
    for outbox in [first, second] * 3:
        with pytest.raises(ResultsUnavailable, match="kept"):
            await record_and_claim(outbox, task)
        host.now_s += 1
    assert host.count_rows() == 1
    host.restore_rows()
    host.now_s += MAX_BACKOFF_S * 1.3
    attempt = await acquired(first)
    assert await second.acquire_waiting() is None
    with pytest.raises(TaskInProgress):
        await second.record(task, "request-2")
    assert await first.claim(attempt) is None


@pytest.mark.parametrize("change", [{"prompts": ("dog",)}, {"source_image_url": "uploads/user-1/dog"}])
async def test_waiting_task_refuses_a_different_request(
    host: Host, change: dict[str, tuple[str, ...]]
) -> None:
    """While a task waits, a request with its id but other content raises TaskInProgress."""
    outbox, task = host.process(), new_task()
    host.make_rows_unavailable()
    with pytest.raises(ResultsUnavailable):
        await record_and_claim(outbox, task)
    with pytest.raises(TaskInProgress):
        await outbox.record(replace(task, **change), "request-2")  # type: ignore[arg-type]
    assert host.count_rows() == 1


async def test_unclaimed_task_waits_for_the_rows(host: Host) -> None:
    """A task that could not be claimed is retried when the rows return, without a limit."""
    outbox, task = host.process(), new_task()
    host.make_rows_unavailable()
    with pytest.raises(ResultsUnavailable, match="kept"):
        await record_and_claim(outbox, task)
    for _ in range(40):
        host.now_s += MAX_BACKOFF_S * 1.3
        with pytest.raises(ResultsUnavailable):
            await outbox.claim(await acquired(outbox))
        await outbox.renew_leases(model_is_ready=True)
    host.restore_rows()
    host.now_s += MAX_BACKOFF_S * 1.3
    attempt = await acquired(outbox)
    assert attempt.task == task
    assert await outbox.claim(attempt) is None


async def test_refused_claim_leaves_no_attempt(host: Host) -> None:
    """The task of another user, or one that another server works on, is not retried."""
    outbox, task = host.process(), new_task()
    await (await host.take_over(task)).close()
    with pytest.raises(TaskInProgress):
        await record_and_claim(outbox, task)
    with pytest.raises(TaskNotFound):
        await record_and_claim(outbox, Task(task.task_id, "user-2", "uploads/user-2/cat", ("cat",)))
    assert host.count_rows() == 0


async def test_claim_of_a_done_task_leaves_no_attempt(host: Host) -> None:
    """A claim of a done task returns its result and removes the attempt."""
    outbox, task = host.process(), new_task()
    await finish(outbox, await record_and_claim(outbox, task))
    attempt = await outbox.record(task, "request-2")
    assert await outbox.claim(attempt) == StoredResult(task.task_id, "mask", ["cat"], METADATA)
    assert host.count_rows() == 0


async def test_lease_of_a_waiting_task_is_renewed(host: Host) -> None:
    """A claimed task that waits holds its row over several leases, and can still be done."""
    outbox = host.process()
    attempt = await record_and_claim(outbox, new_task())
    assert await requeue_for_r2(outbox, attempt)
    for _ in range(5):
        host.now_s += LEASE_S / 2
        # The lease has expired: without its renewal another server could claim the row.
        host._execute("UPDATE segmentation_results SET lease_until_s = 0")
        await outbox.renew_leases(model_is_ready=True)
        row = await host.row(attempt.task.task_id)
        assert (row.status, row.attempt_id) == ("processing", attempt.attempt_id)
        elsewhere = SqliteResults(host.folder / "results.db", LEASE_S)
        with pytest.raises(TaskInProgress):
            await elsewhere.claim(attempt.task, "elsewhere")
        await elsewhere.close()
    again = await acquired(outbox)
    assert again.attempt_id == attempt.attempt_id
    assert await outbox.claim(again) is None
    await finish(outbox, again)
    assert (await host.row(attempt.task.task_id)).status == "done"


@pytest.mark.parametrize("ended_by", ["a failed retry", "the renewal of leases"])
async def test_outage_has_a_limit(host: Host, ended_by: str) -> None:
    """A claimed task that waits longer than the limit ends as an error that names the cause."""
    outbox = host.process()
    attempt = await record_and_claim(outbox, new_task())
    assert await requeue_for_r2(outbox, attempt)
    host.now_s += OUTAGE_LIMIT_S + 1
    if ended_by == "a failed retry":
        again = await acquired(outbox)
        assert not await requeue_for_r2(outbox, again)
        assert await outbox.acquire_waiting() is None  # its process still owns it
        return
    await outbox.renew_leases(model_is_ready=True)
    await outbox.deliver_due()
    row = await host.row(attempt.task.task_id)
    assert row.status == "error"
    assert row.metadata["error_message"] == (
        "the object store does not answer; given up after waiting 15 minutes"
    )
    assert host.count_rows() == 0


async def test_unclaimed_task_waits_across_restarts(host: Host) -> None:
    """A task that could not be claimed waits without a limit, restarts during the outage included."""
    outbox, task = host.process(), new_task()
    host.make_rows_unavailable()
    with pytest.raises(ResultsUnavailable, match="kept"):
        await record_and_claim(outbox, task)
    for _ in range(3):
        outbox = await host.restart()
        for _ in range(5):
            await outbox.renew_leases(model_is_ready=False)
            host.now_s += OUTAGE_LIMIT_S
    host.restore_rows()
    await outbox.renew_leases(model_is_ready=False)
    attempt = await acquired(outbox)
    assert attempt.task == task
    assert await outbox.claim(attempt) is None


async def test_limit_does_not_end_an_acquired_task(host: Host) -> None:
    """The limit ends a waiting task, and not one that a process has just acquired."""
    outbox = host.process()
    attempt = await record_and_claim(outbox, new_task())
    await requeue_for_r2(outbox, attempt)
    host.now_s += OUTAGE_LIMIT_S + 1
    lease = await outbox._attempts.acquire_due_lease(1.0, OUTAGE_LIMIT_S)
    assert lease is not None
    assert lease.is_over_limit
    again = await acquired(outbox)
    await outbox._renew(lease, model_is_ready=True)
    await finish(outbox, again)
    assert (await host.row(attempt.task.task_id)).status == "done"


async def test_abandoned_attempt_of_a_living_process_is_requeued(host: Host) -> None:
    """An attempt that its process owns but no longer works on is retried; an active one is not."""
    outbox = host.process()
    left, at_work = await record_and_claim(outbox, new_task()), await record_and_claim(outbox, new_task())
    await outbox.begin_work(left, None)
    outbox.release(left)
    await outbox.requeue_abandoned()
    again = await acquired(outbox)
    assert (again.attempt_id, again.suspect) == (left.attempt_id, False)
    assert await outbox.acquire_waiting() is None
    await finish(outbox, at_work)


async def test_retry_may_start_before_the_previous_run_is_released(host: Host) -> None:
    """The late release of a previous run does not end the ownership of the current one."""
    outbox = host.process()
    first = await record_and_claim(outbox, new_task())
    await die_during_work(host, outbox, [first], "runner")
    second = await acquired(outbox)
    outbox.release(first)
    await outbox.requeue_abandoned()
    assert await outbox.acquire_waiting() is None
    outbox.release(second)
    await outbox.requeue_abandoned()
    assert (await acquired(outbox)).attempt_id == first.attempt_id


async def test_waiting_task_that_was_taken_over_is_removed(host: Host) -> None:
    """A waiting task whose row another server has claimed is left to that server."""
    outbox = host.process()
    attempt = await record_and_claim(outbox, new_task())
    await requeue_for_r2(outbox, attempt)
    elsewhere = await host.take_over(attempt.task)
    host.now_s += LEASE_S
    await outbox.renew_leases(model_is_ready=True)
    assert host.count_rows() == 0
    assert (await host.row(attempt.task.task_id)).attempt_id == "elsewhere"
    await elsewhere.close()


async def test_each_waiting_attempt_is_acquired_once(host: Host) -> None:
    """Of 30 waiting attempts, four processes that acquire at the same time get each exactly once."""
    first = host.process()
    tasks = [new_task() for _ in range(30)]
    for task in tasks:
        await record_and_claim(first, task)
    await host.restart()
    processes = [host.process() for _ in range(4)]

    async def acquire_all(outbox: Outbox) -> list[str]:
        found = []
        while (attempt := await outbox.acquire_waiting()) is not None:
            found.append(attempt.task.task_id)
        return found

    found = [task_id for each in await asyncio.gather(*map(acquire_all, processes)) for task_id in each]
    assert Counter(found) == Counter(task.task_id for task in tasks)
