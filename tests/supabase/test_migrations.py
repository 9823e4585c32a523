"""The table's rules for users, the Edge and this server, tested through PostgREST."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import httpx
import pytest

from tests.services import database as databases
from tests.services.database import MIGRATIONS, WORKER_ROLE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.services.database import Database

pytestmark = pytest.mark.services

TABLE = "segmentation_results"
OTHER_TABLES = ["users_profile", "projects"]
RIGHTS_MISSING = "42501"
CHECK_VIOLATED = "23514"
LEASE_COLUMNS = ["attempt_id", "lease_s", "lease_until"]


@pytest.fixture(scope="module", params=[False, True], ids=["no default grants", "default grants"])
def database(
    request: pytest.FixtureRequest, database: Database, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Database]:
    """A project with each of Supabase's default grants: the one since 2026-05-30, and the one before."""
    if not request.param:
        yield database
    else:
        with databases.database(tmp_path_factory.mktemp("granted"), default_grants=True) as granted:
            yield granted


def ask(database: Database, method: str, path: str, jwt: str | None, **sent: Any) -> httpx.Response:
    """One request in the role of `jwt`, or of anon, which returns the changed rows."""
    headers = {"Prefer": "return=representation", **sent.pop("headers", {})}
    return database.request(method, path, jwt=jwt, headers=headers, **sent)


def insert_row(database: Database, user_id: str) -> str:
    """Insert a pending row in the user's role, as the Edge does; returns its id."""
    row = {"id": str(uuid4()), "user_id": user_id, "source_image_url": "uploads/x", "text_prompt": "cat"}
    ask(database, "POST", TABLE, database.user_jwt(user_id), json=row).raise_for_status()
    return row["id"]


def row_of(database: Database, task_id: str) -> tuple[Any, ...]:
    """The row, read by the database's owner."""
    [row] = database.execute("select * from public.segmentation_results where id = %s", task_id)
    return row


@pytest.fixture(scope="module")
def user(database: Database) -> str:
    return database.add_user()


@pytest.fixture
def task_id(database: Database, user: str) -> str:
    return insert_row(database, user)


def test_new_row_has_its_defaults(database: Database, user: str, task_id: str) -> None:
    """The Edge writes four columns; the others have the table's defaults."""
    [row] = ask(database, "GET", f"{TABLE}?id=eq.{task_id}", database.user_jwt(user)).json()
    created, updated = (datetime.fromisoformat(row.pop(f"{name}_at")) for name in ("created", "updated"))
    assert row == {
        "id": task_id,
        "project_id": None,
        "user_id": user,
        "source_image_url": "uploads/x",
        "mask_image_url": None,
        "text_prompt": "cat",
        "labels": [],
        "metadata": {},
        "status": "pending",
        **dict.fromkeys(LEASE_COLUMNS),
    }
    assert created == updated
    assert abs(datetime.now(UTC) - created) < timedelta(minutes=1)


def test_updated_at_is_set_by_the_database(database: Database, task_id: str) -> None:
    """An update sets updated_at to the database's time, whatever value it holds."""
    [(before,)] = database.execute(
        "select updated_at from public.segmentation_results where id = %s", task_id
    )
    [(after,)] = database.execute(
        "update public.segmentation_results set updated_at = '2001-01-01' where id = %s returning updated_at",
        task_id,
    )
    assert after > before


@pytest.mark.parametrize("status", ["cancelled", "", "DONE", None])
def test_status_is_one_of_four(database: Database, user: str, task_id: str, status: str | None) -> None:
    """The status accepts no other value."""
    before = row_of(database, task_id)
    answer = ask(
        database, "PATCH", f"{TABLE}?id=eq.{task_id}", database.user_jwt(user), json={"status": status}
    )
    assert answer.status_code == httpx.codes.BAD_REQUEST
    assert answer.json()["code"] == (CHECK_VIOLATED if status is not None else "23502")
    assert row_of(database, task_id) == before


def test_anonymous_callers_have_no_access(database: Database, task_id: str) -> None:
    """The publishable key alone does not allow to read or change a row."""
    before = row_of(database, task_id)
    for method, sent in (("GET", None), ("PATCH", {"status": "done"}), ("DELETE", None), ("POST", {})):
        answer = ask(database, method, f"{TABLE}?id=eq.{task_id}", None, json=sent)
        assert (answer.status_code, answer.json()["code"]) == (401, RIGHTS_MISSING)
    assert row_of(database, task_id) == before


