"""What every ResultStore does; what only one of them does is in its own module."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from uuid import uuid4

import pytest

from results import (
    AlreadySettled,
    AttemptLost,
    Claim,
    MetadataInvalid,
    ResultStore,
    Row,
    SettledStatus,
    SqliteResults,
    StoredResult,
    Task,
    TaskInProgress,
    TaskNotFound,
)
from results.supabase import SupabaseResults
from tests.services.database import Database

pytestmark = pytest.mark.anyio

LEASE_S = 120.0
MASK_URL = "https://masks.example/0.png"
METADATA: dict[str, object] = {"confidence": 0.93, "results": [{"labels": ["cat"], "box": [1.5, 2, 3, 4]}]}


@dataclass(frozen=True, slots=True)
class Opened:
    """A store, and what its tests need that the service does not."""

    store: ResultStore
    second: ResultStore  # the same rows, as another process has them
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
    """The rows of one test as the Edge and the owner of the database have them.

    The database's clock cannot be set; instead the rows grow older, and `get` adds the difference.
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
        self._database.execute(
            "insert into segmentation_results (id, user_id, source_image_url, text_prompt)"
            " values (%s, %s, %s, %s)",
            *(task.task_id, task.user_id, task.source_image_url, task.text_prompt),
        )
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
        ids, pause = ", ".join(f"'{task_id}'" for task_id in self._task_ids), f"interval '{seconds} seconds'"
        older = ", ".join(
            f"{time} = {time} - {pause}" for time in ("created_at", "updated_at", "lease_until")
        )
        # Without the triggers that set them.
        self._database.execute(
            f"""set session_replication_role = replica;
            update segmentation_results set {older} where id in ({ids})"""  # noqa: S608
        )


def open_supabase(database: Database, _folder: Path) -> Opened:
    store, second = (SupabaseResults(database.url, database.secret_key, lease_s=LEASE_S) for _ in range(2))
    rows = SupabaseRows(database)
    return Opened(store, second, rows.insert_pending, rows.get, rows.advance_clock)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


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


async def claimed(store: ResultStore, task: Task) -> Claim:
    claim = await new_claim(store, task)
    assert isinstance(claim, Claim)
    return claim


async def row_of(opened: Opened, task: Task) -> Row:
    row = await opened.get(task.task_id)
    assert row is not None
    return row


async def finish(store: ResultStore, claim: Claim) -> None:
    await store.update_result(claim.task_id, MASK_URL, ["cat"], METADATA, attempt_id=claim.attempt_id)


async def test_inserted_task_is_pending(opened: Opened, task: Task) -> None:
    """Before its claim a row is pending, without a mask, labels or metadata."""
    row = await row_of(opened, task)
    assert (row.status, row.mask_url, row.labels, row.metadata) == ("pending", None, [], {})


async def test_claim_takes_a_pending_task(opened: Opened, task: Task) -> None:
    """A claim makes the row processing under a fresh attempt id."""
    claim = await claimed(opened.store, task)
    row = await row_of(opened, task)
    assert claim.task_id == task.task_id
    assert (row.status, row.attempt_id) == ("processing", claim.attempt_id)


async def test_finish_settles_the_row(opened: Opened, task: Task) -> None:
    """A finished task's row is done, and has the mask's URL, the labels and the metadata."""
    claim = await claimed(opened.store, task)
    await finish(opened.store, claim)
    row = await row_of(opened, task)
    assert (row.status, row.mask_url, row.labels) == ("done", MASK_URL, ["cat"])
    assert (row.metadata, row.attempt_id) == (METADATA, claim.attempt_id)


async def test_claim_of_a_done_task_gives_its_result(opened: Opened, task: Task) -> None:
    """A delivery of a done task, however late, gives what was stored and changes nothing."""
    await finish(opened.store, await claimed(opened.store, task))
    before = await row_of(opened, task)
    for seconds in (0, LEASE_S + 1, 1e7):
        opened.advance_clock(seconds)
        assert await new_claim(opened.second, task) == StoredResult(task.task_id, MASK_URL, ["cat"], METADATA)
    assert await row_of(opened, task) == before


async def test_claim_of_a_fresh_task_waits(opened: Opened, task: Task) -> None:
    """While another attempt holds the row, the claim says how much of its lease is left."""
    await claimed(opened.store, task)
    opened.advance_clock(LEASE_S - 30)
    with pytest.raises(TaskInProgress) as raised:
        await new_claim(opened.second, task)
    assert raised.value.retry_after_s == pytest.approx(30, abs=1)


