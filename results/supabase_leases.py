"""The leases of Supabase rows: in columns of our own, or else in a row's metadata."""

import logging
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, Protocol

from postgrest import AsyncSelectRequestBuilder

from results.errors import ResultsError, ResultsUnavailable
from results.supabase_rest import TABLE, SupabaseRest

# Of an attempt and a row: the attempt may settle it, has settled it, or does not own it.
Ownership = Literal["held", "settled", "other"]

logger = logging.getLogger(__name__)

STALE_MESSAGE: Final = "the task was not finished in time; try again"

_MIGRATION: Final = "supabase/migrations/20261126000001_leases.sql"
_ATTEMPT: Final = "metadata->>attempt"
_UUID: Final = re.compile("[0-9a-f-]{36}")
_UUID_LIKE: Final = "_" * 36
_PAGE_SIZE: Final = 50
_MAX_ROWS_PER_CALL: Final = 1000
_MAX_FAILURES: Final = 3


class Leases(Protocol):
    """One way to store leases.

    Attributes:
        columns: the table must have them for it.
        row_columns: `remaining_s` and `ownership` read them, beside the status and the metadata.
        warning: a sentence for the operator about its limits; None: it has none.
    """

    columns: tuple[str, ...]
    row_columns: tuple[str, ...]
    warning: str | None

    def claim_values(self, attempt_id: str) -> dict[str, object]:
        """The values that a claim writes."""
        ...

    async def claimable_filter(self, attempt_id: str) -> str:
        """The filter, inside or=(...), of the rows that the attempt may claim."""
        ...

    def exclude_ended(self, claim: AsyncSelectRequestBuilder, attempt_id: str) -> AsyncSelectRequestBuilder:
        """`claim`, restricted to a row that this same attempt has not ended as an error."""
        ...

    def has_ended(self, row: Mapping[str, Any], attempt_id: str) -> bool:
        """Whether this same attempt has ended the row as an error."""
        ...

    def settle_values(self, attempt_id: str, content: Mapping[str, object]) -> dict[str, object]:
        """The values that end the attempt with `content`."""
        ...

    def require_held(self, update: AsyncSelectRequestBuilder, attempt_id: str) -> AsyncSelectRequestBuilder:
        """`update`, restricted to a row that the attempt may settle."""
        ...

    async def remaining_s(self, row: Mapping[str, Any]) -> float:
        """The rest of the lease of a row that is `processing`; 0 or less when it has expired."""
        ...

    def ownership(self, row: Mapping[str, Any], attempt_id: str, *, has_its_mask_url: bool) -> Ownership:
        """Whether the attempt owns the row; `has_its_mask_url`: the row holds the URL that it wrote."""
        ...

    async def end_stale(self, grace_s: float) -> int:
        """See ResultStore."""
        ...


