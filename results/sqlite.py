"""Task rows in one SQLite file: the embedded default, shared by the processes of one host."""

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal

from results.base import Claim, Row, Status, StoredResult, Task
from results.errors import (
    AlreadySettled,
    AttemptLost,
    MetadataInvalid,
    TaskInProgress,
    TaskNotFound,
)
from results.sqlite_file import SqliteFile

# The columns of the Supabase table; times are UTC text of a fixed width, which sorts in order of time.
_MIGRATIONS: Final = (
    # Version 1: what server 0.1.0 wrote, without a version.
    (
        """CREATE TABLE IF NOT EXISTS segmentation_results (
            id TEXT PRIMARY KEY,
            user_id TEXT NOT NULL,
            source_image_url TEXT NOT NULL,
            mask_image_url TEXT,
            text_prompt TEXT NOT NULL,
            labels TEXT NOT NULL DEFAULT '[]' CHECK (json_valid(labels)),
            metadata TEXT NOT NULL DEFAULT '{}' CHECK (json_valid(metadata)),
            status TEXT NOT NULL DEFAULT 'pending'
                CHECK (status IN ('pending', 'processing', 'done', 'error')),
            created_at TEXT NOT NULL,
            updated_at TEXT NOT NULL,
            CHECK (status <> 'done' OR mask_image_url IS NOT NULL)
        ) STRICT""",
    ),
    # Version 2: columns for the attempt and its lease; lease_until_s is a time of time.monotonic.
    (
        "ALTER TABLE segmentation_results ADD COLUMN attempt_id TEXT",
        "ALTER TABLE segmentation_results ADD COLUMN lease_s REAL",
        "ALTER TABLE segmentation_results ADD COLUMN lease_until_s REAL",
        """UPDATE segmentation_results SET attempt_id = json_extract(metadata, '$.attempt'),
            metadata = json_remove(metadata, '$.attempt'),
            lease_s = CASE WHEN status = 'processing' THEN 0 END,
            lease_until_s = CASE WHEN status = 'processing' THEN 0 END""",
        """CREATE INDEX segmentation_results_processing ON segmentation_results (lease_until_s)
            WHERE status = 'processing'""",
    ),
)

_INSERT: Final = """
INSERT INTO segmentation_results (id, user_id, source_image_url, text_prompt, created_at, updated_at)
VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"""

# A lease that ends further ahead than its own length was written before the host's last boot.
_IS_EXPIRED: Final = "(lease_until_s + :grace_s <= :clock_s OR lease_until_s > :clock_s + lease_s)"

_CLAIM: Final = f"""
UPDATE segmentation_results SET status = 'processing', metadata = '{{}}', updated_at = :now,
    attempt_id = :attempt_id, lease_s = :lease_s, lease_until_s = :clock_s + :lease_s
WHERE id = :task_id AND user_id = :user_id AND (status = 'pending'
    OR (status = 'error' AND (attempt_id IS NOT :attempt_id OR lease_s IS NOT NULL))
    OR (status = 'processing' AND ({_IS_EXPIRED} OR attempt_id = :attempt_id)))"""

# `end_stale` does not change the lease: a late result of that attempt is still stored.
_SETTLE: Final = """
UPDATE segmentation_results SET status = :status, mask_image_url = :mask_url, labels = :labels,
    metadata = :metadata, updated_at = :now, lease_s = NULL, lease_until_s = NULL
WHERE id = :task_id AND status <> 'done' AND lease_s IS NOT NULL AND attempt_id = :attempt_id"""

_END_STALE: Final = f"""
UPDATE segmentation_results SET status = 'error', metadata = :metadata, updated_at = :now
WHERE status = 'processing' AND {_IS_EXPIRED}"""

_IS_SETTLED: Final = """
SELECT (status, mask_image_url, labels, metadata) IS (:status, :mask_url, :labels, :metadata)
FROM segmentation_results WHERE id = :task_id AND attempt_id = :attempt_id AND lease_s IS NULL"""

_SELECT: Final = """
SELECT user_id, status, attempt_id, mask_image_url, labels, metadata, created_at, updated_at, lease_until_s
FROM segmentation_results WHERE id = :task_id"""

_STALE_MESSAGE: Final = "the task was not finished in time; try again"