def test_users_see_only_their_own_rows(database: Database, user: str, task_id: str) -> None:
    """A user reads the user's own rows, and no other."""
    stranger = database.add_user()
    own = insert_row(database, stranger)
    seen = ask(database, "GET", f"{TABLE}?select=id", database.user_jwt(stranger)).json()
    assert seen == [{"id": own}]
    assert {"id": task_id} in ask(database, "GET", f"{TABLE}?select=id", database.user_jwt(user)).json()


def test_users_cannot_change_others_rows(database: Database, user: str, task_id: str) -> None:
    """A user cannot update, delete or insert another user's row, or transfer a row to another user."""
    stranger = database.add_user()
    jwt = database.user_jwt(stranger)
    before = row_of(database, task_id)
    assert ask(database, "PATCH", f"{TABLE}?id=eq.{task_id}", jwt, json={"status": "done"}).json() == []
    assert ask(database, "DELETE", f"{TABLE}?id=eq.{task_id}", jwt).json() == []
    row = {"user_id": user, "source_image_url": "uploads/x", "text_prompt": "cat"}
    # Returning the row would need the right to read it, and hide whether the insert is allowed.
    unread = {"Prefer": "return=minimal"}
    assert ask(database, "POST", TABLE, jwt, json=row, headers=unread).json()["code"] == RIGHTS_MISSING
    own = insert_row(database, stranger)
    moved = ask(database, "PATCH", f"{TABLE}?id=eq.{own}", jwt, json={"user_id": user})
    assert moved.json()["code"] == RIGHTS_MISSING
    assert row_of(database, task_id) == before


def test_users_may_delete_their_own(database: Database, user: str, task_id: str) -> None:
    """A user can delete an own row."""
    deleted = ask(database, "DELETE", f"{TABLE}?id=eq.{task_id}&select=id", database.user_jwt(user))
    assert deleted.json() == [{"id": task_id}]


def test_rows_are_deleted_with_their_user(database: Database) -> None:
    """Deleting an account deletes its tasks."""
    leaving = database.add_user()
    task_id = insert_row(database, leaving)
    database.execute("delete from auth.users where id = %s", leaving)
    assert database.execute("select 1 from public.segmentation_results where id = %s", task_id) == []


@pytest.mark.parametrize("path", OTHER_TABLES)
def test_parent_tables_show_own_rows_alone(database: Database, user: str, path: str) -> None:
    """The parent tables that the migrations create show users only their own rows."""
    database.execute("insert into public.projects (user_id) values (%s)", user)
    stranger = database.user_jwt(database.add_user())
    anonymous = ask(database, "GET", f"{path}?select=id", None)
    assert anonymous.json() == [] or anonymous.json()["code"] == RIGHTS_MISSING
    assert len(ask(database, "GET", f"{path}?select=id", database.user_jwt(user)).json()) >= 1
    assert len(ask(database, "GET", f"{path}?select=id", stranger).json()) <= 1


def test_realtime_publishes_the_table(database: Database) -> None:
    """The table is in the publication of Supabase Realtime, so that users receive its updates."""
    published = database.execute(
        "select tablename from pg_publication_tables where pubname = 'supabase_realtime'"
    )
    assert ("segmentation_results",) in published


def test_users_may_write_all_other_columns(database: Database, user: str, task_id: str) -> None:
    """A user may write every column of an own row but those of leases, and read all."""
    jwt = database.user_jwt(user)
    [row] = ask(database, "GET", f"{TABLE}?id=eq.{task_id}", jwt).json()
    written = {name: row[name] for name in row if name not in LEASE_COLUMNS}
    changed = {**written, "id": str(uuid4()), "labels": ["mine"], "mask_image_url": "mine"}
    [inserted] = ask(database, "POST", TABLE, jwt, json=changed).json()
    [updated] = ask(
        database, "PATCH", f"{TABLE}?id=eq.{task_id}", jwt, json={**changed, "id": task_id}
    ).json()
    for seen, own_id in ((inserted, changed["id"]), (updated, task_id)):
        assert {**seen, "updated_at": None} == {**row, **changed, "id": own_id, "updated_at": None}


