"""The behaviour that all result stores share."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from results import (
    AlreadySettled,
    AttemptLost,
    Claim,
    MetadataInvalid,
    ResultStore,
    Row,
    SqliteResults,
    StoredResult,
    Task,
    TaskInProgress,
    TaskNotFound,
)
from results.supabase import SupabaseResults
from tests.results.claims import MASK_URL, METADATA, claimed, finish
from tests.results.supabase_project import insert_pending, move_times_back
from tests.services.database import Database

pytestmark = pytest.mark.anyio

LEASE_S = 120.0


@dataclass(frozen=True, slots=True)
class Opened:
    """A store, and access to its rows that the service does not have."""

    store: ResultStore
    second: ResultStore  # the same rows, as another process opens them
    insert_pending: Callable[[Task], Awaitable[None]]
    get: Callable[[str], Awaitable[Row | None]]
    advance_clock: Callable[[float], None]  # seconds


def open_sqlite(folder: Path) -> Opened:
    clock = [datetime(2026, 1, 1, tzinfo=UTC)]

    def advance_clock(seconds: float) -> None:
        clock[0] += timedelta(seconds=seconds)

    store, second = (
        SqliteResults(
            folder / "results.db",
            LEASE_S,
            now=lambda: clock[0],
            clock_s=lambda: clock[0].timestamp(),  # noqa: PLW0108
        )
        for _ in range(2)
    )
    return Opened(store, second, store.insert_pending, store.get, advance_clock)


class SupabaseRows:
    """Direct access to the rows of one test, as the Edge and the database's owner have it.

    The database's clock cannot be set: `advance_clock` moves the rows' times back, and `get` adds the
    difference.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._task_ids: list[str] = []
        self._ahead = timedelta(0)

    async def insert_pending(self, task: Task) -> None:
        self._database.execute("insert into auth.users (id) values (%s) on conflict do nothing", task.user_id)
        self._database.execute(
            "insert into users_profile (id) values (%s) on conflict do nothing", task.user_id
        )
        insert_pending(self._database, task)
        self._task_ids.append(task.task_id)

    async def get(self, task_id: str) -> Row | None:
        found = self._database.execute(
            "select status, attempt_id, mask_image_url, labels, metadata, created_at, updated_at"
            " from segmentation_results where id = %s",
            task_id,
        )
        if not found:
            return None
        status, attempt_id, mask_url, labels, metadata, created_at, updated_at = found[0]
        times = (created_at + self._ahead, updated_at + self._ahead)
        return Row(status, attempt_id, mask_url, labels, metadata, *times)

    def advance_clock(self, seconds: float) -> None:
        self._ahead += timedelta(seconds=seconds)
        columns = ("created_at", "updated_at", "lease_until")
        move_times_back(self._database, self._task_ids, columns, seconds)


def open_supabase(database: Database, _folder: Path) -> Opened:
    store, second = (SupabaseResults(database.url, database.secret_key, lease_s=LEASE_S) for _ in range(2))
    rows = SupabaseRows(database)
    return Opened(store, second, rows.insert_pending, rows.get, rows.advance_clock)


@pytest.fixture(params=["sqlite", pytest.param("supabase", marks=pytest.mark.services)])
async def opened(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Opened]:
    open_store = open_sqlite
    if request.param == "supabase":
        open_store = partial(open_supabase, request.getfixturevalue("database"))
    opened = open_store(tmp_path)
    yield opened
    await opened.store.close()
    await opened.second.close()


@pytest.fixture
async def task(opened: Opened) -> Task:
    """A task that the Edge has just inserted."""
    task = Task(str(uuid4()), str(uuid4()), "uploads/user-1/cat", ("cat",))
    await opened.insert_pending(task)
    return task


async def new_claim(store: ResultStore, task: Task) -> Claim | StoredResult:
    return await store.claim(task, str(uuid4()))


async def row_of(opened: Opened, task: Task) -> Row:
    row = await opened.get(task.task_id)
    assert row is not None
    return row


async def test_inserted_task_is_pending(opened: Opened, task: Task) -> None:
    """Before its claim a row is pending, without a mask, labels or metadata."""
    row = await row_of(opened, task)
    assert (row.status, row.mask_url, row.labels, row.metadata) == ("pending", None, [], {})


