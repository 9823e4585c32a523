"""What only the Supabase store does: keys, columns, roles and connections."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from uuid import uuid4

import httpx
import jwt
import pytest

from results import (
    Claim,
    MetadataInvalid,
    ResultsMisconfigured,
    ResultsUnavailable,
    StoredResult,
    Task,
    TaskInProgress,
    TaskNotFound,
)
from results.supabase import SupabaseResults
from tests.results.supabase_project import MASK_URL, claimed, finish
from tests.services.database import WORKER_ROLE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.results.supabase_project import Project

pytestmark = pytest.mark.anyio

LEASE_S = 120.0


async def live(store: SupabaseResults, task: Task, warnings: int = 0) -> None:
    """All that a task's life asks of the database, and some refusals."""
    assert len(await store.check()) == warnings
    claim = await claimed(store, task)
    with pytest.raises(TaskInProgress):
        await claimed(store, task)
    await store.update_status(task.task_id, "error", attempt_id=claim.attempt_id, error_message="no")
    await finish(store, await claimed(store, task))
    assert isinstance(await store.claim(task, str(uuid4())), StoredResult)


async def test_secret_key_never_goes_as_a_bearer(project: Project) -> None:
    """A key of the new kind is sent as apikey alone: the API refuses it in Authorization."""
    await live(project.open(), project.new_task())
    for request in project.proxy.requests:
        assert request.headers["apikey"] == project.database.secret_key
        assert "authorization" not in request.headers


async def test_service_role_key_goes_as_both(project: Project) -> None:
    """The old kind of key still works, in both headers."""
    key = project.database.service_role_key
    await live(project.open(key), project.new_task())
    for request in project.proxy.requests:
        assert (request.headers["apikey"], request.headers["authorization"]) == (key, f"Bearer {key}")


async def test_role_of_our_own_goes_under_the_publishable_key(either: Project) -> None:
    """The role that can do the least can do all that a task needs."""
    project = either
    key, publishable_key = project.database.role_jwt("sam3_worker"), project.database.publishable_key
    store = project.open(key, publishable_key=publishable_key)
    await live(store, project.new_task(), warnings=0 if project.has_leases() else 1)
    await store.refuse(project.new_task(), "no")
    await store.end_stale(LEASE_S)
    for request in project.proxy.requests:
        assert request.headers["apikey"] == publishable_key
        assert request.headers["authorization"] == f"Bearer {key}"


def token(**claims: object) -> str:
    return jwt.encode(claims, "0" * 32, algorithm="HS256")


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("sb_publishable_0123456789", "publishable"),
        (token(role="anon"), "key for users"),
        (token(role="authenticated"), "key for users"),
        (token(sub="someone"), "key for users"),
        (token(role=["service_role"]), "key for users"),
        ("", "empty"),
        ("sb_secret_0123\n", "character"),
        ("sb_secret_caf\u00e9", "character"),
        ("an.invalid.token", "neither"),
        ("a.W10.token", "neither"),
        ("password", "neither"),
    ],
)
def test_keys_that_cannot_work_are_refused(key: str, reason: str) -> None:
    """A key that would find no row, or none at all, stops the start and is not repeated."""
    with pytest.raises(ResultsMisconfigured, match=reason) as raised:
        SupabaseResults("http://127.0.0.1:1", key, lease_s=LEASE_S)
    assert not key or key not in str(raised.value)


async def test_expired_key_is_refused() -> None:
    """A key whose time is over stops the start, before any request."""
    store = SupabaseResults("http://127.0.0.1:1", token(role="service_role", exp=1), lease_s=LEASE_S)
    with pytest.raises(ResultsMisconfigured, match="expired"):
        await store.check()
    await store.close()


@pytest.mark.parametrize(
    "url", ["", "project.supabase.co", "ftp://host", "https://", "https://host/rest/v1", "https://host?x=1"]
)
def test_urls_that_cannot_work_are_refused(url: str) -> None:
    """SUPABASE_URL is the project's, without a path."""
    with pytest.raises(ResultsMisconfigured, match="SUPABASE_URL"):
        SupabaseResults(url, "sb_secret_0123456789", lease_s=LEASE_S)


async def test_description_names_the_host_alone() -> None:
    """The start-up log learns where the rows are, and no key."""
    store = SupabaseResults("https://project.supabase.co/", "sb_secret_0123456789", lease_s=LEASE_S)
    assert store.describe() == "Supabase table segmentation_results at project.supabase.co"
    await store.close()
    await store.close()


