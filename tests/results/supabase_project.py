"""A database behind a proxy that can fail, as the tests of the Supabase store use it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from results import Claim, Task
from results.supabase import SupabaseResults

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AsyncExitStack

    from tests.services.database import Database
    from tests.services.faults import FaultProxy

MASK_URL = "https://masks.example/0.png"


@dataclass(frozen=True, slots=True)
class Project:
    """A database behind a proxy that can fail; its stores are closed at the test's end."""

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
        self.database.execute(
            "insert into segmentation_results (id, user_id, source_image_url, text_prompt)"
            " values (%s, %s, %s, %s)",
            *(task.task_id, task.user_id, task.source_image_url, task.text_prompt),
        )
        return task

    def make_older(self, task: Task, seconds: float) -> None:
        """Let the row's times lie further back, as if `seconds` had passed."""
        times = ["updated_at"] + ["lease_until"] * self.has_leases()
        older = ", ".join(f"{time} = {time} - interval '{seconds} seconds'" for time in times)
        # Without the triggers that set them.
        self.database.execute(
            f"""set session_replication_role = replica;
            update segmentation_results set {older} where id = '{task.task_id}'"""  # noqa: S608 - ours
        )

    def has_leases(self) -> bool:
        """Whether the table has the columns of leases."""
        found = self.database.execute(
            "select 1 from information_schema.columns"
            " where table_name = 'segmentation_results' and column_name = 'lease_until'"
        )
        return found != []

    def insert_forged(self, user_id: str, columns: Mapping[str, str], count: int = 1) -> None:
        """Rows with SQL expressions in `columns`, past every trigger, as an older table let users insert."""
        names, values = ", ".join(["", *columns]), ", ".join(["", *columns.values()])
        self.database.execute(
            f"""set session_replication_role = replica;
            insert into segmentation_results (user_id, source_image_url, text_prompt{names})
            select '{user_id}', '', ''{values} from generate_series(1, {count})"""  # noqa: S608 - ours
        )

    def edit_as_user(self, task: Task, **content: object) -> None:
        """What the row's user writes through the API."""
        path, jwt = f"segmentation_results?id=eq.{task.task_id}", self.database.user_jwt(task.user_id)
        self.database.request("PATCH", path, jwt=jwt, json=content).raise_for_status()

    def row(self, task: Task) -> tuple[Any, ...]:
        """Status, mask's URL, labels and metadata."""
        [row] = self.database.execute(
            "select status, mask_image_url, labels, metadata from segmentation_results where id = %s",
            task.task_id,
        )
        return row


async def claimed(store: SupabaseResults, task: Task) -> Claim:
    claim = await store.claim(task, str(uuid4()))
    assert isinstance(claim, Claim)
    return claim


async def finish(store: SupabaseResults, claim: Claim) -> None:
    await store.update_result(
        claim.task_id, MASK_URL, ["cat"], {"confidence": 0.5}, attempt_id=claim.attempt_id
    )