async def test_claim_may_be_repeated(opened: Opened, task: Task) -> None:
    """An attempt that claims again, as after a lost answer, keeps the row and gets a whole lease."""
    claim = await claimed(opened.store, task)
    opened.advance_clock(LEASE_S - 30)
    assert await opened.second.claim(task, claim.attempt_id) == claim
    opened.advance_clock(LEASE_S - 30)
    with pytest.raises(TaskInProgress):
        await new_claim(opened.second, task)
    await finish(opened.store, claim)


async def test_stale_task_is_taken_over(opened: Opened, task: Task) -> None:
    """Once its lease has run out, the next claim gets the row, under another attempt id."""
    first = await claimed(opened.store, task)
    opened.advance_clock(LEASE_S + 1)
    second = await claimed(opened.second, task)
    assert second.attempt_id != first.attempt_id
    assert (await row_of(opened, task)).attempt_id == second.attempt_id


STALE_WRITES: dict[str, Callable[[ResultStore, Claim], Awaitable[None]]] = {
    "finish": finish,
    "fail": lambda store, claim: store.update_status(
        claim.task_id, "error", attempt_id=claim.attempt_id, error_message="no"
    ),
    "give back": lambda store, claim: store.update_status(
        claim.task_id, "pending", attempt_id=claim.attempt_id
    ),
}


@pytest.mark.parametrize("write", STALE_WRITES.values(), ids=STALE_WRITES.keys())
@pytest.mark.parametrize("successor", ["processing", "done", "error", "pending"])
async def test_stale_attempt_is_fenced(
    opened: Opened, task: Task, write: Callable[[ResultStore, Claim], Awaitable[None]], successor: str
) -> None:
    """Whatever a taken-over attempt writes is AttemptLost, and its successor's row stays as it was."""
    stale = await claimed(opened.store, task)
    opened.advance_clock(LEASE_S + 1)
    fresh = await claimed(opened.second, task)
    if successor == "done":
        await finish(opened.second, fresh)
    elif successor in ("error", "pending"):
        await STALE_WRITES["fail" if successor == "error" else "give back"](opened.second, fresh)
    before = await row_of(opened, task)
    assert before.status == successor
    with pytest.raises(AttemptLost):
        await write(opened.store, stale)
    assert await row_of(opened, task) == before


@pytest.mark.parametrize("write", STALE_WRITES.values(), ids=STALE_WRITES.keys())
async def test_deleted_row_is_not_found(
    opened: Opened, write: Callable[[ResultStore, Claim], Awaitable[None]]
) -> None:
    """A row that was deleted under an attempt is TaskNotFound, and is not made again."""
    claim = Claim(str(uuid4()), str(uuid4()))
    with pytest.raises(TaskNotFound):
        await write(opened.store, claim)
    assert await opened.get(claim.task_id) is None


@pytest.mark.parametrize("name", ["finish", "fail", "give back"])
async def test_write_may_be_repeated(opened: Opened, task: Task, name: str) -> None:
    """The same write again, as after a lost answer, is no error and changes nothing."""
    claim = await claimed(opened.store, task)
    await STALE_WRITES[name](opened.store, claim)
    before = await row_of(opened, task)
    opened.advance_clock(5)
    await STALE_WRITES[name](opened.second, claim)
    assert await row_of(opened, task) == before


async def test_other_finish_after_a_finish_is_lost(opened: Opened, task: Task) -> None:
    """A done row is not changed any more, by its own attempt either."""
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


async def test_failed_task_tells_why_and_may_be_claimed_again(opened: Opened, task: Task) -> None:
    """An error has its message in the metadata; the next claim clears it and can still succeed."""
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


async def test_task_may_be_given_back(opened: Opened, task: Task) -> None:
    """A task that was given back is pending, without an error, and at once free for the next claim."""
    claim = await claimed(opened.store, task)
    await opened.store.update_status(task.task_id, "pending", attempt_id=claim.attempt_id)
    row = await row_of(opened, task)
    assert row.status == "pending"
    assert "error_message" not in row.metadata
    await claimed(opened.second, task)


@pytest.mark.parametrize("status", ["done", "processing", "cancelled"])
async def test_other_statuses_are_refused(opened: Opened, task: Task, status: SettledStatus) -> None:
    """`update_status` cannot say done without a result, nor processing without a claim."""
    claim = await claimed(opened.store, task)
    with pytest.raises(ValueError, match="'pending' or 'error'"):
        await opened.store.update_status(task.task_id, status, attempt_id=claim.attempt_id)
    assert (await row_of(opened, task)).status == "processing"