async def test_rows_are_never_made_or_deleted(project: Project) -> None:
    """Whatever happens to a task, only SELECT and UPDATE are asked for, of one table, and the time."""
    await live(project.open(), project.new_task())
    await project.open().end_stale(LEASE_S)
    assert {request.method for request in project.proxy.requests} == {"GET", "PATCH"}
    assert {request.path.partition("?")[0] for request in project.proxy.requests} == {
        "/rest/v1/segmentation_results",
        "/rest/v1/rpc/segmentation_results_now",
    }


async def test_claim_and_finish_take_one_request_each(project: Project) -> None:
    """Two updates a task, each a push to the user's subscription, and nothing to read."""
    store, task = project.open(), project.new_task()
    await store.check()
    before = len(project.proxy.requests)
    await finish(store, await claimed(store, task))
    assert [request.method for request in project.proxy.requests[before:]] == ["PATCH", "PATCH"]


async def test_connections_are_bounded_and_reused(project: Project) -> None:
    """50 tasks at once share the connections that the store may have."""
    store, tasks = project.open(connections=4), [project.new_task() for _ in range(50)]

    async def run(task: Task) -> None:
        await finish(store, await claimed(store, task))

    await asyncio.gather(*(run(task) for task in tasks))
    assert all(project.row(task)[0] == "done" for task in tasks)
    assert project.proxy.max_connections_open <= 4
    assert project.proxy.connections_made <= 4


async def test_user_id_that_is_no_uuid_is_not_found(project: Project) -> None:
    """The column holds UUIDs; a user_id of another shape can own no row."""
    task = project.new_task()
    for user_id in ("user-1", "null", ""):
        with pytest.raises(TaskNotFound):
            await project.open().claim(
                Task(task.task_id, user_id, task.source_image_url, task.prompts), str(uuid4())
            )


async def test_attempt_id_is_only_a_value(project: Project) -> None:
    """An attempt id with the filter language's own characters takes no other attempt's row."""
    store, task = project.open(), project.new_task()
    await claimed(store, task)
    for attempt_id in ('x"),status.eq.processing,or(status.eq."processing', "x\\", "),status.neq.done,and("):
        with pytest.raises(TaskInProgress):
            await store.claim(task, attempt_id)
        other = project.new_task()
        await store.claim(other, attempt_id)
        await finish(store, Claim(other.task_id, attempt_id))
        assert project.row(other)[0] == "done"


@pytest.mark.parametrize("text", ["a\0b", "\ud800"])
async def test_text_that_postgresql_cannot_keep_is_invalid(project: Project, text: str) -> None:
    """A zero byte or half a character is our own bug: it is said so before anything is sent."""
    store = project.open()
    claim = await claimed(store, project.new_task())
    places: list[tuple[list[str], dict[str, object]]] = [([text], {}), ([], {"deep": [{text: 1}]})]
    for labels, metadata in places:
        with pytest.raises(MetadataInvalid):
            await store.update_result(claim.task_id, MASK_URL, labels, metadata, attempt_id=claim.attempt_id)


async def test_text_that_looks_like_an_escape_is_kept(project: Project) -> None:
    r"""The six characters \u0000 are no zero byte."""
    store, task = project.open(), project.new_task()
    claim = await claimed(store, task)
    text = r"\u0000 and \\u0000"
    await store.update_result(task.task_id, MASK_URL, [text], {}, attempt_id=claim.attempt_id)
    assert project.row(task)[2] == [text]


@pytest.mark.parametrize("json", ["null", "3", '"text"', '{"a": 1}', "[1, null]"])
async def test_done_row_that_its_owner_spoiled_is_still_answered(project: Project, json: str) -> None:
    """Users may write to their own rows; a claim of such a row fails in no new way."""
    task = project.new_task()
    project.database.execute(
        "update segmentation_results set status = 'done', labels = %s::jsonb, metadata = %s::jsonb"
        " where id = %s",
        *(json, json, task.task_id),
    )
    stored = await project.open().claim(task, str(uuid4()))
    assert isinstance(stored, StoredResult)
    assert stored.mask_url == ""
    assert all(isinstance(label, str) for label in stored.labels)


async def test_row_deleted_during_the_work_is_not_found(project: Project) -> None:
    """A row that its owner deletes in the middle is not made again."""
    store, task = project.open(), project.new_task()
    claim = await claimed(store, task)
    project.database.execute("delete from segmentation_results where id = %s", task.task_id)
    with pytest.raises(TaskNotFound):
        await finish(store, claim)


async def rename_column(spare: Project, old: str, new: str) -> None:
    spare.database.execute(f'alter table segmentation_results rename column "{old}" to "{new}"')
    await wait_for_column(spare, new)


