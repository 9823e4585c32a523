"""The list of given-up tasks: how a task gets on it, and what ends its entry."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from prometheus_client import REGISTRY

from results.given_up import MAX_EXCLUSIVE_DEATHS
from tests.results.outbox_host import acquired, die_during_work, give_up, new_task, record_and_claim

if TYPE_CHECKING:
    from tests.results.outbox_host import Death, Host

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("death", ["runner", "server"])
async def test_task_that_kills_processes_is_given_up(host: Host, death: Death) -> None:
    """A task whose every run kills a process ends as an error, and is on the list of given-up tasks."""
    task, outbox = new_task(), host.process()
    outbox = await die_during_work(host, outbox, [await record_and_claim(outbox, task)], death)
    for _ in range(MAX_EXCLUSIVE_DEATHS):
        attempt = await acquired(outbox)
        assert attempt.suspect
        assert await outbox.claim(attempt) is None
        outbox = await die_during_work(host, outbox, [attempt], death)
    assert await outbox.acquire_waiting() is None
    await outbox.deliver_due()
    row = await host.row(task.task_id)
    assert row.status == "error"
    assert str(row.metadata["error_message"]).startswith("the server's process stopped 3 times")
    assert host.count_rows() == 0
    known = await outbox.find_given_up(task)
    assert known is not None
    assert (known.image_sha256, known.error_message) == ("sha", row.metadata["error_message"])


async def test_given_up_task_is_allowed_after_a_change(host: Host) -> None:
    """Other prompts, another server version or the operator's removal end an entry of the list."""
    tasks = [new_task() for _ in range(4)]
    for task in tasks:
        outbox = await give_up(host, task)
        assert await outbox.find_given_up(task) is not None
    assert await outbox.find_given_up(replace(tasks[0], prompts=("dog",))) is None
    assert await outbox.find_given_up(tasks[0]) is None
    # An image is identified by its bytes, not by its URL, whose signature changes.
    assert await outbox.find_given_up(replace(tasks[1], source_image_url="uploads/user-1/dog")) is not None
    await outbox.remove_given_up(tasks[2].task_id)
    assert await outbox.find_given_up(tasks[2]) is None
    assert await outbox.find_given_up(replace(tasks[3], user_id="user-2")) is None
    assert await outbox.find_given_up(tasks[3]) is not None
    host.version = "2"
    assert await host.process().find_given_up(tasks[3]) is None


async def test_given_up_tasks_are_a_metric(host: Host) -> None:
    """sam3_tasks_given_up counts the list of given-up tasks."""
    outbox = await give_up(host, task := new_task())
    assert REGISTRY.get_sample_value("sam3_tasks_given_up") == 1
    await outbox.remove_given_up(task.task_id)
    await outbox.deliver_due()
    assert REGISTRY.get_sample_value("sam3_tasks_given_up") == 0