async def test_another_users_task_is_not_found(opened: Opened, task: Task) -> None:
    """Another user's task is TaskNotFound in every status, so that it is not even known to exist."""
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
    """NaN, infinities and foreign objects are refused, and the attempt may still settle."""
    claim = await claimed(opened.store, task)
    with pytest.raises(MetadataInvalid):
        await opened.store.update_result(
            task.task_id, MASK_URL, [], {"deep": [value]}, attempt_id=claim.attempt_id
        )
    await opened.store.update_status(task.task_id, "error", attempt_id=claim.attempt_id)


async def test_text_comes_back_as_it_was(opened: Opened, task: Task) -> None:
    """Quotes, other scripts and emoji survive in labels and metadata, and nothing is taken for SQL."""
    text = '\'); DROP TABLE segmentation_results; -- "\u732b" \U0001f408'
    claim = await claimed(opened.store, task)
    await opened.store.update_result(
        task.task_id, MASK_URL, [text], {text: text}, attempt_id=claim.attempt_id
    )
    assert await new_claim(opened.store, task) == StoredResult(task.task_id, MASK_URL, [text], {text: text})


async def test_metadata_cannot_forge_an_attempt(opened: Opened, task: Task) -> None:
    """Metadata may say "attempt" like any other word."""
    claim = await claimed(opened.store, task)
    metadata: dict[str, object] = {"attempt": "forged"}
    await opened.store.update_result(task.task_id, MASK_URL, [], metadata, attempt_id=claim.attempt_id)
    row = await row_of(opened, task)
    assert (row.metadata, row.attempt_id) == (metadata, claim.attempt_id)


async def test_end_stale_ends_what_nobody_ended(opened: Opened, task: Task) -> None:
    """A claim whose lease has been over for longer than the grace ends as an error; others stay."""
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


async def test_late_result_reaches_a_task_that_was_ended_as_stale(opened: Opened, task: Task) -> None:
    """Work that ends after its task was given up still reaches the user, unless another attempt began."""
    claim = await claimed(opened.store, task)
    opened.advance_clock(2 * LEASE_S)
    await opened.second.end_stale(0)
    await finish(opened.store, claim)
    assert (await row_of(opened, task)).status == "done"


async def test_refuse_ends_a_pending_task_alone(opened: Opened, task: Task) -> None:
    """A task that is refused unclaimed ends as an error; one in work or done is left as it is."""
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


async def test_late_claim_brings_no_ended_task_back(opened: Opened, task: Task) -> None:
    """A claim that arrives when its own attempt has ended the row changes nothing; a new one does."""
    claim = await claimed(opened.store, task)
    await opened.store.update_status(task.task_id, "error", attempt_id=claim.attempt_id, error_message="no")
    before = await row_of(opened, task)
    with pytest.raises(AttemptLost):
        await opened.second.claim(task, claim.attempt_id)
    assert await row_of(opened, task) == before
    await claimed(opened.second, task)


async def test_row_that_its_user_changed_is_already_settled(opened: Opened, task: Task) -> None:
    """A repeat of a finish over a row that has changed since says that this attempt has settled it."""
    claim = await claimed(opened.store, task)
    await finish(opened.store, claim)
    with pytest.raises(AlreadySettled):
        await opened.store.update_status(task.task_id, "error", attempt_id=claim.attempt_id)


async def test_times_tell_the_last_change(opened: Opened, task: Task) -> None:
    """`updated_at` moves with every write, `created_at` never; both are in UTC."""
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
    """Of 20 claims at once, through two stores, one gets the task and 19 are told to wait."""
    stores = [opened.store, opened.second] * 10
    answers = await asyncio.gather(*(new_claim(store, task) for store in stores), return_exceptions=True)
    assert sum(isinstance(answer, Claim) for answer in answers) == 1
    assert sum(isinstance(answer, TaskInProgress) for answer in answers) == 19


async def test_description_is_one_line(opened: Opened) -> None:
    """The start-up log gets one line."""
    assert len(opened.store.describe().splitlines()) == 1


@pytest.mark.parametrize("task_id", ["", "1", "0C8E6A2E-4F6B-4D0E-9D0C-3F6F1B1F2A11", "0" * 32, "../x"])
def test_task_id_is_a_canonical_uuid(task_id: str) -> None:
    """A task_id that PostgreSQL would refuse, or spell otherwise, makes no Task."""
    with pytest.raises(ValueError, match="UUID"):
        Task(task_id, "user-1", "uploads/user-1/cat", ("cat",))
