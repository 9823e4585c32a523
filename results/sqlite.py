"""Task rows in one SQLite file: the embedded default, shared by the processes of one machine."""

import asyncio
import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, TypeVar

from results.base import Claim, Row, SettledStatus, Status, StoredResult, Task
from results.errors import (
    AttemptLost,
    MetadataInvalid,
    ResultsUnavailable,
    TaskInProgress,
    TaskNotFound,
)

_T = TypeVar("_T")

_BUSY_TIMEOUT_S: Final = 5.0

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
        with _sqlite_errors():
            self._db = _opened(path)
        # SQLite has one writer at a time anyway; one thread keeps waiting for it off the event loop.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="results")

    async def claim(self, task: Task, attempt_id: str) -> Claim | StoredResult:
        """See ResultStore; a missing row is made."""
        return await self._in_thread(lambda: self._claim(task, attempt_id))

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
        await self._in_thread(lambda: self._insert(task))

    async def get(self, task_id: str) -> Row | None:
        """The row as it stands, whosever it is; None when there is none."""
        found = await self._in_thread(lambda: self._select(task_id))
        return None if found is None else found[1]

    async def close(self) -> None:
        """See ResultStore; closing twice is harmless."""
        await asyncio.to_thread(self._thread.shutdown)
        self._db.close()

    def describe(self) -> str:
        """See ResultStore."""
        return f"SQLite file {self._path} (embedded results)"

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        with _sqlite_errors():
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)

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
        with _transaction(self._db):
            self._insert(task)
            if self._db.execute(_CLAIM, values).rowcount == 1:
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
        await self._in_thread(lambda: self._write_settled(values))

    def _write_settled(self, values: dict[str, str | None]) -> None:
        with _transaction(self._db):
            if self._db.execute(_SETTLE, values).rowcount == 1:
                return
            if self._db.execute(_IS_SETTLED, values).fetchone() is None:
                task_id = str(values["task_id"])
                raise TaskNotFound(task_id) if self._select(task_id) is None else AttemptLost(task_id)

    def _insert(self, task: Task) -> None:
        values = (task.task_id, task.user_id, task.source_image_url, task.text_prompt)
        self._db.execute(_INSERT, (*values, *[_text(self._now())] * 2))

    def _select(self, task_id: str) -> tuple[str, Row] | None:
        """The owner's user_id and the row."""
        found = self._db.execute(_SELECT, {"task_id": task_id}).fetchone()
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


def _opened(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Autocommit: transactions begin where we say. The store's one thread is not the one that opens.
    db = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    try:
        _set_wal(db)
        # No fsync per commit: kill -9 loses nothing, but power loss may take the last transitions back.
        # The file stays whole, and such a task is claimed again once its lease has run out.
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute(_SCHEMA)
    except BaseException:  # whatever stops the start, the file is let go
        db.close()
        raise
    return db


def _set_wal(db: sqlite3.Connection) -> None:
    """Readers and the writer don't wait for each other; the file remembers it."""
    deadline = time.monotonic() + _BUSY_TIMEOUT_S
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            # When processes start together SQLite refuses all but one at once, without its busy timeout.
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    # IMMEDIATE: a reader that turns writer in the middle could fail at once, whatever the busy timeout.
    db.execute("BEGIN IMMEDIATE")
    with db:
        yield


def _json(value: object) -> str:
    try:
        # Sorted, so that a repeat of the same write is the same text.
        return json.dumps(value, allow_nan=False, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise MetadataInvalid("labels or metadata hold something that JSON has no word for") from error


def _text(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="microseconds")


@contextmanager
def _sqlite_errors() -> Iterator[None]:
    """The only place where a failure of SQLite or of its folder becomes one of ours."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise ResultsUnavailable(f"the results file failed: {type(error).__name__}") from error
