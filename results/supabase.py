"""Task rows in Supabase: each change is one conditional UPDATE, and rows are never made or deleted."""

import asyncio
import json
import logging
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeVar

from postgrest import AsyncSelectRequestBuilder, CountMethod, ReturnMethod

from results.base import Claim, SettledStatus, Status, StoredResult, Task
from results.errors import (
    AttemptLost,
    MetadataInvalid,
    ResultsMisconfigured,
    ResultsUnavailable,
    TaskInProgress,
    TaskNotFound,
)
from results.supabase_rest import TABLE, ColumnMissing, NotUuid, SupabaseRest

_T = TypeVar("_T")

logger = logging.getLogger("bentoml.sam3")

_MASK_COLUMNS: Final = ("mask_image_url", "mask_url")
_COLUMNS: Final = ("id", "user_id", "status", "labels", "metadata", "updated_at")
_ATTEMPT: Final = "metadata->>attempt"
_CLAIM_TRIES: Final = 5
_STALE_AT_ONCE: Final = 50
_STALE_MESSAGE: Final = "the task was not finished in time; try again"


class SupabaseResults:
    """A ResultStore in the table segmentation_results of the project at `url`.

    An attempt may be taken over `lease_s` seconds after its claim, by the database's clock.
    `service_key` is a secret key (sb_secret_...), the service_role key, or the JWT of a role made for us,
    which goes with the project's `publishable_key`. `mask_column` is found when it is not given.
    `timeout_s`: see SupabaseRest. `now` is our own clock.
    Made in the process and the event loop that use it. Raises ResultsMisconfigured for a key, a URL or a
    column that cannot be right.
    """

    def __init__(
        self,
        url: str,
        service_key: str,
        *,
        lease_s: float,
        mask_column: str | None = None,
        publishable_key: str | None = None,
        connections: int = 16,
        timeout_s: float = 5.0,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        if mask_column in _COLUMNS or (mask_column and not re.fullmatch(r"\w{1,63}", mask_column)):
            raise ResultsMisconfigured("SUPABASE_MASK_COLUMN cannot be the column of the mask's URL")
        self._mask_columns = (mask_column,) if mask_column else _MASK_COLUMNS
        self._found_column: str | None = None
        self._finding = asyncio.Lock()
        self._lease = timedelta(seconds=lease_s)
        self._rest = SupabaseRest(
            url,
            service_key,
            publishable_key=publishable_key,
            connections=connections,
            timeout_s=timeout_s,
            now=now,
        )

    async def check(self) -> list[str]:
        """See ResultStore. Finds the mask's column, and tries a read and an update that match no row."""
        self._rest.refuse_expired_key()
        try:
            column = await self._mask_column()
            nothing: dict[str, object] = {"status": "pending", column: None, "labels": [], "metadata": {}}
            await self._changed(self._update(nothing).eq("status", "done").eq("status", "pending"))
        except ResultsUnavailable as error:
            return [f"{error}; trying again when a task comes"]
        return []

    async def claim(self, task: Task, attempt_id: str) -> Claim | StoredResult:
        """See ResultStore; a missing row is TaskNotFound."""
        with _at_run_time(task.task_id):
            return await self._with_mask_column(lambda column: self._claim(task, attempt_id, column))

    async def update_result(
        self, task_id: str, mask_url: str, labels: list[str], metadata: dict[str, object], *, attempt_id: str
    ) -> None:
        """See ResultStore; also delivers to a task that `end_stale` has ended meanwhile."""
        await self._settle(task_id, attempt_id, "done", mask_url=mask_url, labels=labels, metadata=metadata)

    async def update_status(
        self, task_id: str, status: SettledStatus, *, attempt_id: str, error_message: str | None = None
    ) -> None:
        """See ResultStore."""
        if status not in ("pending", "error"):
            raise ValueError("an attempt ends as 'pending' or 'error' here; a result needs update_result")
        metadata: dict[str, object] = {} if error_message is None else {"error_message": error_message}
        await self._settle(task_id, attempt_id, status, mask_url=None, labels=[], metadata=metadata)

    async def end_stale(self, older_than_s: float) -> int:
        """End as "error" tasks of ours that were claimed over `older_than_s` seconds ago; returns how many.

        At most 50 at once. Raises ResultsUnavailable.
        """
        with _at_run_time():
            await self._with_mask_column(_nothing)  # its answer tells the database's time
            claimed_before = self._rest.database_time() - timedelta(seconds=older_than_s)
            query = self._rest.table.select("id", "updated_at", f"attempt:{_ATTEMPT}")
            query = query.eq("status", "processing").lt("updated_at", claimed_before.isoformat())
            stale = await self._rows(query.not_.is_(_ATTEMPT, "null").limit(_STALE_AT_ONCE))
            return sum([await self._end(row) for row in stale])

    async def close(self) -> None:
        """See ResultStore; closing twice is harmless."""
        await self._rest.close()

    def describe(self) -> str:
        """See ResultStore."""
        return f"Supabase table {TABLE} at {self._rest.host}"

    async def _claim(self, task: Task, attempt_id: str, mask_column: str) -> Claim | StoredResult:
        for _ in range(_CLAIM_TRIES):
            claim = self._update({"status": "processing", "metadata": {"attempt": attempt_id}})
            claim = claim.eq("id", task.task_id).eq("user_id", task.user_id)
            if await self._changed(claim.or_(self._is_free(attempt_id))):
                return Claim(task.task_id, attempt_id)
            row = await self._row(task.task_id, mask_column, user_id=task.user_id)
            if row["status"] == "done":
                return _stored_result(task.task_id, row, mask_column)
            left = datetime.fromisoformat(row["updated_at"]) + self._lease - self._rest.database_time()
            if row["status"] == "processing" and left > timedelta(0):
                raise TaskInProgress(task.task_id, left.total_seconds())
            # It became free between the two requests.
        raise ResultsMisconfigured("rows can be read, but not updated: the key's role lacks an update policy")

    def _is_free(self, attempt_id: str) -> str:
        lease_start = (self._rest.database_time() - self._lease).isoformat()
        return (
            "status.in.(pending,error),"
            f'and(status.eq.processing,updated_at.lte."{lease_start}"),'
            f"and(status.eq.processing,{_ATTEMPT}.eq.{_quoted(attempt_id)})"
        )

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
        content = {
            "status": status,
            "labels": _as_jsonb(labels),
            "metadata": _as_jsonb({**metadata, "attempt": attempt_id}),
        }
        with _at_run_time(task_id):
            await self._with_mask_column(
                lambda column: self._write_settled(task_id, attempt_id, column, {**content, column: mask_url})
            )

    async def _write_settled(
        self, task_id: str, attempt_id: str, mask_column: str, content: dict[str, object]
    ) -> None:
        settle = self._update(content).eq("id", task_id).eq(_ATTEMPT, attempt_id)
        still_open = "status.eq.processing,and(status.eq.error,metadata->>stale.eq.true)"
        if await self._changed(settle.or_(still_open)):
            return
        row = await self._row(task_id, mask_column)
        if any(row[name] != value for name, value in content.items()):
            raise AttemptLost(task_id)

    async def _end(self, stale: Mapping[str, Any]) -> bool:
        """End the row of `stale`, unless it has changed since it was read."""
        attempt_id = stale["attempt"]
        metadata = {"attempt": attempt_id, "error_message": _STALE_MESSAGE, "stale": True}
        end = self._update({"status": "error", "metadata": metadata}).eq("id", stale["id"])
        end = end.eq("status", "processing").eq("updated_at", stale["updated_at"])
        return await self._changed(end.eq(_ATTEMPT, attempt_id))

    def _update(self, content: Mapping[str, object]) -> AsyncSelectRequestBuilder:
        # Without the row in the answer a role needs no right to read all columns; the count tells a miss.
        return self._rest.table.update(content, count=CountMethod.exact, returning=ReturnMethod.minimal)

    async def _changed(self, update: AsyncSelectRequestBuilder) -> bool:
        """Whether the update found its one row."""
        count = (await self._rest.send(update)).count
        if count is None:
            raise _not_rest()
        return count == 1

    async def _row(self, task_id: str, mask_column: str, *, user_id: str | None = None) -> dict[str, Any]:
        """The row, of this user if one is named. Raises TaskNotFound."""
        query = self._rest.table.select("status", mask_column, "labels", "metadata", "updated_at")
        query = query.eq("id", task_id)
        found = await self._rows(query if user_id is None else query.eq("user_id", user_id))
        if not found:
            raise TaskNotFound(task_id)
        return found[0]

    async def _rows(self, query: AsyncSelectRequestBuilder) -> list[dict[str, Any]]:
        data: Any = (await self._rest.send(query)).data
        if not isinstance(data, list):
            raise _not_rest()
        return data

    async def _with_mask_column(self, work: Callable[[str], Awaitable[_T]]) -> _T:
        """The work done with the mask's column; if the table has changed since it was found, once more."""
        try:
            return await work(await self._mask_column())
        except ColumnMissing:
            self._found_column = None
            return await work(await self._mask_column())

    async def _mask_column(self) -> str:
        async with self._finding:
            if self._found_column is None:
                self._found_column = await self._find_mask_column()
            return self._found_column

    async def _find_mask_column(self) -> str:
        for column in self._mask_columns:
            try:
                await self._rows(self._rest.table.select(*_COLUMNS, column).limit(0))
            except ColumnMissing as missing:
                for other in _COLUMNS:
                    if missing.names(other):
                        raise ResultsMisconfigured(f"table {TABLE} has no column {other}") from None
            else:
                return column
        raise ResultsMisconfigured(f"table {TABLE} has no column {' or '.join(self._mask_columns)}")


@contextmanager
def _at_run_time(task_id: str = "") -> Iterator[None]:
    """What would stop a start is the operator's business now: the log gets the sentence, the caller a 502."""
    try:
        yield
    except NotUuid:
        raise TaskNotFound(task_id) from None
    except ResultsMisconfigured as error:
        logger.error("%s", error)  # noqa: TRY400 - the sentence says it all
        raise ResultsUnavailable("the results database refuses this server; its log says why") from None


async def _nothing(_: str) -> None:
    pass


def _not_rest() -> ResultsMisconfigured:
    return ResultsMisconfigured("SUPABASE_URL does not answer as Supabase's REST API does")


def _stored_result(task_id: str, row: Mapping[str, Any], mask_column: str) -> StoredResult:
    # Users may write to their own rows: whatever stands there is no reason to fail.
    labels, metadata = row["labels"], row["metadata"]
    return StoredResult(
        task_id,
        row[mask_column] or "",
        [str(label) for label in labels] if isinstance(labels, list) else [],
        {key: metadata[key] for key in metadata if key != "attempt"} if isinstance(metadata, dict) else {},
    )


def _as_jsonb(value: object) -> Any:
    """`value` as it will be read back from a jsonb column. Raises MetadataInvalid."""
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        text.encode()  # no lone surrogates
    except (TypeError, ValueError, RecursionError) as error:
        raise MetadataInvalid("labels or metadata hold something that JSON has no word for") from error
    if re.search(r"(?<!\\)(?:\\\\)*\\u0000", text):
        raise MetadataInvalid("labels or metadata hold a zero byte, which PostgreSQL cannot keep")
    return json.loads(text)


def _quoted(value: str) -> str:
    """`value` inside PostgREST's or=(...)."""
    return '"' + value.replace("\\", r"\\").replace('"', r"\"") + '"'
