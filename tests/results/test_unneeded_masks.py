"""The list of stored masks that no row refers to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from results import TaskNotFound
from results.unneeded_masks import DELETE_AFTER_S
from tests.results.outbox_host import finish, new_task, record_and_claim, requeue_for_r2

if TYPE_CHECKING:
    from tests.results.outbox_host import Host

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("end", ["done", "error", "row deleted", "done by another"])
async def test_unreferenced_masks_are_to_be_deleted(host: Host, end: str) -> None:
    """Stored masks to which the row does not refer are listed for deletion, whatever the end."""
    outbox, task = host.process(), new_task()
    attempt = await record_and_claim(outbox, task)
    await outbox.begin_storing(attempt, ["masks/first.png"])  # by an earlier run, which was killed
    await outbox.begin_storing(attempt, ["masks/second.png"])
    unneeded = {"masks/first.png", "masks/second.png"}
    if end == "done":
        await finish(outbox, attempt, "masks/second.png")
        unneeded = {"masks/first.png"}
    elif end == "error":
        await outbox.end_as_error(attempt, "no")
    elif end == "row deleted":
        host.delete_row(task.task_id)
        with pytest.raises(TaskNotFound):
            await finish(outbox, attempt, "masks/second.png")
    else:
        elsewhere = await host.take_over(task)
        await elsewhere.update_result(
            task.task_id, "https://x/masks/second.png", [], {}, attempt_id="elsewhere"
        )
        await elsewhere.close()
        await requeue_for_r2(outbox, attempt)
        assert await outbox.claim(attempt) is not None
        unneeded = {"masks/first.png"}
    assert await outbox.acquire_unneeded_mask() is None  # its upload may still arrive
    host.now_s += DELETE_AFTER_S
    found = set()
    while (key := await outbox.acquire_unneeded_mask()) is not None:
        found.add(key)
        await outbox.remove_unneeded_mask(key)
    assert found == unneeded
    assert host.count_rows("unneeded_masks") == 0


@pytest.mark.parametrize("answer", ["its own", "another attempt's"])
async def test_files_named_only_in_the_stored_answer_are_kept(host: Host, answer: str) -> None:
    """A row that names the attempt's stored answer needs all of its files: the answer names the others."""
    outbox, task = host.process(), new_task()
    attempt = await record_and_claim(outbox, task)
    stored = {"masks/0-mask.png", "masks/instance-1-a.png", "masks/answer-a.json"}
    await outbox.begin_storing(attempt, sorted(stored))
    key = "masks/answer-a.json" if answer == "its own" else "masks/answer-b.json"
    elsewhere = await host.take_over(task)
    await elsewhere.update_result(
        task.task_id,
        "https://x/masks/0-mask.png",
        [],
        {"answer_url": f"https://x/{key}"},
        attempt_id="elsewhere",
    )
    await elsewhere.close()
    await requeue_for_r2(outbox, attempt)
    assert await outbox.claim(attempt) is not None
    host.now_s += DELETE_AFTER_S
    found = set()
    while (unneeded := await outbox.acquire_unneeded_mask()) is not None:
        found.add(unneeded)
        await outbox.remove_unneeded_mask(unneeded)
    assert found == (set() if answer == "its own" else stored - {"masks/0-mask.png"})


async def test_mask_that_could_not_be_deleted_is_due_again(host: Host) -> None:
    """A mask is due again after a pause until it is removed from the list."""
    outbox = host.process()
    attempt = await record_and_claim(outbox, new_task())
    await outbox.begin_storing(attempt, ["masks/a.png"])
    await outbox.end_as_error(attempt, "no")
    for _ in range(3):
        host.now_s += 61
        assert await outbox.acquire_unneeded_mask() == "masks/a.png"
        assert await outbox.acquire_unneeded_mask() is None