@pytest.mark.parametrize("column", LEASE_COLUMNS)
def test_users_cannot_write_leases(database: Database, user: str, task_id: str, column: str) -> None:
    """A user cannot write the columns of leases, at the insert or later."""
    jwt, before = database.user_jwt(user), row_of(database, task_id)
    value = {"attempt_id": str(uuid4()), "lease_s": 3600, "lease_until": "2099-01-01"}[column]
    row = {"user_id": user, "source_image_url": "uploads/x", "text_prompt": "cat", column: value}
    for method, path, sent in (
        ("POST", TABLE, row),
        ("POST", TABLE, {**row, column: None}),
        ("PATCH", f"{TABLE}?id=eq.{task_id}", {column: value}),
        ("PATCH", f"{TABLE}?id=eq.{task_id}", {column: None}),
    ):
        answer = ask(database, method, path, jwt, json=sent)
        assert (answer.status_code, answer.json()["code"]) == (403, RIGHTS_MISSING)
    assert row_of(database, task_id) == before


@pytest.mark.parametrize("updated_at", ["infinity", "9999-12-31", "2001-01-01"])
def test_insert_cannot_set_updated_at(database: Database, user: str, updated_at: str) -> None:
    """The database sets updated_at at the insert too."""
    row = {"user_id": user, "source_image_url": "", "text_prompt": "", "updated_at": updated_at}
    [inserted] = ask(database, "POST", TABLE, database.user_jwt(user), json=row).json()
    assert abs(datetime.now(UTC) - datetime.fromisoformat(inserted["updated_at"])) < timedelta(minutes=1)


def test_service_role_has_the_four_verbs(database: Database, user: str) -> None:
    """The secret key allows to insert, select, update and delete in the table, and to read the others."""
    own = {"apikey": database.secret_key}
    row = {"user_id": user, "source_image_url": "uploads/x", "text_prompt": "cat"}
    [inserted] = ask(database, "POST", TABLE, None, json=row, **own).json()
    one = f"{TABLE}?id=eq.{inserted['id']}"
    assert ask(database, "GET", one, None, **own).json() == [inserted]
    assert ask(database, "PATCH", one, None, json={"labels": ["a"]}, **own).json()[0]["labels"] == ["a"]
    assert len(ask(database, "DELETE", one, None, **own).json()) == 1
    for other in OTHER_TABLES:
        assert ask(database, "GET", other, None, **own).status_code == httpx.codes.OK


def test_users_may_use_projects(database: Database, user: str) -> None:
    """Users may insert, select, update and delete their own rows of the parent table."""
    jwt = database.user_jwt(user)
    [project] = ask(database, "POST", "projects", jwt, json={"user_id": user}).json()
    one = f"projects?id=eq.{project['id']}"
    assert ask(database, "PATCH", one, jwt, json={"name": "mine"}).json()[0]["name"] == "mine"
    assert len(ask(database, "DELETE", one, jwt).json()) == 1


def lease_of(database: Database, task_id: str) -> tuple[Any, ...]:
    """The attempt id, the length of its lease, and the rest of it in seconds."""
    [(attempt_id, lease_s, left_s)] = database.execute(
        "select attempt_id, lease_s, extract(epoch from lease_until - now())"
        " from public.segmentation_results where id = %s",
        task_id,
    )
    return attempt_id, lease_s, None if left_s is None else float(left_s)


def test_lease_is_renewed_by_writing_it(database: Database, task_id: str) -> None:
    """Writing lease_s sets lease_until, with the same value too; null ends it; other updates keep it."""
    one, own = f"{TABLE}?id=eq.{task_id}", {"apikey": database.secret_key}
    claim = {"status": "processing", "attempt_id": "a", "lease_s": 60}
    for _ in range(2):
        ask(database, "PATCH", one, None, json=claim, **own).raise_for_status()
        assert lease_of(database, task_id) == ("a", 60, pytest.approx(60, abs=3))
        make_lease_older(database, task_id, 50)
    ask(database, "PATCH", one, None, json={"labels": [], "status": "error"}, **own).raise_for_status()
    assert lease_of(database, task_id) == ("a", 60, pytest.approx(10, abs=3))
    ask(database, "PATCH", one, None, json={"status": "done", "lease_s": None}, **own).raise_for_status()
    assert lease_of(database, task_id) == ("a", None, None)


def make_lease_older(database: Database, task_id: str, seconds: float) -> None:
    database.execute(
        f"""set session_replication_role = replica; update public.segmentation_results
        set lease_until = lease_until - interval '{seconds} seconds' where id = '{task_id}'"""  # noqa: S608
    )