class ColumnLeases:
    """Leases in columns that users cannot write, measured by the database's clock alone."""

    columns: tuple[str, ...] = ("attempt_id", "lease_s", "lease_until")
    row_columns: tuple[str, ...] = ("attempt_id", "lease_until")
    warning: str | None = None

    def __init__(self, rest: SupabaseRest, lease_s: float) -> None:
        self._rest = rest
        self._lease_s = lease_s

    def claim_values(self, attempt_id: str) -> dict[str, object]:
        """See Leases; a trigger computes lease_until from lease_s."""
        return {
            "status": "processing",
            "metadata": {},
            "attempt_id": attempt_id,
            "lease_s": self._lease_s,
        }

    async def claimable_filter(self, attempt_id: str) -> str:
        """See Leases; PostgreSQL parses "now" as the time of the request."""
        return (
            "status.in.(pending,error),lease_until.is.null,lease_until.lte.now,"
            f"attempt_id.eq.{_quote(attempt_id)}"
        )

    def exclude_ended(self, claim: AsyncSelectRequestBuilder, attempt_id: str) -> AsyncSelectRequestBuilder:
        """See Leases; a delayed claim must not restart an attempt that has ended meanwhile."""
        other = f"attempt_id.is.null,attempt_id.neq.{_quote(attempt_id)}"
        return claim.or_(f"{other},lease_until.not.is.null,status.neq.error")

    def has_ended(self, row: Mapping[str, Any], attempt_id: str) -> bool:
        """See Leases."""
        return row["status"] == "error" and row["attempt_id"] == attempt_id and row["lease_until"] is None

    def settle_values(self, attempt_id: str, content: Mapping[str, object]) -> dict[str, object]:  # noqa: ARG002 - of Leases
        """See Leases; the attempt's id stays, and identifies a repeat of this write."""
        return {**content, "lease_s": None}

    def require_held(self, update: AsyncSelectRequestBuilder, attempt_id: str) -> AsyncSelectRequestBuilder:
        """See Leases; the other columns may hold what the row's user has written."""
        return update.eq("attempt_id", attempt_id).not_.is_("lease_until", "null")

    async def remaining_s(self, row: Mapping[str, Any]) -> float:
        """See Leases."""
        until = _parse_time(row["lease_until"])
        return 0.0 if until is None else (until - await self._rest.now()).total_seconds()

    def ownership(self, row: Mapping[str, Any], attempt_id: str, *, has_its_mask_url: bool) -> Ownership:  # noqa: ARG002 - of Leases
        """See Leases."""
        if row["attempt_id"] != attempt_id:
            return "other"
        return "settled" if row["lease_until"] is None else "held"

    async def end_stale(self, grace_s: float) -> int:
        """See ResultStore; the attempt and its lease stay, so that its late result is still stored."""
        expired_at = await self._rest.now() - timedelta(seconds=grace_s)
        end = self._rest.update({"status": "error", "metadata": {"error_message": STALE_MESSAGE}})
        end = end.eq("status", "processing").lt("lease_until", expired_at.isoformat())
        return await self._rest.count(end)


