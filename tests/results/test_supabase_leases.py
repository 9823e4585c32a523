"""Leases of the Supabase store under edits by users and wrong clocks, with the columns and without."""

from __future__ import annotations

import math
import time
from datetime import datetime, timedelta, tzinfo
from typing import TYPE_CHECKING, Self
from uuid import uuid4

import pytest

from results import (
    AlreadySettled,
    AttemptLost,
    Claim,
    StoredResult,
    Task,
    TaskInProgress,
    TaskNotFound,
)
from results.supabase import SupabaseResults, _Table
from results.supabase_leases import MetadataLeases
from tests.results.claims import MASK_URL, METADATA, claimed, finish

if TYPE_CHECKING:
    from tests.results.supabase_project import Project

pytestmark = pytest.mark.anyio

LEASE_S = 120.0
NOT_FINISHED = "not finished in time"


async def retry_after_s(store: SupabaseResults, task: Task) -> float:
    """The wait that a refused claim names."""
    with pytest.raises(TaskInProgress) as raised:
        await claimed(store, task)
    return raised.value.retry_after_s


def older_server(project: Project) -> SupabaseResults:
    """A server from before the columns of leases, on a table that has them."""
    store = project.open()
    store._known_table = _Table("mask_image_url", MetadataLeases(store._rest, LEASE_S))
    return store