async def test_claim_takes_a_pending_task(opened: Opened, task: Task) -> None:
    """A claim sets the row to processing, with its attempt id."""
    claim = await claimed(opened.store, task)
    row = await row_of(opened, task)
    assert claim.task_id == task.task_id
    assert (row.status, row.attempt_id) == ("processing", claim.attempt_id)


async def test_finish_settles_the_row(opened: Opened, task: Task) -> None:
    """A finished task's row is done, and holds the mask's URL, the labels and the metadata."""
    claim = await claimed(opened.store, task)
    await finish(opened.store, claim)
    row = await row_of(opened, task)
    assert (row.status, row.mask_url, row.labels) == ("done", MASK_URL, ["cat"])
    assert (row.metadata, row.attempt_id) == (METADATA, claim.attempt_id)


async def test_claim_of_a_done_task_returns_its_result(opened: Opened, task: Task) -> None:
    """A claim of a done task, however late, returns what was stored and changes nothing."""
    await finish(opened.store, await claimed(opened.store, task))
    before = await row_of(opened, task)
    for seconds in (0, LEASE_S + 1, 1e7):
        opened.advance_clock(seconds)
        assert await new_claim(opened.second, task) == StoredResult(task.task_id, MASK_URL, ["cat"], METADATA)
    assert await row_of(opened, task) == before


async def test_claim_of_a_held_task_says_when_to_retry(opened: Opened, task: Task) -> None:
    """While another attempt holds the row, the error says when its lease expires."""
    await claimed(opened.store, task)
    opened.advance_clock(LEASE_S - 30)
    with pytest.raises(TaskInProgress) as raised:
        await new_claim(opened.second, task)
    assert raised.value.retry_after_s == pytest.approx(30, abs=1)


async def test_claim_may_be_repeated(opened: Opened, task: Task) -> None:
    """An attempt that claims again, as after a lost answer, keeps the row and gets a new lease."""
    claim = await claimed(opened.store, task)
    opened.advance_clock(LEASE_S - 30)
    assert await opened.second.claim(task, claim.attempt_id) == claim
    opened.advance_clock(LEASE_S - 30)
    with pytest.raises(TaskInProgress):
        await new_claim(opened.second, task)
    await finish(opened.store, claim)


async def test_expired_lease_is_taken_over(opened: Opened, task: Task) -> None:
    """Once a lease has expired, the next claim gets the row, under another attempt id."""
    first = await claimed(opened.store, task)
    opened.advance_clock(LEASE_S + 1)
    second = await claimed(opened.second, task)
    assert second.attempt_id != first.attempt_id
    assert (await row_of(opened, task)).attempt_id == second.attempt_id


