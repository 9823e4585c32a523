"""The Supabase store alone: keys, columns, roles and connections."""

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
from tests.results.claims import MASK_URL, claimed, finish
from tests.services.database import WORKER_ROLE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.results.supabase_project import Project

pytestmark = pytest.mark.anyio

LEASE_S = 120.0


async def run_a_task(store: SupabaseResults, task: Task, warnings: int = 0) -> None:
    """Send every request of a task's life, some refused claims included."""
    assert len(await store.check()) == warnings
    claim = await claimed(store, task)
    with pytest.raises(TaskInProgress):
        await claimed(store, task)
    await store.update_status(task.task_id, "error", attempt_id=claim.attempt_id, error_message="no")
    await finish(store, await claimed(store, task))
    assert isinstance(await store.claim(task, str(uuid4())), StoredResult)


async def test_secret_key_is_not_sent_as_a_bearer_token(project: Project) -> None:
    """A secret key is sent as apikey alone: the API refuses it in Authorization."""
    await run_a_task(project.open(), project.new_task())
    for request in project.proxy.requests:
        assert request.headers["apikey"] == project.database.secret_key
        assert "authorization" not in request.headers


async def test_service_role_key_is_sent_in_both_headers(project: Project) -> None:
    """The legacy service_role key works, in both headers."""
    key = project.database.service_role_key
    await run_a_task(project.open(key), project.new_task())
    for request in project.proxy.requests:
        assert (request.headers["apikey"], request.headers["authorization"]) == (key, f"Bearer {key}")


async def test_custom_role_needs_the_publishable_key(either: Project) -> None:
    """The least-privilege role can do everything that a task needs."""
    project = either
    key, publishable_key = project.database.role_jwt("sam3_worker"), project.database.publishable_key
    store = project.open(key, publishable_key=publishable_key)
    await run_a_task(store, project.new_task(), warnings=0 if project.has_leases() else 1)
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
    """A key that cannot work stops the start, and the error does not hold it."""
    with pytest.raises(ResultsMisconfigured, match=reason) as raised:
        SupabaseResults("http://127.0.0.1:1", key, lease_s=LEASE_S)
    assert not key or key not in str(raised.value)


async def test_expired_key_is_refused() -> None:
    """An expired key stops the start, before any request."""
    store = SupabaseResults("http://127.0.0.1:1", token(role="service_role", exp=1), lease_s=LEASE_S)
    with pytest.raises(ResultsMisconfigured, match="expired"):
        await store.check()
    await store.close()


@pytest.mark.parametrize(
    "url", ["", "project.supabase.co", "ftp://host", "https://", "https://host/rest/v1", "https://host?x=1"]
)
def test_urls_that_cannot_work_are_refused(url: str) -> None:
    """SUPABASE_URL must be a project's URL, without a path."""
    with pytest.raises(ResultsMisconfigured, match="SUPABASE_URL"):
        SupabaseResults(url, "sb_secret_0123456789", lease_s=LEASE_S)


async def test_description_names_the_host_alone() -> None:
    """The start-up log gets the host of the rows, and no key."""
    store = SupabaseResults("https://project.supabase.co/", "sb_secret_0123456789", lease_s=LEASE_S)
    assert store.describe() == "Supabase table segmentation_results at project.supabase.co"
    await store.close()
    await store.close()


async def test_rows_are_never_inserted_or_deleted(project: Project) -> None:
    """The store only selects from and updates one table, and reads the time."""
    await run_a_task(project.open(), project.new_task())
    await project.open().end_stale(LEASE_S)
    assert {request.method for request in project.proxy.requests} == {"GET", "PATCH"}
    assert {request.path.partition("?")[0] for request in project.proxy.requests} == {
        "/rest/v1/segmentation_results",
        "/rest/v1/rpc/segmentation_results_now",
    }


async def test_claim_and_finish_take_one_request_each(project: Project) -> None:
    """A task takes two updates, each published to its user, and no read."""
    store, task = project.open(), project.new_task()
    await store.check()
    before = len(project.proxy.requests)
    await finish(store, await claimed(store, task))
    assert [request.method for request in project.proxy.requests[before:]] == ["PATCH", "PATCH"]


async def test_connections_are_bounded_and_reused(project: Project) -> None:
    """50 concurrent tasks share the connections that the store may open."""
    store, tasks = project.open(connections=4), [project.new_task() for _ in range(50)]

    async def run(task: Task) -> None:
        await finish(store, await claimed(store, task))

    await asyncio.gather(*(run(task) for task in tasks))
    assert all(project.row(task)[0] == "done" for task in tasks)
    assert project.proxy.max_connections_open <= 4
    assert project.proxy.connections_made <= 4


async def test_user_id_must_be_a_uuid(project: Project) -> None:
    """A user_id that is not a UUID owns no row, since the column holds UUIDs."""
    task = project.new_task()
    for user_id in ("user-1", "null", ""):
        with pytest.raises(TaskNotFound):
            await project.open().claim(
                Task(task.task_id, user_id, task.source_image_url, task.prompts), str(uuid4())
            )


async def test_attempt_id_is_quoted(project: Project) -> None:
    """An attempt id with characters of the filter syntax does not get another attempt's row."""
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
async def test_text_that_postgresql_cannot_store_is_invalid(project: Project, text: str) -> None:
    """A zero byte or a lone surrogate raises MetadataInvalid before anything is sent."""
    store = project.open()
    claim = await claimed(store, project.new_task())
    places: list[tuple[list[str], dict[str, object]]] = [([text], {}), ([], {"deep": [{text: 1}]})]
    for labels, metadata in places:
        with pytest.raises(MetadataInvalid):
            await store.update_result(claim.task_id, MASK_URL, labels, metadata, attempt_id=claim.attempt_id)


