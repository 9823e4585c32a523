"""The delivery of outcomes to the rows, also after an outage of the rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from prometheus_client import REGISTRY

from results import AttemptLost, MetadataInvalid
from results.attempt_file import MAX_BACKOFF_S
from results.unneeded_masks import DELETE_AFTER_S
from tests.results.outbox_host import METADATA, acquired, finish, new_task, record_and_claim, requeue_for_r2

if TYPE_CHECKING:
    from tests.results.outbox_host import Host

pytestmark = pytest.mark.anyio


async def test_settled_task_leaves_no_attempt(host: Host) -> None:
    """A settled row's attempt is removed from the file."""
    outbox = host.process()
    done, failed = await record_and_claim(outbox, new_task()), await record_and_claim(outbox, new_task())
    assert host.count_rows() == 2
    await finish(outbox, done)
    await outbox.end_as_error(failed, "no")
    assert (await host.row(done.task.task_id)).status == "done"
    assert (await host.row(failed.task.task_id)).metadata["error_message"] == "no"
    assert host.count_rows() == 0


@pytest.mark.parametrize("status", ["done", "error"])
async def test_outcome_is_delivered_when_the_rows_return(host: Host, status: str) -> None:
    """Unavailable rows raise no error at the end of an attempt; the outcome is delivered later."""
    outbox = host.process()
    attempt = await record_and_claim(outbox, new_task())
    host.make_rows_unavailable()
    if status == "done":
        await finish(outbox, attempt)
    else:
        await outbox.end_as_error(attempt, "corrupt")
    host.restore_rows()
    assert (await host.row(attempt.task.task_id)).status == "processing"
    host.now_s += 2
    await outbox.deliver_due()
    row = await host.row(attempt.task.task_id)
    assert (row.status, row.mask_url) == (status, "mask" if status == "done" else None)
    assert row.metadata == (METADATA if status == "done" else {"error_message": "corrupt"})
    assert host.count_rows() == 0


async def test_delivery_backs_off(host: Host) -> None:
    """While the rows are unavailable, an outcome is retried with a growing backoff, without a limit."""
    outbox = host.process()
    attempt = await record_and_claim(outbox, new_task())
    host.make_rows_unavailable()
    await finish(outbox, attempt)
    for _ in range(20):
        host.now_s += MAX_BACKOFF_S * 1.3
        await outbox.deliver_due()
    host.restore_rows()
    host.now_s += 2  # the first backoff has passed, the latest has not
    await outbox.deliver_due()
    assert (await host.row(attempt.task.task_id)).status == "processing"
    host.now_s += MAX_BACKOFF_S * 1.3
    await outbox.deliver_due()
    assert (await host.row(attempt.task.task_id)).status == "done"


async def test_outcome_of_a_lost_attempt_is_discarded(host: Host) -> None:
    """A late outcome does not change the successor's row, and its mask is deleted."""
    outbox, task = host.process(), new_task()
    attempt = await record_and_claim(outbox, task)
    await outbox.begin_storing(attempt, ["late mask"])
    host.make_rows_unavailable()
    await finish(outbox, attempt, "late mask")
    host.restore_rows()
    elsewhere = await host.take_over(task)
    await elsewhere.update_result(task.task_id, "mask", [], {}, attempt_id="elsewhere")
    await elsewhere.close()
    host.now_s += 2
    await outbox.deliver_due()
    assert (await host.row(task.task_id)).mask_url == "mask"
    assert host.count_rows() == 0
    host.now_s += DELETE_AFTER_S
    assert await outbox.acquire_unneeded_mask() == "late mask"


async def test_lost_attempt_raises(host: Host) -> None:
    """Ending an attempt whose row was taken over raises AttemptLost, and removes the attempt."""
    outbox, task = host.process(), new_task()
    attempt = await record_and_claim(outbox, task)
    await (await host.take_over(task)).close()
    with pytest.raises(AttemptLost):
        await finish(outbox, attempt)
    assert host.count_rows() == 0


async def test_refused_outcome_does_not_block_others(host: Host) -> None:
    """A row that refuses its update delays only its own outcome."""
    outbox = host.process()
    attempts = [await record_and_claim(outbox, new_task()) for _ in range(4)]
    host.make_rows_unavailable()
    for attempt in attempts:
        await finish(outbox, attempt)
    host.restore_rows()
    host.reject_updates(attempts[0].task.task_id)
    host.now_s += 2
    await outbox.deliver_due()
    statuses = [(await host.row(attempt.task.task_id)).status for attempt in attempts]
    assert statuses == ["processing"] + ["done"] * 3
    assert host.count_rows() == 1


async def test_stop_delivers_outcomes(host: Host) -> None:
    """A stop delivers every outcome that the rows accept, due or not."""
    outbox = host.process()
    attempts = [await record_and_claim(outbox, new_task()) for _ in range(30)]
    host.make_rows_unavailable()
    for attempt in attempts:
        await finish(outbox, attempt)
    host.restore_rows()
    await host.stop(outbox)
    assert {(await host.row(attempt.task.task_id)).status for attempt in attempts} == {"done"}
    assert host.count_rows() == 0


async def test_stop_keeps_the_outcome_while_the_rows_are_unavailable(host: Host) -> None:
    """The next start delivers what a stop could not deliver."""
    outbox = host.process()
    attempt = await record_and_claim(outbox, new_task())
    host.make_rows_unavailable()
    await finish(outbox, attempt)
    await host.stop(outbox)
    host.restore_rows()
    successor = await host.restart()
    await successor.deliver_due()
    assert (await host.row(attempt.task.task_id)).status == "done"


async def test_metadata_must_be_json(host: Host) -> None:
    """NaN is refused before anything is written; the attempt may still end as an error."""
    outbox = host.process()
    attempt = await record_and_claim(outbox, new_task())
    with pytest.raises(MetadataInvalid):
        await outbox.update_result(attempt, "mask", [], {"score": float("nan")}, [])
    await outbox.end_as_error(attempt, "no")
    assert (await host.row(attempt.task.task_id)).status == "error"


async def test_undelivered_and_waiting_are_metrics(host: Host) -> None:
    """sam3_outbox_depth counts undelivered outcomes, sam3_tasks_waiting waiting tasks."""
    outbox = host.process()
    attempts = [await record_and_claim(outbox, new_task()) for _ in range(3)]
    kept = await record_and_claim(outbox, new_task())
    await requeue_for_r2(outbox, kept)
    host.make_rows_unavailable()
    for attempt in attempts:
        await finish(outbox, attempt)
    await outbox.deliver_due()
    assert REGISTRY.get_sample_value("sam3_outbox_depth") == 3
    assert REGISTRY.get_sample_value("sam3_tasks_waiting") == 1
    host.restore_rows()
    host.now_s += MAX_BACKOFF_S
    await finish(outbox, await acquired(outbox))
    await outbox.deliver_due()
    assert REGISTRY.get_sample_value("sam3_outbox_depth") == 0
    assert REGISTRY.get_sample_value("sam3_tasks_waiting") == 0