WRITES: dict[str, Callable[[ResultStore, Claim], Awaitable[None]]] = {
    "finish": finish,
    "fail": lambda store, claim: store.update_status(
        claim.task_id, "error", attempt_id=claim.attempt_id, error_message="no"
    ),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
@pytest.mark.parametrize("successor", ["processing", "done", "error"])
async def test_lost_attempt_changes_nothing(
    opened: Opened, task: Task, write: Callable[[ResultStore, Claim], Awaitable[None]], successor: str
) -> None:
    """Any write of an attempt whose row was taken over raises AttemptLost and changes nothing."""
    stale = await claimed(opened.store, task)
    opened.advance_clock(LEASE_S + 1)
    fresh = await claimed(opened.second, task)
    if successor == "done":
        await finish(opened.second, fresh)
    elif successor == "error":
        await WRITES["fail"](opened.second, fresh)
    before = await row_of(opened, task)
    assert before.status == successor
    with pytest.raises(AttemptLost):
        await write(opened.store, stale)
    assert await row_of(opened, task) == before


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
async def test_deleted_row_is_not_found(
    opened: Opened, write: Callable[[ResultStore, Claim], Awaitable[None]]
) -> None:
    """A row that was deleted during an attempt raises TaskNotFound, and is not inserted again."""
    claim = Claim(str(uuid4()), str(uuid4()))
    with pytest.raises(TaskNotFound):
        await write(opened.store, claim)
    assert await opened.get(claim.task_id) is None


@pytest.mark.parametrize("name", WRITES)
async def test_write_may_be_repeated(opened: Opened, task: Task, name: str) -> None:
    """A repeated write, as after a lost answer, is no error and changes nothing."""
    claim = await claimed(opened.store, task)
    await WRITES[name](opened.store, claim)
    before = await row_of(opened, task)
    opened.advance_clock(5)
    await WRITES[name](opened.second, claim)
    assert await row_of(opened, task) == before


async def test_done_row_is_final(opened: Opened, task: Task) -> None:
    """A done row does not change any more, nor does its own attempt change it."""
    claim = await claimed(opened.store, task)
    await finish(opened.store, claim)
    before = await row_of(opened, task)
    for mask_url, labels, metadata in [
        ("https://masks.example/1.png", ["cat"], METADATA),
        (MASK_URL, [], METADATA),
        (MASK_URL, ["cat"], {**METADATA, "confidence": 0.94}),
    ]:
        with pytest.raises(AttemptLost):
            await opened.store.update_result(
                task.task_id, mask_url, labels, metadata, attempt_id=claim.attempt_id
            )
    with pytest.raises(AttemptLost):
        await opened.store.update_status(task.task_id, "error", attempt_id=claim.attempt_id)
    assert await row_of(opened, task) == before


async def test_failed_task_has_its_message_and_may_be_claimed_again(opened: Opened, task: Task) -> None:
    """The metadata of a failed task hold the message; the next claim removes it, and may succeed."""
    claim = await claimed(opened.store, task)
    await opened.store.update_status(
        task.task_id, "error", attempt_id=claim.attempt_id, error_message="corrupt"
    )
    row = await row_of(opened, task)
    assert (row.status, row.mask_url, row.metadata["error_message"]) == ("error", None, "corrupt")
    again = await claimed(opened.store, task)
    assert "error_message" not in (await row_of(opened, task)).metadata
    await finish(opened.store, again)
    assert (await row_of(opened, task)).status == "done"


@pytest.mark.parametrize("status", ["done", "processing", "pending", "cancelled"])
async def test_other_statuses_are_refused(opened: Opened, task: Task, status: Any) -> None:
    """`update_status` accepts no status but "error": done needs a result, processing a claim."""
    claim = await claimed(opened.store, task)
    with pytest.raises(ValueError, match="'error' alone"):
        await opened.store.update_status(task.task_id, status, attempt_id=claim.attempt_id)
    assert (await row_of(opened, task)).status == "processing"


async def test_another_users_task_is_not_found(opened: Opened, task: Task) -> None:
    """Another user's task raises TaskNotFound in every status: its existence is not revealed."""
    stranger = replace(task, user_id=str(uuid4()))
    with pytest.raises(TaskNotFound):
        await new_claim(opened.store, stranger)
    claim = await claimed(opened.store, task)
    with pytest.raises(TaskNotFound):
        await new_claim(opened.store, stranger)
    await finish(opened.store, claim)
    with pytest.raises(TaskNotFound):
        await new_claim(opened.store, stranger)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), object(), {1, 2}, b"x"])
async def test_metadata_must_be_json(opened: Opened, task: Task, value: object) -> None:
    """Values that JSON cannot represent are refused, and the attempt may still settle."""
    claim = await claimed(opened.store, task)
    with pytest.raises(MetadataInvalid):
        await opened.store.update_result(
            task.task_id, MASK_URL, [], {"deep": [value]}, attempt_id=claim.attempt_id
        )
    await opened.store.update_status(task.task_id, "error", attempt_id=claim.attempt_id)


async def test_text_is_unchanged(opened: Opened, task: Task) -> None:
    """Quotes, other scripts and emoji are stored unchanged in labels and metadata, and never run as SQL."""
    text = '\'); DROP TABLE segmentation_results; -- "\u732b" \U0001f408'
    claim = await claimed(opened.store, task)
    await opened.store.update_result(
        task.task_id, MASK_URL, [text], {text: text}, attempt_id=claim.attempt_id
    )
    assert await new_claim(opened.store, task) == StoredResult(task.task_id, MASK_URL, [text], {text: text})


async def test_metadata_cannot_forge_an_attempt(opened: Opened, task: Task) -> None:
    """A key "attempt" in the metadata does not change the row's attempt."""
    claim = await claimed(opened.store, task)
    metadata: dict[str, object] = {"attempt": "forged"}
    await opened.store.update_result(task.task_id, MASK_URL, [], metadata, attempt_id=claim.attempt_id)
    row = await row_of(opened, task)
    assert (row.metadata, row.attempt_id) == (metadata, claim.attempt_id)