def set_our_clock(monkeypatch: pytest.MonkeyPatch, ahead_s: float) -> None:
    """Set this process's wall clock wrong."""
    right = time.time

    class Wrong(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return super().now(tz) + timedelta(seconds=ahead_s)

    monkeypatch.setattr(time, "time", lambda: right() + ahead_s)
    for module in ("supabase", "supabase_rest", "supabase_leases"):
        monkeypatch.setattr(f"results.{module}.datetime", Wrong, raising=False)


async def test_start_warns_of_missing_columns(project: Project, old: Project) -> None:
    """Without the columns of leases the start warns, and names the migration that adds them."""
    assert await project.open().check() == []
    [warning] = await old.open().check()
    assert "20261126000001_leases.sql" in warning


async def test_life_of_a_task(either: Project) -> None:
    """Claim, refusal, renewal, takeover, failure and result are the same with and without the columns."""
    store, second, task = either.open(), either.open(), either.new_task()
    claim = await claimed(store, task)
    assert await retry_after_s(second, task) == pytest.approx(LEASE_S, abs=3)
    either.make_older(task, 60)
    assert await retry_after_s(second, task) == pytest.approx(LEASE_S - 60, abs=3)
    assert await second.claim(task, claim.attempt_id) == claim
    assert await retry_after_s(second, task) == pytest.approx(LEASE_S, abs=3)
    either.make_older(task, LEASE_S + 3)
    taken = await claimed(second, task)
    with pytest.raises(AttemptLost) as raised:
        await finish(store, claim)
    assert not isinstance(raised.value, AlreadySettled)
    for _ in range(2):
        await second.update_status(task.task_id, "error", attempt_id=taken.attempt_id, error_message="no")
    last = await claimed(store, task)
    for _ in range(2):
        await finish(store, last)
    assert either.row(task)[:3] == ("done", MASK_URL, ["cat"])
    stored = StoredResult(task.task_id, MASK_URL, ["cat"], METADATA)
    assert await second.claim(task, str(uuid4())) == stored


@pytest.mark.parametrize("ahead_s", [600.0, -3600.0])
async def test_wall_clock_does_not_change_leases(
    either: Project, monkeypatch: pytest.MonkeyPatch, ahead_s: float
) -> None:
    """Setting this host's wall clock ends no lease and extends none."""
    store, task, stale = either.open(), either.new_task(), either.new_task()
    await claimed(store, task)
    await claimed(store, stale)
    either.make_older(stale, LEASE_S + 300)
    set_our_clock(monkeypatch, ahead_s)
    assert await retry_after_s(store, task) == pytest.approx(LEASE_S, abs=3)
    await store.end_stale(2 * LEASE_S)
    assert [either.row(task)[0], either.row(stale)[0]] == ["processing", "error"]
    either.make_older(task, LEASE_S + 3)
    await claimed(store, task)


async def test_old_clock_reading_is_refreshed(old: Project) -> None:
    """An old or missing reading of the database's clock is refreshed before it is used."""
    store, task = old.open(), old.new_task()
    await claimed(store, task)
    for ahead_s in (None, 600.0, -3600.0):
        store._rest._clock_read_s = -math.inf
        store._rest._clock_offset_s = (
            None if ahead_s is None else (store._rest._clock_offset_s or 0.0) + ahead_s
        )
        assert await retry_after_s(store, task) == pytest.approx(LEASE_S, abs=3)
        store._rest._clock_read_s = -math.inf
        await store.end_stale(LEASE_S)
        assert old.row(task)[0] == "processing"


async def test_each_row_has_its_own_lease(project: Project) -> None:
    """Servers with different lease times on one table respect each other's leases."""
    long, short, task = project.open(lease_s=3600.0), project.open(lease_s=10.0), project.new_task()
    claim = await claimed(long, task)
    project.make_older(task, 600)
    assert await retry_after_s(short, task) == pytest.approx(3000, abs=3)
    await short.end_stale(20)
    assert project.row(task)[0] == "processing"
    await finish(long, claim)
    other = project.new_task()
    await claimed(short, other)
    project.make_older(other, 11)
    await claimed(long, other)


ANOTHER_ATTEMPT = "7a1b4f0e-2d53-4c6e-9a55-0f6f0c7d3b18"
EDITS: list[dict[str, object]] = [
    {"metadata": {}},
    {"metadata": {"attempt": ANOTHER_ATTEMPT}},
    {"metadata": {"note": "mine"}, "labels": ["mine"], "mask_image_url": "mine"},
    {"status": "error"},
    {"status": "pending", "metadata": {}},
    {"status": "processing", "metadata": {"attempt": ANOTHER_ATTEMPT}},
    {"status": "done", "mask_image_url": "mine"},
]


@pytest.mark.parametrize("edit", EDITS, ids=str)
async def test_edit_during_the_work_is_overwritten(project: Project, edit: dict[str, object]) -> None:
    """Whatever a user writes to a row in processing, the row ends with the task's outcome."""
    store, good, bad = project.open(), project.new_task(), project.new_task()
    claims = [await claimed(store, task) for task in (good, bad)]
    for task in (good, bad):
        project.edit_as_user(task, **edit)
    await finish(store, claims[0])
    await store.update_status(bad.task_id, "error", attempt_id=claims[1].attempt_id, error_message="corrupt")
    assert project.row(good) == ("done", MASK_URL, ["cat"], METADATA)
    assert project.row(bad) == ("error", None, [], {"error_message": "corrupt"})


async def test_edited_row_of_a_dead_server_ends(either: Project) -> None:
    """A dead server's row whose metadata its user has removed ends as an error."""
    store, task = either.open(), either.new_task()
    await claimed(store, task)
    either.edit_as_user(task, metadata={})
    either.make_older(task, 1000)
    await store.end_stale(LEASE_S)
    status, _, _, metadata = either.row(task)
    assert status == "error"
    assert NOT_FINISHED in metadata["error_message"]


@pytest.mark.parametrize(
    "edit", [{"metadata": {"note": "mine"}}, {"labels": ["mine"]}, {"status": "error"}], ids=str
)
async def test_edit_after_the_end_is_kept(either: Project, edit: dict[str, object]) -> None:
    """A repeated write to a row that its user has edited raises AlreadySettled, and keeps the edit."""
    store, task = either.open(), either.new_task()
    claim = await claimed(store, task)
    await finish(store, claim)
    either.edit_as_user(task, **edit)
    before = either.row(task)
    with pytest.raises(AlreadySettled):
        await finish(store, claim)
    assert either.row(task) == before


async def test_deleted_row_is_not_found(either: Project) -> None:
    """A missing row raises TaskNotFound, not AttemptLost."""
    with pytest.raises(TaskNotFound):
        await finish(either.open(), Claim(str(uuid4()), str(uuid4())))


async def test_end_stale_ends_expired_tasks(either: Project) -> None:
    """Tasks with an expired lease end as errors, whoever claimed them; others stay."""
    store = either.open()
    stale, fresh, foreign = (either.new_task() for _ in range(3))
    await claimed(store, stale)
    await claimed(store, fresh)
    either.edit_as_user(foreign, status="processing")
    for task in (stale, foreign):
        either.make_older(task, 15 * 60 + 700)
    assert await store.end_stale(600) == 2
    for task in (stale, foreign):
        status, _, _, metadata = either.row(task)
        assert status == "error"
        assert NOT_FINISHED in metadata["error_message"]
    assert either.row(fresh)[0] == "processing"
    assert await store.end_stale(600) == 0


async def test_end_stale_respects_the_grace_time(either: Project) -> None:
    """A task whose lease expired within the grace time stays."""
    store, task = either.open(), either.new_task()
    await claimed(store, task)
    either.make_older(task, LEASE_S + 200)
    await store.end_stale(240)
    assert either.row(task)[0] == "processing"
    either.make_older(task, 50)
    await store.end_stale(240)
    assert either.row(task)[0] == "error"


async def test_late_result_is_stored_after_end_stale(either: Project) -> None:
    """A result that comes after `end_stale` is stored, unless another attempt has claimed the row."""
    store = either.open()
    late, taken = either.new_task(), either.new_task()
    claims = [await claimed(store, task) for task in (late, taken)]
    for task in (late, taken):
        either.make_older(task, 1000)
    assert await store.end_stale(600) == 2
    await claimed(store, taken)
    await finish(store, claims[0])
    with pytest.raises(AttemptLost):
        await finish(store, claims[1])
    assert [either.row(task)[0] for task in (late, taken)] == ["done", "processing"]
    await finish(store, claims[0])


STALE = {"status": "'processing'", "updated_at": "now() - interval '2000 seconds'"}
FORGED = {
    "large": "jsonb_build_object('attempt', repeat('x', 200000))",
    "hostile": """jsonb_build_object('attempt', E'"),\\\\\\x01status.eq.done&')""",
    "object": """'{"attempt": {"deep": [1]}}'""",
    "none": "'{}'",
    "no object": "'[1, null]'",
    "of an id's length": "jsonb_build_object('attempt', repeat('\u732b', 36))",
    "an id": "jsonb_build_object('attempt', gen_random_uuid())",
}


@pytest.mark.parametrize("metadata", FORGED.values(), ids=FORGED.keys())
async def test_forged_rows_end(old: Project, metadata: str) -> None:
    """Forged rows end together with the others in one call, whatever their number and size."""
    store, task = old.open(), old.new_task()
    await claimed(store, task)
    old.make_older(task, 1000)
    old.insert_forged(task.user_id, {**STALE, "metadata": metadata}, 120)
    assert await store.end_stale(600) == 121
    assert old.row(task)[0] == "error"
    assert max(len(request.path) for request in old.proxy.requests) < 1000


async def test_forged_rows_end_with_the_columns(project: Project) -> None:
    """Rows that a user inserts as `processing` end after 15 minutes, all in one update."""
    store, task = project.open(), project.new_task()
    await claimed(store, task)
    project.make_older(task, 1000)
    row = {"user_id": task.user_id, "source_image_url": "", "text_prompt": "", "status": "processing"}
    rows = [{**row, "metadata": {"attempt": "x" * 200_000}}, *[{**row, "metadata": {}}] * 500]
    jwt = project.database.user_jwt(task.user_id)
    project.database.request("POST", "segmentation_results", jwt=jwt, json=rows).raise_for_status()
    assert await store.end_stale(600) == 1
    project.database.execute(
        f"""set session_replication_role = replica; update segmentation_results
        set lease_until = lease_until - interval '2000 seconds' where user_id = '{task.user_id}'"""  # noqa: S608
    )
    before = len(project.proxy.requests)
    assert await store.end_stale(600) == 501
    assert [request.method for request in project.proxy.requests[before:]] == ["GET", "PATCH"]


async def test_row_that_cannot_be_ended_does_not_block_others(
    old: Project, caplog: pytest.LogCaptureFixture
) -> None:
    """Of 60 stale rows, the 52 that the database refuses to change stay, and the others end."""
    store, task = old.open(), old.new_task()
    stale = {**STALE, "metadata": "jsonb_build_object('attempt', gen_random_uuid())"}
    old.insert_forged(task.user_id, {**stale, "labels": "'[\"refused\"]'"}, 52)
    old.insert_forged(task.user_id, stale, 8)
    old.database.execute(
        """create function refuse() returns trigger language plpgsql as $$
        begin raise exception 'refused'; end $$;
        create trigger refuse before update on segmentation_results for each row
        when (old.labels = '["refused"]') execute function refuse()"""
    )
    try:
        assert await store.end_stale(600) == 8
    finally:
        old.database.execute("drop trigger refuse on segmentation_results; drop function refuse()")
    assert "could not be ended" in caplog.text
    assert await store.end_stale(600) == 52


TIMES = ["'infinity'", "'-infinity'", "'9999-12-31'", "'20000-01-01'", "'0044-03-15 BC'", "now() + '1 day'"]


@pytest.mark.parametrize("updated_at", TIMES)
async def test_forged_time_gives_no_lease(old: Project, updated_at: str) -> None:
    """A row with a forged time can be claimed, and is ended as stale."""
    store, task = old.open(), old.new_task()
    old.database.execute("delete from segmentation_results where id = %s", task.task_id)
    forged = {"status": "'processing'", "updated_at": updated_at}
    old.insert_forged(task.user_id, {**forged, "id": f"'{task.task_id}'"})
    await finish(store, await claimed(store, task))
    old.insert_forged(task.user_id, forged)
    assert await store.end_stale(600) == 1


async def test_refuse_ends_only_a_pending_task(either: Project) -> None:
    """Only the user's own pending row ends as an error; a missing one is no error."""
    store = either.open()
    pending, busy, done = (either.new_task() for _ in range(3))
    await claimed(store, busy)
    await finish(store, await claimed(store, done))
    before = either.row(busy), either.row(done)
    for task in (pending, busy, done):
        await store.refuse(task, "given up")
        stranger = Task(task.task_id, str(uuid4()), task.source_image_url, task.prompts)
        await store.refuse(stranger, "of another")
    await store.refuse(Task(str(uuid4()), "user-1", "uploads/user-1/cat", ("cat",)), "no UUID")
    assert either.row(pending) == ("error", None, [], {"error_message": "given up"})
    assert (either.row(busy), either.row(done)) == before
    await finish(store, await claimed(store, pending))


async def test_older_server_beside_a_new_one(project: Project) -> None:
    """A server from before the columns holds a row for 15 minutes, and can settle it."""
    store, older, task = project.open(), older_server(project), project.new_task()
    claim = await claimed(older, task)
    assert await retry_after_s(store, task) == pytest.approx(900, abs=3)
    await finish(older, claim)
    assert project.row(task)[0] == "done"
    assert isinstance(await store.claim(task, str(uuid4())), StoredResult)


async def test_attempt_of_an_older_server_continues_after_its_update(project: Project) -> None:
    """A task that was claimed before a server's update is claimed again and settled after it."""
    store, older = project.open(), older_server(project)
    tasks = [project.new_task() for _ in range(2)]
    claims = [await claimed(older, task) for task in tasks]
    assert await store.claim(tasks[0], claims[0].attempt_id) == claims[0]
    for task, claim in zip(tasks, claims, strict=True):
        await finish(store, claim)
        assert project.row(task)[0] == "done"


async def test_takeover_by_an_older_server(project: Project) -> None:
    """After an older server has taken over, the previous attempt is lost, of whichever kind it was."""
    store, older = project.open(), older_server(project)
    for first in (store, older):
        task = project.new_task()
        claim = await claimed(first, task)
        project.make_older(task, LEASE_S + 3)
        taken = await claimed(older, task)
        with pytest.raises(AttemptLost):
            await finish(store, claim)
        await finish(store, taken)


async def test_takeover_from_an_older_server(project: Project) -> None:
    """After 15 minutes a new server can claim an older server's row, whose late write is refused."""
    store, older, task = project.open(), older_server(project), project.new_task()
    claim = await claimed(older, task)
    project.make_older(task, 901)
    taken = await claimed(store, task)
    with pytest.raises(AttemptLost):
        await finish(older, claim)
    await finish(store, taken)
