"""Task rows in one SQLite file: the embedded default, shared by the processes of one machine."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from results.base import Claim, Row, SettledStatus, Status, StoredResult, Task
from results.errors import (
    AttemptLost,
    MetadataInvalid,
    TaskInProgress,
    TaskNotFound,
)
from results.sqlite_file import SqliteFile

# The columns of the Supabase table; times as UTC text of one width, which sorts as time does.
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS segmentation_results (
    id TEXT PRIMARY KEY,
    user_id TEXT NOT NULL,
    source_image_url TEXT NOT NULL,
    mask_image_url TEXT,
    text_prompt TEXT NOT NULL,
    labels TEXT NOT NULL DEFAULT '[]' CHECK (json_valid(labels)),
    metadata TEXT NOT NULL DEFAULT '{}' CHECK (json_valid(metadata)),
    status TEXT NOT NULL DEFAULT 'pending' CHECK (status IN ('pending', 'processing', 'done', 'error')),
    created_at TEXT NOT NULL,
    updated_at TEXT NOT NULL,
    CHECK (status <> 'done' OR mask_image_url IS NOT NULL)
) STRICT"""

_INSERT: Final = """
INSERT INTO segmentation_results (id, user_id, source_image_url, text_prompt, created_at, updated_at)
VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"""

# A lease that ends further ahead than one lease was written before the clock was set back.
_CLAIM: Final = """
UPDATE segmentation_results SET status = 'processing', metadata = :metadata, updated_at = :now
WHERE id = :task_id AND user_id = :user_id AND (
    status IN ('pending', 'error')
    OR (status = 'processing' AND (
        updated_at <= :lease_start OR updated_at > :lease_end
        OR json_extract(metadata, '$.attempt') = :attempt_id)))"""

_SETTLE: Final = """
UPDATE segmentation_results SET status = :status, mask_image_url = :mask_url, labels = :labels,
    metadata = :metadata, updated_at = :now
WHERE id = :task_id AND status = 'processing' AND json_extract(metadata, '$.attempt') = :attempt_id"""

_IS_SETTLED: Final = """
SELECT 1 FROM segmentation_results WHERE id = :task_id
AND (status, mask_image_url, labels, metadata) IS (:status, :mask_url, :labels, :metadata)"""

_SELECT: Final = """
SELECT user_id, status, mask_image_url, labels, metadata, created_at, updated_at
FROM segmentation_results WHERE id = :task_id"""