async def test_end_stale_ends_expired_tasks(opened: Opened, task: Task) -> None:
    """A task whose lease expired before the grace time ends as an error; others stay."""
    await claimed(opened.store, task)
    opened.advance_clock(LEASE_S + 60)
    fresh = replace(task, task_id=str(uuid4()))
    await opened.insert_pending(fresh)
    await claimed(opened.store, fresh)
    await opened.second.end_stale(90)
    assert (await row_of(opened, task)).status == "processing"
    await opened.second.end_stale(30)
    row = await row_of(opened, task)
    assert (row.status, "not finished in time" in str(row.metadata["error_message"])) == ("error", True)
    assert (await row_of(opened, fresh)).status == "processing"


async def test_late_result_is_stored_after_end_stale(opened: Opened, task: Task) -> None:
    """A result that comes after `end_stale` is stored."""
    claim = await claimed(opened.store, task)
    opened.advance_clock(2 * LEASE_S)
    await opened.second.end_stale(0)
    await finish(opened.store, claim)
    assert (await row_of(opened, task)).status == "done"


async def test_refuse_ends_only_a_pending_task(opened: Opened, task: Task) -> None:
    """A pending task ends as an error; one that is processing or done stays as it is."""
    await opened.store.refuse(task, "given up")
    row = await row_of(opened, task)
    assert (row.status, row.metadata) == ("error", {"error_message": "given up"})
    claim = await claimed(opened.store, task)
    for finished in (False, True):
        if finished:
            await finish(opened.store, claim)
        before = await row_of(opened, task)
        await opened.store.refuse(task, "given up")
        assert await row_of(opened, task) == before


async def test_late_claim_does_not_restart_its_own_ended_attempt(opened: Opened, task: Task) -> None:
    """A claim that arrives after its own attempt has ended changes nothing; a new attempt may claim."""
    claim = await claimed(opened.store, task)
    await opened.store.update_status(task.task_id, "error", attempt_id=claim.attempt_id, error_message="no")
    before = await row_of(opened, task)
    with pytest.raises(AttemptLost):
        await opened.second.claim(task, claim.attempt_id)
    assert await row_of(opened, task) == before
    await claimed(opened.second, task)


async def test_changed_row_is_already_settled(opened: Opened, task: Task) -> None:
    """A different write of the attempt that has settled the row raises AlreadySettled."""
    claim = await claimed(opened.store, task)
    await finish(opened.store, claim)
    with pytest.raises(AlreadySettled):
        await opened.store.update_status(task.task_id, "error", attempt_id=claim.attempt_id)


async def test_times_of_a_row(opened: Opened, task: Task) -> None:
    """`updated_at` changes with every write, `created_at` never; both are in UTC."""
    rows = [await row_of(opened, task)]
    opened.advance_clock(10)
    claim = await claimed(opened.store, task)
    rows.append(await row_of(opened, task))
    opened.advance_clock(10)
    await finish(opened.store, claim)
    rows.append(await row_of(opened, task))
    assert {row.created_at for row in rows} == {rows[0].created_at}
    for earlier, later in pairwise(rows):
        assert later.updated_at - earlier.updated_at >= timedelta(seconds=10)
    assert rows[0].created_at.tzinfo == rows[0].updated_at.tzinfo == UTC


async def test_one_of_many_concurrent_claims_wins(opened: Opened, task: Task) -> None:
    """Of 20 concurrent claims through two stores, one gets the task and 19 raise TaskInProgress."""
    stores = [opened.store, opened.second] * 10
    answers = await asyncio.gather(*(new_claim(store, task) for store in stores), return_exceptions=True)
    assert sum(isinstance(answer, Claim) for answer in answers) == 1
    assert sum(isinstance(answer, TaskInProgress) for answer in answers) == 19


async def test_description_is_one_line(opened: Opened) -> None:
    """The description for the start-up log is one line."""
    assert len(opened.store.describe().splitlines()) == 1


@pytest.mark.parametrize("task_id", ["", "1", "0C8E6A2E-4F6B-4D0E-9D0C-3F6F1B1F2A11", "0" * 32, "../x"])
def test_task_id_is_a_canonical_uuid(task_id: str) -> None:
    """A Task refuses a task_id that PostgreSQL would refuse or normalise."""
    with pytest.raises(ValueError, match="UUID"):
        Task(task_id, "user-1", "uploads/user-1/cat", ("cat",))
