"""Task rows in Supabase: each change is one conditional UPDATE; rows are never inserted or deleted."""

import asyncio
import json
import logging
import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeVar

from results.base import Claim, Status, StoredResult, Task
from results.errors import (
    AlreadySettled,
    AttemptLost,
    MetadataInvalid,
    ResultsMisconfigured,
    ResultsUnavailable,
    TaskInProgress,
    TaskNotFound,
)
from results.supabase_leases import ColumnLeases, Leases, MetadataLeases, without_attempt
from results.supabase_rest import TABLE, ColumnMissing, InvalidUuid, SupabaseRest

_T = TypeVar("_T")

logger = logging.getLogger(__name__)

_MASK_COLUMNS: Final = ("mask_image_url", "mask_url")
_COLUMNS: Final = ("id", "user_id", "status", "labels", "metadata", "updated_at")
_MAX_CLAIM_TRIES: Final = 5


@dataclass(frozen=True, slots=True)
class _Table:
    """The parts of the table that differ between projects."""

    mask_column: str
    leases: Leases


class SupabaseResults:
    """A ResultStore in the table segmentation_results of the project at `url`.

    Another attempt may take over `lease_s` seconds after a claim, by the database's clock. Where the table
    lacks the columns of leases, MetadataLeases stores them.
    `service_key` is a secret key (sb_secret_...), the service_role key, or the JWT of a custom role, which
    needs the project's `publishable_key`. `mask_column` is detected when it is not given.
    `timeout_s`: see SupabaseRest.
    Create it in the process and the event loop that use it. Raises ResultsMisconfigured for a key, a URL or
    a column that cannot be right.
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
    ) -> None:
        if mask_column in _COLUMNS or (mask_column and not re.fullmatch(r"\w{1,63}", mask_column)):
            raise ResultsMisconfigured("SUPABASE_MASK_COLUMN cannot be the column of the mask's URL")
        self._mask_columns = (mask_column,) if mask_column else _MASK_COLUMNS
        self._known_table: _Table | None = None
        self._table_lock = asyncio.Lock()
        self._lease_s = lease_s
        self._rest = SupabaseRest(
            url,
            service_key,
            publishable_key=publishable_key,
            connections=connections,
            timeout_s=timeout_s,
        )

    async def check(self) -> list[str]:
        """See ResultStore. Detects the table's columns, and sends a read and an update that match no row."""
        self._rest.check_key_expiry()
        try:
            table = await self._table()
            claim = {**table.leases.claim_values(""), table.mask_column: None, "labels": []}
            await self._rest.count(self._rest.update(claim).eq("status", "done").eq("status", "pending"))
            if table.leases.columns:
                await self._rest.now()
        except ResultsUnavailable as error:
            return [f"{error}; tried again at the first task"]
        return [] if table.leases.warning is None else [table.leases.warning]

    async def claim(self, task: Task, attempt_id: str) -> Claim | StoredResult:
        """See ResultStore; a missing row is TaskNotFound."""
        with _runtime_errors(task.task_id):
            return await self._with_table(lambda table: self._claim(task, attempt_id, table))

    async def update_result(
        self, task_id: str, mask_url: str, labels: list[str], metadata: dict[str, object], *, attempt_id: str
    ) -> None:
        """See ResultStore; also settles a task that `end_stale` has ended meanwhile."""
        await self._settle(task_id, attempt_id, "done", mask_url=mask_url, labels=labels, metadata=metadata)

    async def update_status(
        self, task_id: str, status: Status, *, attempt_id: str, error_message: str | None = None
    ) -> None:
        """See ResultStore."""
        if status != "error":
            raise ValueError("update_status accepts 'error' alone; update_result stores a result")
        metadata: dict[str, object] = {} if error_message is None else {"error_message": error_message}
        await self._settle(task_id, attempt_id, status, mask_url=None, labels=[], metadata=metadata)

    async def refuse(self, task: Task, error_message: str) -> None:
        """See ResultStore."""
        metadata = _to_jsonb({"error_message": error_message})
        refuse = self._rest.update({"status": "error", "metadata": metadata})
        refuse = refuse.eq("id", task.task_id).eq("user_id", task.user_id).eq("status", "pending")
        with suppress(TaskNotFound), _runtime_errors(task.task_id):
            await self._rest.count(refuse)

    async def end_stale(self, grace_s: float) -> int:
        """See ResultStore."""
        with _runtime_errors():
            return await self._with_table(lambda table: table.leases.end_stale(grace_s))

    async def close(self) -> None:
        """See ResultStore; closing twice is harmless."""
        await self._rest.close()

    def describe(self) -> str:
        """See ResultStore."""
        return f"Supabase table {TABLE} at {self._rest.host}"

    async def _claim(self, task: Task, attempt_id: str, table: _Table) -> Claim | StoredResult:
        leases = table.leases
        for _ in range(_MAX_CLAIM_TRIES):
            claim = self._rest.update(leases.claim_values(attempt_id)).neq("status", "done")
            claim = claim.eq("id", task.task_id).eq("user_id", task.user_id)
            claim = leases.exclude_ended(claim, attempt_id)
            if await self._rest.count(claim.or_(await leases.claimable_filter(attempt_id))):
                return Claim(task.task_id, attempt_id)
            # The user may have made other columns large: they are read only where the result is needed.
            row = await self._row(task.task_id, "status", *leases.row_columns, user_id=task.user_id)
            if row["status"] == "done":
                return await self._stored_result(task, table)
            if leases.has_ended(row, attempt_id):
                raise AttemptLost(task.task_id)
            if row["status"] == "processing" and (left_s := await leases.remaining_s(row)) > 0:
                raise TaskInProgress(task.task_id, left_s)
            # The row became claimable between the two requests.
        raise _no_update_policy()

    async def _stored_result(self, task: Task, table: _Table) -> StoredResult:
        columns = (table.mask_column, "labels", "metadata")
        row = await self._row(task.task_id, *columns, user_id=task.user_id)
        # Users may write to their own rows: values of any type must not fail here.
        mask_url, labels, metadata = (row[column] for column in columns)
        return StoredResult(
            task.task_id,
            mask_url or "",
            [str(label) for label in labels] if isinstance(labels, list) else [],
            without_attempt(metadata) if isinstance(metadata, dict) else {},
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
        content = {
            "status": status,
            "labels": _to_jsonb(labels),
            "metadata": _to_jsonb(metadata),
        }
        with _runtime_errors(task_id):
            await self._with_table(
                lambda table: self._write_settled(task_id, attempt_id, table, mask_url, content)
            )

    async def _write_settled(
        self, task_id: str, attempt_id: str, table: _Table, mask_url: str | None, content: dict[str, object]
    ) -> None:
        leases, mask_column = table.leases, table.mask_column
        settled = leases.settle_values(attempt_id, {**content, mask_column: mask_url})
        settle = self._rest.update(settled).eq("id", task_id)
        if await self._rest.count(leases.require_held(settle, attempt_id)):
            return
        columns = ("status", mask_column, "labels", "metadata")
        row = await self._row(task_id, *columns, *leases.row_columns)
        has_its_mask_url = mask_url is not None and row[mask_column] == mask_url
        ownership = leases.ownership(row, attempt_id, has_its_mask_url=has_its_mask_url)
        if ownership == "held":
            raise _no_update_policy()
        if ownership == "other":
            raise AttemptLost(task_id)
        if any(row[column] != settled[column] for column in columns):
            raise AlreadySettled(task_id)

    async def _row(self, task_id: str, *columns: str, user_id: str | None = None) -> dict[str, Any]:
        """The row, of this user where `user_id` is given. Raises TaskNotFound."""
        query = self._rest.table.select(*columns).eq("id", task_id)
        found = await self._rest.rows(query if user_id is None else query.eq("user_id", user_id))
        if not found:
            raise TaskNotFound(task_id)
        return found[0]

    async def _with_table(self, work: Callable[[_Table], Awaitable[_T]]) -> _T:
        """The result of `work` with the table's known columns; if they have changed, it is done once more."""
        try:
            return await work(await self._table())
        except ColumnMissing:
            self._known_table = None
            return await work(await self._table())

    async def _table(self) -> _Table:
        async with self._table_lock:
            if self._known_table is None:
                self._known_table = await self._find_table()
            return self._known_table

    async def _find_table(self) -> _Table:
        leases: Leases
        for leases in (ColumnLeases(self._rest, self._lease_s), MetadataLeases(self._rest, self._lease_s)):
            for mask_column in self._mask_columns:
                missing = await self._missing_column(*_COLUMNS, *leases.columns, mask_column)
                if missing is None:
                    return _Table(mask_column, leases)
                for other in _COLUMNS:
                    if missing.names(other):
                        raise ResultsMisconfigured(f"table {TABLE} has no column {other}")
                if any(missing.names(other) for other in leases.columns):
                    break
            else:
                break
        raise ResultsMisconfigured(f"table {TABLE} has no column {' or '.join(self._mask_columns)}")

    async def _missing_column(self, *columns: str) -> ColumnMissing | None:
        """The error for the first of these columns that the table lacks; None: it has all."""
        try:
            await self._rest.rows(self._rest.table.select(*columns).limit(0))
        except ColumnMissing as missing:
            return missing
        return None


@contextmanager
def _runtime_errors(task_id: str = "") -> Iterator[None]:
    """Log the operator's errors, which would stop a start, and raise ResultsUnavailable instead."""
    try:
        yield
    except InvalidUuid:
        raise TaskNotFound(task_id) from None
    except ResultsMisconfigured as error:
        logger.error("%s", error)  # noqa: TRY400 - a traceback adds nothing
        raise ResultsUnavailable("the results database refuses this server; its log says why") from None


def _no_update_policy() -> ResultsMisconfigured:
    return ResultsMisconfigured("rows can be read, but not updated: the key's role lacks an update policy")


def _to_jsonb(value: object) -> Any:
    """`value` as a jsonb column will return it. Raises MetadataInvalid."""
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        text.encode()  # no lone surrogates
    except (TypeError, ValueError, RecursionError) as error:
        raise MetadataInvalid("labels or metadata hold a value that JSON cannot represent") from error
    if re.search(r"(?<!\\)(?:\\\\)*\\u0000", text):
        raise MetadataInvalid("labels or metadata hold a zero byte, which PostgreSQL cannot store")
    return json.loads(text)