def test_processing_without_a_lease_gets_one(database: Database, user: str, task_id: str) -> None:
    """A row that a user or an older server sets to processing gets 15 minutes, and the attempt id in it."""
    one, jwt, attempt_id = f"{TABLE}?id=eq.{task_id}", database.user_jwt(user), str(uuid4())
    for metadata, attempt in (
        ({}, None),
        ({"attempt": attempt_id}, attempt_id),
        ({"attempt": "x" * 99}, None),
    ):
        sent = {"status": "processing", "metadata": metadata}
        ask(database, "PATCH", one, jwt, json=sent).raise_for_status()
        assert lease_of(database, task_id) == (attempt, None, pytest.approx(900, abs=3))
    row = {"user_id": user, "source_image_url": "", "text_prompt": "", "status": "processing"}
    [inserted] = ask(database, "POST", TABLE, jwt, json=row).json()
    assert lease_of(database, inserted["id"]) == (None, None, pytest.approx(900, abs=3))


def test_user_cannot_change_a_valid_lease(database: Database, user: str, task_id: str) -> None:
    """Writing `processing` changes a lease only once it has expired."""
    one, jwt = f"{TABLE}?id=eq.{task_id}", database.user_jwt(user)
    claim = {"status": "processing", "attempt_id": "a", "lease_s": 60}
    ask(database, "PATCH", one, None, json=claim, apikey=database.secret_key).raise_for_status()
    sent = {"status": "processing", "metadata": {"attempt": str(uuid4())}}
    ask(database, "PATCH", one, jwt, json=sent).raise_for_status()
    assert lease_of(database, task_id) == ("a", 60, pytest.approx(60, abs=3))
    make_lease_older(database, task_id, 61)
    ask(database, "PATCH", one, jwt, json=sent).raise_for_status()
    assert lease_of(database, task_id)[2] == pytest.approx(900, abs=3)


def test_time_function_is_for_servers_alone(database: Database, user: str) -> None:
    """The service role and the worker's role may call the time function, and users may not."""
    path = "rpc/segmentation_results_now"
    for jwt in (database.service_role_key, database.role_jwt("sam3_worker")):
        answered = datetime.fromisoformat(ask(database, "GET", path, jwt).json())
        assert abs(datetime.now(UTC) - answered) < timedelta(minutes=1)
    for refused in (None, database.user_jwt(user)):
        assert ask(database, "GET", path, refused).json()["code"] == RIGHTS_MISSING


def test_worker_settles_with_six_columns(database: Database, user: str, task_id: str) -> None:
    """The least-privilege role can claim and settle a row with this server's filters."""
    jwt = database.role_jwt("sam3_worker")
    guard = (
        f"{TABLE}?id=eq.{task_id}&user_id=eq.{user}&status=eq.pending&updated_at=gt.2001-01-01"
        "&or=(lease_until.is.null,lease_until.lte.now)"
    )
    settled = {
        "status": "done",
        "mask_image_url": "https://masks.example/0.png",
        "labels": ["cat"],
        "metadata": {"attempt": "a"},
        "attempt_id": "a",
        "lease_s": 60,
    }
    counted = {"Prefer": "return=minimal, count=exact"}
    answer = ask(database, "PATCH", guard, jwt, json=settled, headers=counted)
    assert (answer.status_code, answer.headers["Content-Range"]) == (204, "0-0/1")
    seen = ask(database, "GET", f"{TABLE}?id=eq.{task_id}&select={','.join(settled)}", jwt)
    assert seen.json() == [settled]


@pytest.mark.parametrize(
    ("verb", "sent"),
    [
        ("GET source_image_url", None),
        ("GET text_prompt", None),
        ("GET *", None),
        ("PATCH id", {"user_id": str(uuid4())}),
        ("PATCH id", {"updated_at": "2001-01-01"}),
        ("PATCH id", {"lease_until": "2001-01-01"}),
        ("PATCH id", {"source_image_url": "uploads/y"}),
        ("DELETE id", None),
        ("POST id", {"source_image_url": "uploads/y", "text_prompt": "cat"}),
    ],
)
def test_worker_can_do_nothing_else(
    database: Database, user: str, task_id: str, verb: str, sent: dict[str, str] | None
) -> None:
    """Any other column and verb is refused, and the row does not change."""
    method, columns = verb.split()
    query = f"select={columns}" if method == "POST" else f"select={columns}&id=eq.{task_id}"
    if method == "POST" and sent is not None:
        sent = {**sent, "user_id": user}
    before = row_of(database, task_id)
    answer = ask(database, method, f"{TABLE}?{query}", database.role_jwt("sam3_worker"), json=sent)
    assert (answer.status_code, answer.json()["code"]) == (403, RIGHTS_MISSING)
    assert row_of(database, task_id) == before


