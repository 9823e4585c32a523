"""Process deaths during work: suspects, and their exclusive work."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from results import ResultsUnavailable
from results.attempt_file import AttemptFile
from tests.results.outbox_host import (
    OUTAGE_LIMIT_S,
    acquired,
    die_during_work,
    finish,
    new_task,
    record_and_claim,
    requeue_for_r2,
)
from tests.services.processes import wait_until

if TYPE_CHECKING:
    from results import Attempt, Outbox
    from tests.results.outbox_host import Host

pytestmark = pytest.mark.anyio


async def test_suspect_may_wait_longer_than_the_limit(host: Host) -> None:
    """While the model is ready, a task that only waits for its exclusive work has no limit."""
    outbox = host.process()
    attempts = [await record_and_claim(outbox, new_task()) for _ in range(2)]
    await die_during_work(host, outbox, attempts, "runner")
    for _ in range(5):
        await outbox.renew_leases(model_is_ready=True)
        host.now_s += OUTAGE_LIMIT_S / 2
    await outbox.renew_leases(model_is_ready=False)
    host.now_s += OUTAGE_LIMIT_S + 1
    assert host.count_rows() == 2
    await outbox.renew_leases(model_is_ready=False)  # the model is not ready: that wait has a limit
    await outbox.deliver_due()
    assert host.count_rows() == 0


async def test_undelivered_suspect_does_not_block_the_next(host: Host) -> None:
    """The next suspect is acquired when the work of the former is over, delivered or not."""
    outbox = host.process()
    attempts = [await record_and_claim(outbox, new_task()) for _ in range(2)]
    await die_during_work(host, outbox, attempts, "runner")
    first = await acquired(outbox)
    await outbox.claim(first)
    host.make_rows_unavailable()
    await finish(outbox, first)
    assert (await acquired(outbox)).attempt_id != first.attempt_id
    host.restore_rows()


async def test_only_the_task_that_kills_is_given_up(host: Host) -> None:
    """Of ten tasks at work when a server dies, nine are done, and the one that kills is given up."""
    outbox = host.process()
    attempts = [await record_and_claim(outbox, new_task()) for _ in range(10)]
    killer = attempts[0].task.task_id
    outbox = await die_during_work(host, outbox, attempts, "server")
    for _ in range(100):
        attempt = await outbox.acquire_waiting()
        if attempt is None:
            break
        assert await outbox.acquire_waiting() is None  # one suspect at a time
        if attempt.task.task_id == killer:
            outbox = await die_during_work(host, outbox, [attempt], "server")
            continue
        await outbox.claim(attempt)
        await outbox.begin_work(attempt, "sha")
        await finish(outbox, attempt)
    await outbox.deliver_due()
    assert host.count_rows() == 0
    statuses = {each.task.task_id: (await host.row(each.task.task_id)).status for each in attempts}
    assert statuses.pop(killer) == "error"
    assert set(statuses.values()) == {"done"}


async def test_death_counts_only_during_work(host: Host) -> None:
    """A task that awaits its image, or stores its masks, is no suspect when the server dies."""
    outbox = host.process()
    waiting, storing = await record_and_claim(outbox, new_task()), await record_and_claim(outbox, new_task())
    await outbox.begin_work(storing, None)
    await outbox.begin_storing(storing, ["masks/a.png"])
    outbox = await host.restart()
    assert {(await acquired(outbox)).suspect for _ in (waiting, storing)} == {False}


async def test_death_after_the_stop_signal_does_not_count(host: Host) -> None:
    """No task is a suspect when a server is killed after its stop signal."""
    outbox = host.process()
    attempt = await record_and_claim(outbox, new_task())
    await outbox.begin_work(attempt, None)
    late = await record_and_claim(outbox, new_task())
    await outbox.prepare_stop()
    assert await outbox.begin_work(late, None)  # allowed, but not recorded
    successor = await host.restart()
    assert not any([(await acquired(successor)).suspect for _ in range(2)])


async def test_suspect_does_not_work_in_a_stopping_process(host: Host) -> None:
    """A suspect waits for the next start: a stopping process may be killed at any moment."""
    outbox = host.process()
    await die_during_work(host, outbox, [await record_and_claim(outbox, new_task())], "runner")
    suspect = await acquired(outbox)
    await outbox.prepare_stop()
    assert not await outbox.begin_work(suspect, "sha")


async def start_blocked_work(outbox: Outbox, attempt: Attempt) -> asyncio.Task[bool]:
    """A running `begin_work` that the file has refused once; it is done when it was not refused."""
    beginning = asyncio.create_task(outbox.begin_work(attempt, "sha"))
    await asyncio.to_thread(wait_until, lambda: beginning.done() or outbox.has_blocked_attempts())
    return beginning


async def test_work_of_a_waiting_attempt_does_not_begin(host: Host) -> None:
    """Late work of an attempt that already waits is not recorded, and so does not block a suspect."""
    outbox = host.process()
    attempt = await record_and_claim(outbox, new_task())
    await requeue_for_r2(outbox, attempt)
    late = await start_blocked_work(outbox, attempt)
    assert not late.done()
    late.cancel()
    await die_during_work(host, outbox, [await record_and_claim(outbox, new_task())], "runner")
    await asyncio.wait_for(outbox.begin_work(await acquired(outbox), "sha"), 5)


async def test_suspect_works_exclusively(host: Host) -> None:
    """A suspect begins when no other work is in progress in any process; then no other begins."""
    first, second = host.process(), host.process()
    await die_during_work(host, first, [await record_and_claim(first, new_task())], "runner")
    busy, fresh = await record_and_claim(second, new_task()), await record_and_claim(second, new_task())
    await second.begin_work(busy, None)
    suspect = await acquired(first)
    beginning = await start_blocked_work(first, suspect)
    assert not beginning.done()  # other work is in progress
    assert not second.has_blocked_attempts()
    follower = await start_blocked_work(second, fresh)
    assert not follower.done()  # the suspect has precedence
    assert second.has_blocked_attempts()
    await second.begin_storing(busy, [])
    await beginning
    assert not follower.done()  # the suspect works exclusively
    await first.begin_storing(suspect, [])
    await follower
    assert not second.has_blocked_attempts()


async def test_other_work_is_never_beside_a_suspect(host: Host) -> None:
    """A suspect waits for the work of no task in every process, and that waits for the suspect."""
    first, second = host.process(), host.process()
    await die_during_work(host, first, [await record_and_claim(first, new_task())], "runner")
    for work_id in ("direct", "as well"):
        await second.begin_other_work(work_id)
    await second.end_other_work("as well")
    suspect = await acquired(first)
    beginning = await start_blocked_work(first, suspect)
    follower = asyncio.create_task(second.begin_other_work("later"))
    await asyncio.sleep(0)
    assert not beginning.done()
    await second.end_other_work("direct")
    await asyncio.wait_for(beginning, 5)
    assert not follower.done()  # the suspect had precedence, and works
    await first.begin_storing(suspect, [])
    await asyncio.wait_for(follower, 5)


async def test_other_work_of_a_dead_process_is_over(host: Host) -> None:
    """A suspect does not wait for the work of a process that has died."""
    first, second = host.process(), host.process()
    await second.begin_other_work("direct")
    host.alive.remove("process 1")
    await die_during_work(host, first, [await record_and_claim(first, new_task())], "runner")
    await first.requeue_abandoned()
    suspect = await acquired(first)
    assert await asyncio.wait_for(first.begin_work(suspect, "sha"), 5)


async def test_end_of_other_work_is_repeated(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the file did not accept, for instance since its disk was full, blocks no suspect for ever."""
    outbox = host.process()
    await outbox.begin_other_work("direct")

    async def refuse(*_: object) -> None:
        raise ResultsUnavailable("the disk is full")

    with monkeypatch.context() as full:
        full.setattr(AttemptFile, "end_other_work", refuse)
        await outbox.end_other_work("direct")
    await outbox.requeue_abandoned()
    await die_during_work(host, outbox, [await record_and_claim(outbox, new_task())], "runner")
    assert await asyncio.wait_for(outbox.begin_work(await acquired(outbox), "sha"), 5)
