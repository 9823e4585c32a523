"""The table's rules, met through PostgREST as users, the Edge and this server meet them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import httpx
import pytest

from tests.services.database import MIGRATIONS, WORKER_ROLE

if TYPE_CHECKING:
    from tests.services.database import Database

TABLE = "segmentation_results"
OTHER_TABLES = ["users_profile", "projects"]
RIGHTS_MISSING = "42501"
CHECK_VIOLATED = "23514"


def ask(database: Database, method: str, path: str, jwt: str | None, **sent: Any) -> httpx.Response:
    """One call in the role of `jwt`, or of anon, that asks for the rows it changed."""
    headers = {"Prefer": "return=representation", **sent.pop("headers", {})}
    return database.request(method, path, jwt=jwt, headers=headers, **sent)


def insert_row(database: Database, user_id: str) -> str:
    """A pending row of the user's, inserted as the Edge does: in the user's role."""
    row = {"id": str(uuid4()), "user_id": user_id, "source_image_url": "uploads/x", "text_prompt": "cat"}
    ask(database, "POST", TABLE, database.user_jwt(user_id), json=row).raise_for_status()
    return row["id"]


def row_of(database: Database, task_id: str) -> tuple[Any, ...]:
    """The row as it stands, whoever asks."""
    [row] = database.execute("select * from public.segmentation_results where id = %s", task_id)
    return row


@pytest.fixture(scope="module")
def user(database: Database) -> str:
    return database.add_user()


@pytest.fixture
def task_id(database: Database, user: str) -> str:
    return insert_row(database, user)


def test_new_row_has_its_defaults(database: Database, user: str, task_id: str) -> None:
    """The Edge names four columns; the rest of a pending task is the table's."""
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
    }
    assert created == updated
    assert abs(datetime.now(UTC) - created) < timedelta(minutes=1)


def test_updated_at_is_the_databases(database: Database, task_id: str) -> None:
    """An update moves updated_at, whatever time the update itself names."""
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
    """No other word gets into the status."""
    before = row_of(database, task_id)
    answer = ask(
        database, "PATCH", f"{TABLE}?id=eq.{task_id}", database.user_jwt(user), json={"status": status}
    )
    assert answer.status_code == httpx.codes.BAD_REQUEST
    assert answer.json()["code"] == (CHECK_VIOLATED if status is not None else "23502")
    assert row_of(database, task_id) == before


def test_anonymous_callers_see_nothing(database: Database, task_id: str) -> None:
    """With the publishable key alone nobody reads or changes a row."""
    before = row_of(database, task_id)
    assert ask(database, "GET", TABLE, None).json() == []
    assert ask(database, "PATCH", f"{TABLE}?id=eq.{task_id}", None, json={"status": "done"}).json() == []
    assert ask(database, "DELETE", f"{TABLE}?id=eq.{task_id}", None).json() == []
    assert row_of(database, task_id) == before


def test_users_see_their_own_rows_alone(database: Database, user: str, task_id: str) -> None:
    """A user's list holds the user's own rows, another's does not."""
    stranger = database.add_user()
    own = insert_row(database, stranger)
    seen = ask(database, "GET", f"{TABLE}?select=id", database.user_jwt(stranger)).json()
    assert seen == [{"id": own}]
    assert {"id": task_id} in ask(database, "GET", f"{TABLE}?select=id", database.user_jwt(user)).json()


def test_users_cannot_touch_others_rows(database: Database, user: str, task_id: str) -> None:
    """Nobody updates, deletes, inserts for or gives a row to another user."""
    stranger = database.add_user()
    jwt = database.user_jwt(stranger)
    before = row_of(database, task_id)
    assert ask(database, "PATCH", f"{TABLE}?id=eq.{task_id}", jwt, json={"status": "done"}).json() == []
    assert ask(database, "DELETE", f"{TABLE}?id=eq.{task_id}", jwt).json() == []
    row = {"user_id": user, "source_image_url": "uploads/x", "text_prompt": "cat"}
    # Asking for the row back would need the right to read it, and so hide what the insert may do.
    unread = {"Prefer": "return=minimal"}
    assert ask(database, "POST", TABLE, jwt, json=row, headers=unread).json()["code"] == RIGHTS_MISSING
    own = insert_row(database, stranger)
    moved = ask(database, "PATCH", f"{TABLE}?id=eq.{own}", jwt, json={"user_id": user})
    assert moved.json()["code"] == RIGHTS_MISSING
    assert row_of(database, task_id) == before


