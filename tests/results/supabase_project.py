"""A Supabase project behind a proxy that can fail, for the tests of the Supabase store."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from results import Task
from results.supabase import SupabaseResults
from tests.services.faults import fault_proxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from tests.services.database import Database
    from tests.services.faults import FaultProxy


@dataclass(frozen=True, slots=True)
class Project:
    """A database behind a proxy; made by `open_project`, which closes its stores."""

    database: Database
    proxy: FaultProxy
    _stores: AsyncExitStack

    def open(self, key: str | None = None, **options: Any) -> SupabaseResults:
        options = {"lease_s": 120.0, "timeout_s": 3.0, **options}
        store = SupabaseResults(self.proxy.url, key or self.database.secret_key, **options)
        self._stores.push_async_callback(store.close)
        return store

    def new_task(self) -> Task:
        """A task that the Edge has just inserted."""
        task = Task(str(uuid4()), self.database.add_user(), "uploads/user-1/cat", ("a secret prompt",))
        insert_pending(self.database, task)
        return task

    def make_older(self, task: Task, seconds: float) -> None:
        """Move the row's times back, as if `seconds` had passed."""
        columns = ["updated_at"] + ["lease_until"] * self.has_leases()
        move_times_back(self.database, [task.task_id], columns, seconds)

    def has_leases(self) -> bool:
        """Whether the table has the columns of leases."""
        found = self.database.execute(
            "select 1 from information_schema.columns"
            " where table_name = 'segmentation_results' and column_name = 'lease_until'"
        )
        return found != []

    def insert_forged(self, user_id: str, columns: Mapping[str, str], count: int = 1) -> None:
        """Insert rows with SQL expressions in `columns`, without the triggers, as old tables let users do."""
        names, values = ", ".join(["", *columns]), ", ".join(["", *columns.values()])
        self.database.execute(
            f"""set session_replication_role = replica;
            insert into segmentation_results (user_id, source_image_url, text_prompt{names})
            select '{user_id}', '', ''{values} from generate_series(1, {count})"""  # noqa: S608 - no outside input
        )

    def edit_as_user(self, task: Task, **content: object) -> None:
        """Update the row through the API, as its user."""
        path, jwt = f"segmentation_results?id=eq.{task.task_id}", self.database.user_jwt(task.user_id)
        self.database.request("PATCH", path, jwt=jwt, json=content).raise_for_status()

    def row(self, task: Task) -> tuple[Any, ...]:
        """Status, mask URL, labels and metadata."""
        [row] = self.database.execute(
            "select status, mask_image_url, labels, metadata from segmentation_results where id = %s",
            task.task_id,
        )
        return row


@asynccontextmanager
async def open_project(database: Database) -> AsyncIterator[Project]:
    """The project of `database`, behind a proxy of its own."""
    with fault_proxy(database.url) as proxy:
        async with AsyncExitStack() as stores:
            yield Project(database, proxy, stores)


def insert_pending(database: Database, task: Task) -> None:
    """Insert the row of a new task, as the Edge does; its user must exist."""
    database.execute(
        "insert into segmentation_results (id, user_id, source_image_url, text_prompt)"
        " values (%s, %s, %s, %s)",
        *(task.task_id, task.user_id, task.source_image_url, task.text_prompt),
    )


def move_times_back(
    database: Database, task_ids: Sequence[str], columns: Sequence[str], seconds: float
) -> None:
    """Subtract `seconds` from columns of rows, bypassing the triggers that set them."""
    ids = ", ".join(f"'{task_id}'" for task_id in task_ids)
    older = ", ".join(f"{column} = {column} - interval '{seconds} seconds'" for column in columns)
    database.execute(
        f"""set session_replication_role = replica;
        update segmentation_results set {older} where id in ({ids})"""  # noqa: S608 - no outside input
    )