class SqliteResults:
    """A ResultStore in the SQLite file `path`, which is created when it is missing.

    Another attempt may take over `lease_s` seconds after a claim. `now` is the clock of the rows' times;
    `clock_s` measures leases: a monotonic clock that all processes of this host share.
    There is no Edge that inserts rows, so `claim` inserts a missing one.
    Raises ResultsMisconfigured when the file cannot be opened.
    """

    def __init__(
        self,
        path: Path,
        lease_s: float,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._lease_s = lease_s
        self._now = now
        self._clock_s = clock_s
        self._file = SqliteFile(path, _MIGRATIONS)

    async def claim(self, task: Task, attempt_id: str) -> Claim | StoredResult:
        """See ResultStore; a missing row is inserted."""
        return await self._file.run(lambda: self._claim(task, attempt_id))

    async def update_result(
        self, task_id: str, mask_url: str, labels: list[str], metadata: dict[str, object], *, attempt_id: str
    ) -> None:
        """See ResultStore."""
        await self._settle(task_id, attempt_id, "done", mask_url=mask_url, labels=labels, metadata=metadata)

    async def update_status(
        self, task_id: str, status: Status, *, attempt_id: str, error_message: str | None = None
    ) -> None:
        """See ResultStore."""
        if status != "error":
            raise ValueError("update_status accepts 'error' alone; update_result stores a result")
        metadata: dict[str, object] = {} if error_message is None else {"error_message": error_message}
        await self._settle(task_id, attempt_id, status, mask_url=None, labels=[], metadata=metadata)

    async def insert_pending(self, task: Task) -> None:
        """Insert the row of a new task, as the Edge does; nothing happens when it exists."""
        await self._file.run(lambda: self._insert(task))

    async def get(self, task_id: str) -> Row | None:
        """The current row of any user; None when there is none."""
        found = await self._file.run(lambda: self._select(task_id))
        return None if found is None else found[1]

    async def refuse(self, task: Task, error_message: str) -> None:
        """See ResultStore."""
        await self._file.run(lambda: self._refuse(task, error_message))

    async def end_stale(self, grace_s: float) -> int:
        """See ResultStore. Needed only when the outbox's file was lost."""
        return await self._file.run(lambda: self._end_stale(grace_s))

    async def check(self) -> list[str]:
        """See ResultStore; the constructor has verified the file."""
        return []

    async def close(self) -> None:
        """See ResultStore; closing twice is harmless."""
        await self._file.close()

    def describe(self) -> str:
        """See ResultStore."""
        return f"SQLite file {self._path} (embedded results)"

    def _claim(self, task: Task, attempt_id: str) -> Claim | StoredResult:
        with self._file.transaction():
            values = {
                "task_id": task.task_id,
                "user_id": task.user_id,
                "attempt_id": attempt_id,
                "lease_s": self._lease_s,
                "grace_s": 0.0,
                **self._times(),
            }
            self._insert(task)
            if self._file.db.execute(_CLAIM, values).rowcount == 1:
                return Claim(task.task_id, attempt_id)
            return self._stored_result(task, attempt_id)

    def _stored_result(self, task: Task, attempt_id: str) -> StoredResult:
        """The result of a task that cannot be claimed; raises the reason when it is not done."""
        found = self._select(task.task_id)
        if found is None or found[0] != task.user_id:
            raise TaskNotFound(task.task_id)
        _, row, lease_until_s = found
        if row.status == "error" and row.attempt_id == attempt_id:
            raise AttemptLost(task.task_id)
        if row.status != "done" or row.mask_url is None:
            raise TaskInProgress(task.task_id, (lease_until_s or 0.0) - self._clock_s())
        return StoredResult(task.task_id, row.mask_url, row.labels, row.metadata)

    def _end_stale(self, grace_s: float) -> int:
        with self._file.transaction():
            values = {
                "metadata": _json({"error_message": _STALE_MESSAGE}),
                "grace_s": grace_s,
                **self._times(),
            }
            return self._file.db.execute(_END_STALE, values).rowcount

    def _times(self) -> dict[str, object]:
        """The clocks; read inside a transaction, since the wait for it may take seconds."""
        return {"now": _format_time(self._now()), "clock_s": self._clock_s()}

    def _refuse(self, task: Task, error_message: str) -> None:
        self._insert(task)
        self._file.db.execute(
            """UPDATE segmentation_results SET status = 'error', metadata = ?, updated_at = ?
            WHERE id = ? AND user_id = ? AND status = 'pending'""",
            (_json({"error_message": error_message}), _format_time(self._now()), task.task_id, task.user_id),
        )

    async def _settle(
        self,
        task_id: str,
        attempt_id: str,
        status: Literal["done", "error"],
        *,
        mask_url: str | None,
        labels: list[str],
        metadata: dict[str, object],
    ) -> None:
        # The attempt id stays in the settled row: it identifies a repeat of this write.
        values = {
            "task_id": task_id,
            "attempt_id": attempt_id,
            "status": status,
            "mask_url": mask_url,
            "labels": _json(labels),
            "metadata": _json(metadata),
            "now": _format_time(self._now()),
        }
        await self._file.run(lambda: self._write_settled(values))

    def _write_settled(self, values: dict[str, str | None]) -> None:
        with self._file.transaction():
            if self._file.db.execute(_SETTLE, values).rowcount == 1:
                return
            task_id = str(values["task_id"])
            found = self._file.db.execute(_IS_SETTLED, values).fetchone()
            if found is None:
                raise TaskNotFound(task_id) if self._select(task_id) is None else AttemptLost(task_id)
            if not found[0]:
                raise AlreadySettled(task_id)

    def _insert(self, task: Task) -> None:
        values = (task.task_id, task.user_id, task.source_image_url, task.text_prompt)
        self._file.db.execute(_INSERT, (*values, *[_format_time(self._now())] * 2))

    def _select(self, task_id: str) -> tuple[str, Row, float | None] | None:
        """The user_id, the row, and the end of its lease (s, of `clock_s`)."""
        found = self._file.db.execute(_SELECT, {"task_id": task_id}).fetchone()
        if found is None:
            return None
        user_id, status, attempt_id, mask_url, labels, metadata, created_at, updated_at, lease_until_s = found
        row = Row(
            status=status,
            attempt_id=attempt_id,
            mask_url=mask_url,
            labels=json.loads(labels),
            metadata=json.loads(metadata),
            created_at=datetime.fromisoformat(created_at),
            updated_at=datetime.fromisoformat(updated_at),
        )
        return user_id, row, lease_until_s


def _json(value: object) -> str:
    try:
        # Sorted, so that a repeat of the same write gives the same text.
        return json.dumps(value, allow_nan=False, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise MetadataInvalid("labels or metadata hold a value that JSON cannot represent") from error


def _format_time(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="microseconds")