async def wait_for_column(spare: Project, column: str, *, there: bool = True) -> None:
    """Return when PostgREST, which keeps a copy of the schema, can update the column, or cannot."""
    headers = {"apikey": spare.database.secret_key}
    url = f"{spare.database.url}/rest/v1/segmentation_results?id=eq.{uuid4()}"
    async with httpx.AsyncClient() as http:
        for _ in range(1000):
            if (await http.patch(url, headers=headers, json={column: []})).is_success is there:
                return
            await asyncio.sleep(0.01)
    pytest.fail("PostgREST did not load the schema anew")


@asynccontextmanager
async def renamed(spare: Project, old: str, new: str) -> AsyncIterator[None]:
    await rename_column(spare, old, new)
    try:
        yield
    finally:
        await rename_column(spare, new, old)


@pytest.mark.parametrize(("column", "given"), [("mask_url", None), ("Mask2", "Mask2")])
async def test_mask_column_is_found_or_told(spare: Project, column: str, given: str | None) -> None:
    """A table with mask_url works by itself, and any other name when SUPABASE_MASK_COLUMN gives it."""
    task = spare.new_task()
    async with renamed(spare, "mask_image_url", column):
        await live(spare.open(mask_column=given), task)
    assert spare.row(task)[:2] == ("done", MASK_URL)


async def test_mask_column_that_changes_is_found_anew(spare: Project) -> None:
    """A column renamed while we run costs one more look, not the result."""
    store, task = spare.open(), spare.new_task()
    claim = await claimed(store, task)
    async with renamed(spare, "mask_image_url", "mask_url"):
        await finish(store, claim)
        assert isinstance(await store.claim(task, str(uuid4())), StoredResult)
    assert isinstance(await store.claim(task, str(uuid4())), StoredResult)