class SqliteResults:
    """A ResultStore in the SQLite file `path`, which is made when it is missing.

    An attempt may be taken over `lease_s` seconds after its claim. `now` is the clock.
    No Edge is there to insert rows, so `claim` inserts a missing one.
    Raises ResultsUnavailable when the file cannot be opened.
    """

    def __init__(
        self, path: Path, lease_s: float, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._path = path
        self._lease = timedelta(seconds=lease_s)
        self._now = now
        self._file = SqliteFile(path, _SCHEMA)

    async def claim(self, task: Task, attempt_id: str) -> Claim | StoredResult:
        """See ResultStore; a missing row is made."""
        return await self._file.run(lambda: self._claim(task, attempt_id))

    async def update_result(
        self, task_id: str, mask_url: str, labels: list[str], metadata: dict[str, object], *, attempt_id: str
    ) -> None:
        """See ResultStore."""
        await self._settle(task_id, attempt_id, "done", mask_url=mask_url, labels=labels, metadata=metadata)

    async def update_status(
        self, task_id: str, status: SettledStatus, *, attempt_id: str, error_message: str | None = None
    ) -> None:
        """See ResultStore."""
        if status not in ("pending", "error"):
            raise ValueError("an attempt ends as 'pending' or 'error' here; a result needs update_result")
        metadata: dict[str, object] = {} if error_message is None else {"error_message": error_message}
        await self._settle(task_id, attempt_id, status, mask_url=None, labels=[], metadata=metadata)

    async def insert_pending(self, task: Task) -> None:
        """Make the row of a new task, as the Edge does; nothing happens when it exists."""
        await self._file.run(lambda: self._insert(task))

    async def get(self, task_id: str) -> Row | None:
        """The row as it stands, whosever it is; None when there is none."""
        found = await self._file.run(lambda: self._select(task_id))
        return None if found is None else found[1]

    async def end_stale(self, older_than_s: float) -> int:  # noqa: ARG002 - the Protocol's
        """See ResultStore; no other machine has these rows, and this one's outbox knows what it began."""
        return 0

    async def check(self) -> list[str]:
        """See ResultStore; opening the file has proved it."""
        return []

    async def close(self) -> None:
        """See ResultStore; closing twice is harmless."""
        await self._file.close()

    def describe(self) -> str:
        """See ResultStore."""
        return f"SQLite file {self._path} (embedded results)"

    def _claim(self, task: Task, attempt_id: str) -> Claim | StoredResult:
        now = self._now()
        values = {
            "task_id": task.task_id,
            "user_id": task.user_id,
            "attempt_id": attempt_id,
            "metadata": _json({"attempt": attempt_id}),
            "lease_start": _text(now - self._lease),
            "lease_end": _text(now + self._lease),
            "now": _text(now),
        }
        with self._file.transaction():
            self._insert(task)
            if self._file.db.execute(_CLAIM, values).rowcount == 1:
                return Claim(task.task_id, attempt_id)
            return self._why_not_claimed(task, now)

    def _why_not_claimed(self, task: Task, now: datetime) -> StoredResult:
        found = self._select(task.task_id)
        if found is None or found[0] != task.user_id:
            raise TaskNotFound(task.task_id)
        row = found[1]
        if row.status != "done" or row.mask_url is None:
            raise TaskInProgress(task.task_id, (row.updated_at + self._lease - now).total_seconds())
        metadata = {key: value for key, value in row.metadata.items() if key != "attempt"}
        return StoredResult(task.task_id, row.mask_url, row.labels, metadata)

    async def _settle(
        self,
        task_id: str,
        attempt_id: str,
        status: Status,
        *,
        mask_url: str | None,
        labels: list[str],
        metadata: dict[str, object],
    ) -> None:
        # The attempt stays in the settled row: it tells a repeat of this write from another attempt's.
        values = {
            "task_id": task_id,
            "attempt_id": attempt_id,
            "status": status,
            "mask_url": mask_url,
            "labels": _json(labels),
            "metadata": _json({**metadata, "attempt": attempt_id}),
            "now": _text(self._now()),
        }
        await self._file.run(lambda: self._write_settled(values))

    def _write_settled(self, values: dict[str, str | None]) -> None:
        with self._file.transaction():
            if self._file.db.execute(_SETTLE, values).rowcount == 1:
                return
            if self._file.db.execute(_IS_SETTLED, values).fetchone() is None:
                task_id = str(values["task_id"])
                raise TaskNotFound(task_id) if self._select(task_id) is None else AttemptLost(task_id)

    def _insert(self, task: Task) -> None:
        values = (task.task_id, task.user_id, task.source_image_url, task.text_prompt)
        self._file.db.execute(_INSERT, (*values, *[_text(self._now())] * 2))

    def _select(self, task_id: str) -> tuple[str, Row] | None:
        """The owner's user_id and the row."""
        found = self._file.db.execute(_SELECT, {"task_id": task_id}).fetchone()
        if found is None:
            return None
        user_id, status, mask_url, labels, metadata, created_at, updated_at = found
        return user_id, Row(
            status=status,
            mask_url=mask_url,
            labels=json.loads(labels),
            metadata=json.loads(metadata),
            created_at=datetime.fromisoformat(created_at),
            updated_at=datetime.fromisoformat(updated_at),
        )


def _json(value: object) -> str:
    try:
        # Sorted, so that a repeat of the same write is the same text.
        return json.dumps(value, allow_nan=False, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise MetadataInvalid("labels or metadata hold something that JSON has no word for") from error


def _text(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="microseconds")
