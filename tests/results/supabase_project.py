"""A database behind a proxy that can fail, as the tests of the Supabase store use it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from results import Claim, Task
from results.supabase import SupabaseResults

if TYPE_CHECKING:
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
        self.database.execute(
            f"""set session_replication_role = replica;
            update segmentation_results set updated_at = updated_at - interval '{seconds} seconds'
            where id = '{task.task_id}'"""  # noqa: S608 - ours
        )

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