async def test_text_that_looks_like_an_escape_is_stored(project: Project) -> None:
    r"""The six characters \u0000 are not a zero byte."""
    store, task = project.open(), project.new_task()
    claim = await claimed(store, task)
    text = r"\u0000 and \\u0000"
    await store.update_result(task.task_id, MASK_URL, [text], {}, attempt_id=claim.attempt_id)
    assert project.row(task)[2] == [text]


@pytest.mark.parametrize("json", ["null", "3", '"text"', '{"a": 1}', "[1, null]"])
async def test_claim_of_a_done_row_with_forged_columns(project: Project, json: str) -> None:
    """Users may write values of any type to their rows; a claim of such a row still returns a result."""
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
    """A row that its user deletes during the work is not inserted again."""
    store, task = project.open(), project.new_task()
    claim = await claimed(store, task)
    project.database.execute("delete from segmentation_results where id = %s", task.task_id)
    with pytest.raises(TaskNotFound):
        await finish(store, claim)


async def rename_column(spare: Project, old: str, new: str) -> None:
    spare.database.execute(f'alter table segmentation_results rename column "{old}" to "{new}"')
    await wait_for_column(spare, new)


async def wait_for_column(spare: Project, column: str, *, there: bool = True) -> None:
    """Wait until PostgREST's copy of the schema has the column, or lacks it."""
    headers = {"apikey": spare.database.secret_key}
    url = f"{spare.database.url}/rest/v1/segmentation_results?id=eq.{uuid4()}"
    async with httpx.AsyncClient() as http:
        for _ in range(1000):
            if (await http.patch(url, headers=headers, json={column: []})).is_success is there:
                return
            await asyncio.sleep(0.01)
    pytest.fail("PostgREST did not reload the schema")


@asynccontextmanager
async def renamed(spare: Project, old: str, new: str) -> AsyncIterator[None]:
    await rename_column(spare, old, new)
    try:
        yield
    finally:
        await rename_column(spare, new, old)


@pytest.mark.parametrize(("column", "given"), [("mask_url", None), ("Mask2", "Mask2")])
async def test_mask_column_is_detected_or_configured(spare: Project, column: str, given: str | None) -> None:
    """mask_url is detected; any other column works when SUPABASE_MASK_COLUMN names it."""
    task = spare.new_task()
    async with renamed(spare, "mask_image_url", column):
        await run_a_task(spare.open(mask_column=given), task)
    assert spare.row(task)[:2] == ("done", MASK_URL)


async def test_mask_column_that_changes_is_detected_again(spare: Project) -> None:
    """A column that is renamed while the server runs is detected again, and the result is stored."""
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
    """A missing column stops the start; at run time the log names it."""
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
    """A project without the table stops the start, and the error names the migrations."""
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
    """SUPABASE_MASK_COLUMN cannot name another column, or change the request."""
    with pytest.raises(ResultsMisconfigured, match="SUPABASE_MASK_COLUMN"):
        SupabaseResults("http://127.0.0.1:1", "sb_secret_0123456789", lease_s=LEASE_S, mask_column=column)


@pytest.mark.parametrize("right", ["select", "update"])
async def test_role_without_a_right_is_refused(spare: Project, right: str) -> None:
    """A role without the right to read or to update stops the start."""
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
async def test_missing_grant_is_named(spare: Project, revoke: str, sentence: str, grant: str) -> None:
    """The error names the role and the SQL that grants the right, and no key; the SQL works."""
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


async def test_role_that_the_api_cannot_use_is_named(spare: Project) -> None:
    """A JWT for a role that PostgREST may not use, or that does not exist, stops the start."""
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
    """When the role lacks a right to the columns of leases, the error names the file to run."""
    spare.database.execute("revoke select (lease_until) on segmentation_results from sam3_worker")
    key, publishable_key = spare.database.role_jwt("sam3_worker"), spare.database.publishable_key
    with pytest.raises(ResultsMisconfigured, match=r"run supabase/optional/sam3_worker\.sql"):
        await spare.open(key, publishable_key=publishable_key).check()
    spare.database.execute(WORKER_ROLE.read_text())
    await run_a_task(spare.open(key, publishable_key=publishable_key), spare.new_task())


async def test_missing_function_is_named(spare: Project) -> None:
    """A project with the columns of leases, but without the time function, stops the start."""
    execute = spare.database.execute
    execute("alter function segmentation_results_now() rename to elsewhere")
    try:
        with pytest.raises(ResultsMisconfigured, match=r"no function segmentation_results_now.*migrations"):
            await spare.open().check()
    finally:
        execute("alter function elsewhere() rename to segmentation_results_now")


async def test_missing_update_policy_is_logged(spare: Project, caplog: pytest.LogCaptureFixture) -> None:
    """Without an update policy PostgreSQL changes nothing and reports no error; the log names the cause."""
    spare.database.execute(
        """create role watcher; grant watcher to authenticator; grant usage on schema public to watcher;
        grant select, update on segmentation_results to watcher;
        create policy "watch" on segmentation_results for select to watcher using (true)"""
    )
    store = spare.open(spare.database.role_jwt("watcher"), publishable_key=spare.database.publishable_key)
    with pytest.raises(ResultsUnavailable):
        await store.claim(spare.new_task(), str(uuid4()))
    assert "lacks an update policy" in caplog.text


async def test_refused_key_is_not_a_missing_task(project: Project, caplog: pytest.LogCaptureFixture) -> None:
    """A wrong or revoked key stops the start; at run time it raises ResultsUnavailable and is logged."""
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