class MetadataLeases:
    """Leases in a table without our columns: the attempt's id in metadata, the lease's start in updated_at.

    A user who edits the metadata of a task in processing ends the attempt's right to settle it.
    """

    columns: tuple[str, ...] = ()
    row_columns: tuple[str, ...] = ("updated_at",)
    warning: str | None = (
        f"table {TABLE} lacks the columns of leases: a user who edits the metadata of a task in processing "
        f"loses its result; apply {_MIGRATION} to the project, and restart this server"
    )

    def __init__(self, rest: SupabaseRest, lease_s: float) -> None:
        self._rest = rest
        self._lease_s = lease_s

    def claim_values(self, attempt_id: str) -> dict[str, object]:
        """See Leases."""
        return {"status": "processing", "metadata": {"attempt": attempt_id}}

    async def claimable_filter(self, attempt_id: str) -> str:
        """See Leases."""
        expired = _expired_filter(await self._rest.estimate_now(), self._lease_s, self._lease_s)
        return (
            f"status.in.(pending,error),and(status.eq.processing,or({expired})),"
            f"and(status.eq.processing,{_ATTEMPT}.eq.{_quote(attempt_id)})"
        )

    def exclude_ended(self, claim: AsyncSelectRequestBuilder, attempt_id: str) -> AsyncSelectRequestBuilder:  # noqa: ARG002 - of Leases
        """See Leases; not known without the columns."""
        return claim

    def has_ended(self, row: Mapping[str, Any], attempt_id: str) -> bool:  # noqa: ARG002 - of Leases
        """See Leases; not known without the columns."""
        return False

    def settle_values(self, attempt_id: str, content: Mapping[str, object]) -> dict[str, object]:
        """See Leases; the attempt's id stays, and identifies a repeat of this write."""
        metadata = content["metadata"]
        assert isinstance(metadata, dict)
        return {**content, "metadata": {**metadata, "attempt": attempt_id}}

    def require_held(self, update: AsyncSelectRequestBuilder, attempt_id: str) -> AsyncSelectRequestBuilder:
        """See Leases."""
        unsettled = "status.eq.processing,and(status.eq.error,metadata->>stale.eq.true)"
        return update.eq(_ATTEMPT, attempt_id).or_(unsettled)

    async def remaining_s(self, row: Mapping[str, Any]) -> float:
        """See Leases; a start further ahead than one lease was forged, and gives no lease."""
        since = _parse_time(row["updated_at"])
        if since is None:
            return 0.0
        ahead_s = (since - await self._rest.estimate_now()).total_seconds()
        return 0.0 if ahead_s > self._lease_s else ahead_s + self._lease_s

    def ownership(self, row: Mapping[str, Any], attempt_id: str, *, has_its_mask_url: bool) -> Ownership:
        """See Leases; a user may have edited metadata without the attempt's id after the row was settled."""
        metadata = row["metadata"] if isinstance(row["metadata"], dict) else {}
        if row["status"] == "processing" or (row["status"] == "error" and metadata.get("stale") is True):
            return "held" if metadata.get("attempt") == attempt_id else "other"
        return "settled" if metadata.get("attempt") == attempt_id or has_its_mask_url else "other"

    async def end_stale(self, grace_s: float) -> int:
        """See ResultStore; ends at most 1,000 rows with an attempt id, and all rows without one."""
        now = await self._rest.estimate_now()
        expired = _expired_filter(now, self._lease_s + grace_s, self._lease_s)
        return await self._end_without_attempt(expired) + await self._end_with_attempt(expired)

    async def _end_without_attempt(self, expired: str) -> int:
        """End the rows without an attempt id of ours: no result will be delivered to them."""
        end = self._rest.update({"status": "error", "metadata": {"error_message": STALE_MESSAGE}})
        without_id = f"{_ATTEMPT}.is.null,{_ATTEMPT}.not.like.{_UUID_LIKE}"
        return await self._rest.count(end.eq("status", "processing").or_(expired).or_(without_id))

    async def _end_with_attempt(self, expired: str) -> int:
        ended = failed = 0
        while ended + failed < _MAX_ROWS_PER_CALL:
            # Only values of an id's length are read, since users may write to metadata too.
            query = self._rest.table.select("id", "updated_at", f"attempt:{_ATTEMPT}")
            query = query.eq("status", "processing").or_(expired).like(_ATTEMPT, _UUID_LIKE)
            page = await self._rest.rows(query.order("id").range(failed, failed + _PAGE_SIZE - 1))
            for row in page:
                try:
                    ended += await self._end(row)
                except ResultsError as error:
                    failed += 1
                    if isinstance(error, ResultsUnavailable) and failed >= _MAX_FAILURES:
                        raise
                    logger.warning("a stale task could not be ended: %s", error)
            if len(page) < _PAGE_SIZE:
                break
        return ended

    async def _end(self, stale: Mapping[str, Any]) -> int:
        """End the row of `stale`, unless it has changed since it was read; returns how many (0 or 1)."""
        metadata: dict[str, object] = {"error_message": STALE_MESSAGE, "stale": True}
        if _UUID.fullmatch(stale["attempt"]):
            metadata["attempt"] = stale["attempt"]
        end = self._rest.update({"status": "error", "metadata": metadata}).eq("id", stale["id"])
        return await self._rest.count(end.eq("status", "processing").eq("updated_at", stale["updated_at"]))


def without_attempt(metadata: Mapping[str, object]) -> dict[str, object]:
    """The metadata of a done row, without the attempt id that MetadataLeases left in it."""
    attempt = metadata.get("attempt")
    is_id = isinstance(attempt, str) and _UUID.fullmatch(attempt)
    return {key: value for key, value in metadata.items() if not (is_id and key == "attempt")}


def _expired_filter(now: datetime, age_s: float, ahead_s: float) -> str:
    """The filter, inside or=(...), of rows last changed `age_s` ago, or over `ahead_s` ahead (forged)."""
    oldest, newest = now - timedelta(seconds=age_s), now + timedelta(seconds=ahead_s)
    return f'updated_at.lte."{oldest.isoformat()}",updated_at.gt."{newest.isoformat()}"'


def _parse_time(text: object) -> datetime | None:
    """A time of the database; None for infinity, and for years outside Python's range."""
    try:
        return datetime.fromisoformat(str(text)).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def _quote(value: str) -> str:
    """`value`, quoted for PostgREST's or=(...)."""
    return '"' + value.replace("\\", r"\\").replace('"', r"\"") + '"'