@pytest.mark.parametrize("path", OTHER_TABLES)
def test_worker_sees_no_other_table(database: Database, path: str) -> None:
    """The least-privilege role can read no other table."""
    assert ask(database, "GET", path, database.role_jwt("sam3_worker")).json()["code"] == RIGHTS_MISSING


def test_policies_of_the_worker_do_not_apply_to_users(database: Database, user: str, task_id: str) -> None:
    """A user reads no other user's row after the worker's policies are applied."""
    stranger = database.add_user()
    assert ask(database, "GET", f"{TABLE}?id=eq.{task_id}", database.user_jwt(stranger)).json() == []
    assert len(ask(database, "GET", f"{TABLE}?id=eq.{task_id}", database.user_jwt(user)).json()) == 1


def test_migrations_apply_again(database: Database, user: str, task_id: str) -> None:
    """Applying the migrations and the role's file again changes no row and no rule."""
    before = row_of(database, task_id), _rules(database)
    for path in (*MIGRATIONS, WORKER_ROLE):
        database.execute(path.read_text())
    assert (row_of(database, task_id), _rules(database)) == before
    assert insert_row(database, user)


def _rules(database: Database) -> list[list[tuple[Any, ...]]]:
    """The policies, indexes, triggers, publications and grants of the tables."""
    return [
        database.execute(f"select {columns} from {catalogue} where schemaname = 'public' order by 1, 2")  # noqa: S608
        for columns, catalogue in [
            ("tablename, policyname, roles::text, cmd, qual, with_check", "pg_policies"),
            ("tablename, rowsecurity::text", "pg_tables"),
            ("tablename, indexdef", "pg_indexes"),
            ("pubname, tablename", "pg_publication_tables"),
        ]
    ] + [
        database.execute("select tgname, tgenabled from pg_trigger where not tgisinternal order by 1"),
        database.execute(
            "select grantee, column_name, privilege_type from information_schema.column_privileges"
            " where table_schema = 'public' and table_name = 'segmentation_results'"
            " and grantee in ('anon', 'authenticated', 'service_role', 'sam3_worker') order by 1, 2, 3"
        ),
        database.execute(
            "select grantee, privilege_type from information_schema.routine_privileges"
            " where routine_name = 'segmentation_results_now' order by 1, 2"
        ),
    ]


@pytest.fixture(scope="module", params=[False, True], ids=["no default grants", "default grants"])
def before_leases(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Database]:
    """A project with the first migration alone, with each of the default grants."""
    with databases.database(
        tmp_path_factory.mktemp("before"), default_grants=request.param, migrations=MIGRATIONS[:1]
    ) as project:
        yield project


def test_leases_are_added_to_a_project_with_rows(before_leases: Database, database: Database) -> None:
    """The second migration gives processing rows a lease, and makes the same rules as on an empty project."""
    database, whole = before_leases, database
    user_id, attempt_id = database.add_user(), str(uuid4())
    tasks: dict[str, str] = {}
    for status in ("pending", "processing", "done", "error"):
        [(tasks[status],)] = database.execute(
            "insert into public.segmentation_results"
            " (user_id, source_image_url, text_prompt, status, metadata)"
            " values (%s, '', '', %s, jsonb_build_object('attempt', %s::text)) returning id::text",
            *(user_id, status, attempt_id),
        )
    for _ in range(2):
        database.execute(MIGRATIONS[1].read_text())
        for status in ("pending", "done", "error"):
            assert lease_of(database, tasks[status]) == (None, None, None)
        assert lease_of(database, tasks["processing"]) == (attempt_id, None, pytest.approx(900, abs=10))
        assert _rules(database) == _rules(whole)


def test_column_of_the_application_gets_its_grant(before_leases: Database) -> None:
    """Applying the migration again grants users a column that the application has added."""
    database = before_leases
    database.execute(MIGRATIONS[1].read_text())
    database.execute('alter table public.segmentation_results add column "Odd, note" text')
    for may in (False, True):
        assert database.execute(
            "select has_column_privilege('authenticated', %s, 'Odd, note', 'update')", f"public.{TABLE}"
        ) == [(may,)]
        database.execute(MIGRATIONS[1].read_text())
    database.execute('alter table public.segmentation_results drop column "Odd, note"')