@pytest.mark.parametrize(
    ("column", "given", "sentence"),
    [
        ("mask_image_url", None, "no column mask_image_url or mask_url"),
        ("labels", None, "no column labels"),
        ("user_id", None, "no column user_id"),
        ("mask_image_url", "mask", "no column mask"),
    ],
)
async def test_missing_column_is_named(
    spare: Project, column: str, given: str | None, sentence: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A table without a column that we need stops the start; at run time the log says which."""
    claim = await claimed(spare.open(), spare.new_task())
    async with renamed(spare, column, "something_else"):
        store = spare.open(mask_column=given)
        with pytest.raises(ResultsMisconfigured, match=sentence):
            await store.check()
        with pytest.raises(ResultsUnavailable):
            await finish(store, claim)
    assert sentence in caplog.text
    await finish(store if given is None else spare.open(), claim)


async def test_missing_table_is_named(spare: Project) -> None:
    """A project without the table stops the start and says how to get it."""
    execute = spare.database.execute
    execute("alter table segmentation_results rename to elsewhere")
    try:
        await wait_for_column(spare, "labels", there=False)
        with pytest.raises(ResultsMisconfigured, match="supabase/migrations"):
            await spare.open().check()
    finally:
        execute("alter table elsewhere rename to segmentation_results")
        await wait_for_column(spare, "labels")


@pytest.mark.parametrize("column", ["status", "metadata", "a,b", "metadata->>x", 'a"b', "x" * 64])
def test_mask_column_must_be_a_column_of_its_own(column: str) -> None:
    """SUPABASE_MASK_COLUMN cannot spoil another column or the request."""
    with pytest.raises(ResultsMisconfigured, match="SUPABASE_MASK_COLUMN"):
        SupabaseResults("http://127.0.0.1:1", "sb_secret_0123456789", lease_s=LEASE_S, mask_column=column)


@pytest.mark.parametrize("right", ["select", "update"])
async def test_role_without_a_right_is_refused(spare: Project, right: str) -> None:
    """A role that may not read, or not update, stops the start."""
    role = f"weak_{right}"
    other = "update" if right == "select" else "select"
    spare.database.execute(
        f"""create role {role}; grant {role} to authenticator; grant usage on schema public to {role};
        grant {other} on segmentation_results to {role}"""
    )
    store = spare.open(spare.database.role_jwt(role), publishable_key=spare.database.publishable_key)
    with pytest.raises(ResultsMisconfigured, match=f"the role {role} may not read and update"):
        await store.check()


GRANTS = {
    "table": (
        "revoke all on segmentation_results from service_role",
        "service_role may not read and update segmentation_results: apply supabase/migrations",
        "grant select, update on public.segmentation_results to service_role;",
    ),
    "schema": (
        "revoke usage on schema public from public, service_role",
        "service_role may not use the schema public",
        "grant usage on schema public to service_role;",
    ),
    "function": (
        "revoke execute on function segmentation_results_now() from service_role",
        "service_role may not call segmentation_results_now: apply supabase/migrations",
        "grant execute on function public.segmentation_results_now() to service_role;",
    ),
}


@pytest.mark.parametrize(("revoke", "sentence", "grant"), GRANTS.values(), ids=GRANTS.keys())
async def test_missing_grant_is_told_from_a_wrong_key(
    spare: Project, revoke: str, sentence: str, grant: str
) -> None:
    """The start names the role and the SQL that mends it, which is true, and blames no key."""
    spare.database.execute(revoke)
    for key in (spare.database.secret_key, spare.database.service_role_key):
        with pytest.raises(ResultsMisconfigured, match=sentence) as raised:
            await spare.open(key).check()
        assert "KEY" not in str(raised.value)
    sql = str(raised.value).partition("run: ")[2]
    assert sql == grant
    spare.database.execute(sql)
    assert await spare.open().check() == []
    spare.database.execute("grant insert, delete on segmentation_results to service_role")


async def test_role_that_the_api_may_not_take_is_named(spare: Project) -> None:
    """A JWT for a role that PostgREST cannot take, or that is not there, stops the start with its name."""
    spare.database.execute('create role "Odd role" nologin')
    publishable_key = spare.database.publishable_key
    for role, sentence in (
        ("Odd role", 'grant "Odd role" to authenticator;'),
        ("nobody_here", "the project has no role nobody_here"),
    ):
        store = spare.open(spare.database.role_jwt(role), publishable_key=publishable_key)
        with pytest.raises(ResultsMisconfigured, match=sentence):
            await store.check()


async def test_worker_role_from_before_the_columns_of_leases(spare: Project) -> None:
    """Where the role lacks the new columns, the start says which file to run."""
    spare.database.execute("revoke select (lease_until) on segmentation_results from sam3_worker")
    key, publishable_key = spare.database.role_jwt("sam3_worker"), spare.database.publishable_key
    with pytest.raises(ResultsMisconfigured, match=r"run supabase/optional/sam3_worker\.sql"):
        await spare.open(key, publishable_key=publishable_key).check()
    spare.database.execute(WORKER_ROLE.read_text())
    await live(spare.open(key, publishable_key=publishable_key), spare.new_task())


async def test_missing_function_is_named(spare: Project) -> None:
    """A project with the columns, and without the function that tells the time, stops the start."""
    execute = spare.database.execute
    execute("alter function segmentation_results_now() rename to elsewhere")
    try:
        with pytest.raises(ResultsMisconfigured, match=r"no function segmentation_results_now.*migrations"):
            await spare.open().check()
    finally:
        execute("alter function elsewhere() rename to segmentation_results_now")


async def test_role_that_may_only_see_is_told_so(spare: Project, caplog: pytest.LogCaptureFixture) -> None:
    """With a policy for reading alone updates change nothing, without any error: the log tells."""
    spare.database.execute(
        """create role watcher; grant watcher to authenticator; grant usage on schema public to watcher;
        grant select, update on segmentation_results to watcher;
        create policy "watch" on segmentation_results for select to watcher using (true)"""
    )
    store = spare.open(spare.database.role_jwt("watcher"), publishable_key=spare.database.publishable_key)
    with pytest.raises(ResultsUnavailable):
        await store.claim(spare.new_task(), str(uuid4()))
    assert "lacks an update policy" in caplog.text


async def test_key_that_is_refused_is_no_missing_task(
    project: Project, caplog: pytest.LogCaptureFixture
) -> None:
    """A wrong or revoked key stops the start; at run time it is a 502 and a log line, never a 404."""
    expired = project.database.role_jwt("sam3_worker", exp=1)
    publishable_key = project.database.publishable_key
    for store in (
        project.open("sb_secret_wrong"),
        project.open(token(role="service_role")),
        project.open(token(role="sam3_worker"), publishable_key=publishable_key),
        project.open(expired, publishable_key=publishable_key),
    ):
        caplog.clear()
        with pytest.raises(ResultsMisconfigured, match=r"SUPABASE_SERVICE_KEY (is refused|has expired)"):
            await store.check()
        with pytest.raises(ResultsUnavailable):
            await store.claim(project.new_task(), str(uuid4()))
        assert "SUPABASE_SERVICE_KEY is refused (HTTP 401)" in caplog.text