def test_users_may_delete_their_own(database: Database, user: str, task_id: str) -> None:
    """A task's owner can delete it, also while it is processed."""
    deleted = ask(database, "DELETE", f"{TABLE}?id=eq.{task_id}&select=id", database.user_jwt(user))
    assert deleted.json() == [{"id": task_id}]


def test_rows_go_with_their_user(database: Database) -> None:
    """When an account is deleted, so are its tasks."""
    leaving = database.add_user()
    task_id = insert_row(database, leaving)
    database.execute("delete from auth.users where id = %s", leaving)
    assert database.execute("select 1 from public.segmentation_results where id = %s", task_id) == []


@pytest.mark.parametrize("path", OTHER_TABLES)
def test_parents_are_not_open(database: Database, user: str, path: str) -> None:
    """The parent tables, where this repository makes them, show users no more than their own rows."""
    database.execute("insert into public.projects (user_id) values (%s)", user)
    stranger = database.user_jwt(database.add_user())
    assert ask(database, "GET", f"{path}?select=id", None).json() == []
    assert len(ask(database, "GET", f"{path}?select=id", database.user_jwt(user)).json()) >= 1
    assert len(ask(database, "GET", f"{path}?select=id", stranger).json()) <= 1


def test_realtime_publishes_the_table(database: Database) -> None:
    """Users who watch their row hear of its updates."""
    published = database.execute(
        "select tablename from pg_publication_tables where pubname = 'supabase_realtime'"
    )
    assert ("segmentation_results",) in published


def test_worker_settles_with_four_columns(database: Database, user: str, task_id: str) -> None:
    """The least-privilege role claims and settles a row by the filters that this server uses."""
    jwt = database.role_jwt("sam3_worker")
    guard = f"{TABLE}?id=eq.{task_id}&user_id=eq.{user}&status=eq.pending&updated_at=gt.2001-01-01"
    settled = {
        "status": "done",
        "mask_image_url": "https://masks.example/0.png",
        "labels": ["cat"],
        "metadata": {"attempt": "a"},
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
        ("PATCH id", {"source_image_url": "uploads/y"}),
        ("DELETE id", None),
        ("POST id", {"source_image_url": "uploads/y", "text_prompt": "cat"}),
    ],
)
def test_worker_can_do_nothing_else(
    database: Database, user: str, task_id: str, verb: str, sent: dict[str, str] | None
) -> None:
    """Every other column and every other verb is refused, and the row stays."""
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
    """The least-privilege role reads tasks alone."""
    assert ask(database, "GET", path, database.role_jwt("sam3_worker")).json()["code"] == RIGHTS_MISSING


def test_users_cannot_become_the_worker(database: Database, user: str, task_id: str) -> None:
    """The worker's policies hold for its own role alone: a user still sees no stranger's row."""
    stranger = database.add_user()
    assert ask(database, "GET", f"{TABLE}?id=eq.{task_id}", database.user_jwt(stranger)).json() == []
    assert len(ask(database, "GET", f"{TABLE}?id=eq.{task_id}", database.user_jwt(user)).json()) == 1


def test_migrations_apply_again(database: Database, user: str, task_id: str) -> None:
    """Applied to a database that has them, the migrations and the role's file change no row and no rule."""
    before = row_of(database, task_id), _rules(database)
    for path in (*MIGRATIONS, WORKER_ROLE):
        database.execute(path.read_text())
    assert (row_of(database, task_id), _rules(database)) == before
    assert insert_row(database, user)


def _rules(database: Database) -> list[list[tuple[Any, ...]]]:
    """All that decides who may do what with the tables, and what is done beside it."""
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
            " where table_schema = 'public' and grantee = 'sam3_worker' order by 1, 2, 3"
        ),
    ]
