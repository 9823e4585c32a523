"""Who holds a Supabase row and until when: in columns of our own, or else in its metadata."""

import logging
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, Protocol

from postgrest import AsyncSelectRequestBuilder

from results.errors import ResultsError, ResultsUnavailable
from results.supabase_rest import TABLE, SupabaseRest

# What a row says of an attempt: it may settle the row, it has done so, or the row is not its own.
Standing = Literal["held", "settled", "other"]

logger = logging.getLogger(__name__)

STALE_MESSAGE: Final = "the task was not finished in time; try again"

_MIGRATION: Final = "supabase/migrations/20261126000001_leases.sql"
_ATTEMPT: Final = "metadata->>attempt"
_UUID: Final = re.compile("[0-9a-f-]{36}")
_UUID_LIKE: Final = "_" * 36
_PAGE: Final = 50
_MOST_AT_ONCE: Final = 1000
_MOST_MISSES: Final = 3


class Leases(Protocol):
    """One way to keep leases.

    Attributes:
        columns: that the table must have for it.
        row_columns: that `left_s` and `standing` read, beside the status and the metadata.
        warning: what an operator should know of this way.
    """

    columns: tuple[str, ...]
    row_columns: tuple[str, ...]
    warning: str | None

    def claimed(self, attempt_id: str) -> dict[str, object]:
        """What a claim writes."""
        ...

    async def is_free(self, attempt_id: str) -> str:
        """The filter, inside or=(...), of rows that the attempt may claim."""
        ...

    def is_open(self, claim: AsyncSelectRequestBuilder, attempt_id: str) -> AsyncSelectRequestBuilder:
        """`claim`, narrowed to a row that this very attempt has not ended yet."""
        ...

    def has_ended(self, row: Mapping[str, Any], attempt_id: str) -> bool:
        """Whether this very attempt has ended the row as an error."""
        ...

    def settled(self, attempt_id: str, content: Mapping[str, object]) -> dict[str, object]:
        """What is written to end the attempt with `content`."""
        ...

    def is_held(self, update: AsyncSelectRequestBuilder, attempt_id: str) -> AsyncSelectRequestBuilder:
        """`update`, narrowed to a row that the attempt may settle."""
        ...

    async def left_s(self, row: Mapping[str, Any]) -> float:
        """How long the lease of a row that is `processing` still lasts; 0 or less when it is over."""
        ...

    def standing(self, row: Mapping[str, Any], attempt_id: str, *, shows_its_mask: bool) -> Standing:
        """How the row stands to the attempt; `shows_its_mask`: it holds the URL that the attempt wrote."""
        ...

    async def end_stale(self, grace_s: float) -> int:
        """See ResultStore."""
        ...


class ColumnLeases:
    """Leases in columns that users cannot write, by the database's clock alone."""

    columns: tuple[str, ...] = ("attempt_id", "lease_s", "lease_until")
    row_columns: tuple[str, ...] = ("attempt_id", "lease_until")
    warning: str | None = None

    def __init__(self, rest: SupabaseRest, lease_s: float) -> None:
        self._rest = rest
        self._lease_s = lease_s

    def claimed(self, attempt_id: str) -> dict[str, object]:
        """See Leases; a trigger turns lease_s into lease_until."""
        return {
            "status": "processing",
            "metadata": {},
            "attempt_id": attempt_id,
            "lease_s": self._lease_s,
        }

    async def is_free(self, attempt_id: str) -> str:
        """See Leases; PostgreSQL reads "now" as the time of the request."""
        return (
            "status.in.(pending,error),lease_until.is.null,lease_until.lte.now,"
            f"attempt_id.eq.{_quoted(attempt_id)}"
        )

    def is_open(self, claim: AsyncSelectRequestBuilder, attempt_id: str) -> AsyncSelectRequestBuilder:
        """See Leases; a claim that was long on its way must not bring back what has ended meanwhile."""
        other = f"attempt_id.is.null,attempt_id.neq.{_quoted(attempt_id)}"
        return claim.or_(f"{other},lease_until.not.is.null,status.neq.error")

    def has_ended(self, row: Mapping[str, Any], attempt_id: str) -> bool:
        """See Leases."""
        return row["status"] == "error" and row["attempt_id"] == attempt_id and row["lease_until"] is None

    def settled(self, attempt_id: str, content: Mapping[str, object]) -> dict[str, object]:  # noqa: ARG002 - of Leases
        """See Leases; the attempt's id stays, and tells a repeat of this write from another attempt's."""
        return {**content, "lease_s": None}

    def is_held(self, update: AsyncSelectRequestBuilder, attempt_id: str) -> AsyncSelectRequestBuilder:
        """See Leases; whatever the row's user has written to the other columns."""
        return update.eq("attempt_id", attempt_id).not_.is_("lease_until", "null")

    async def left_s(self, row: Mapping[str, Any]) -> float:
        """See Leases."""
        until = _moment(row["lease_until"])
        return 0.0 if until is None else (until - await self._rest.now()).total_seconds()

    def standing(self, row: Mapping[str, Any], attempt_id: str, *, shows_its_mask: bool) -> Standing:  # noqa: ARG002 - of Leases
        """See Leases."""
        if row["attempt_id"] != attempt_id:
            return "other"
        return "settled" if row["lease_until"] is None else "held"

    async def end_stale(self, grace_s: float) -> int:
        """See ResultStore; the attempt and its lease stay, so that its result is still taken."""
        over_since = await self._rest.now() - timedelta(seconds=grace_s)
        end = self._rest.update({"status": "error", "metadata": {"error_message": STALE_MESSAGE}})
        end = end.eq("status", "processing").lt("lease_until", over_since.isoformat())
        return await self._rest.count(end)


class MetadataLeases:
    """Leases in a table without our columns: the attempt in metadata, since updated_at.

    A user who writes to the metadata of a task in work ends the attempt's right to it.
    """

    columns: tuple[str, ...] = ()
    row_columns: tuple[str, ...] = ("updated_at",)
    warning: str | None = (
        f"table {TABLE} lacks the columns of leases: a user who edits the metadata of a task in work loses "
        f"its result; apply {_MIGRATION} to the project, and start anew"
    )

    def __init__(self, rest: SupabaseRest, lease_s: float) -> None:
        self._rest = rest
        self._lease_s = lease_s

    def claimed(self, attempt_id: str) -> dict[str, object]:
        """See Leases."""
        return {"status": "processing", "metadata": {"attempt": attempt_id}}

    async def is_free(self, attempt_id: str) -> str:
        """See Leases."""
        over = _over(await self._rest.database_time(), self._lease_s, self._lease_s)
        return (
            f"status.in.(pending,error),and(status.eq.processing,or({over})),"
            f"and(status.eq.processing,{_ATTEMPT}.eq.{_quoted(attempt_id)})"
        )

    def is_open(self, claim: AsyncSelectRequestBuilder, attempt_id: str) -> AsyncSelectRequestBuilder:  # noqa: ARG002 - of Leases
        """See Leases; this form cannot tell."""
        return claim

    def has_ended(self, row: Mapping[str, Any], attempt_id: str) -> bool:  # noqa: ARG002 - of Leases
        """See Leases; this form cannot tell."""
        return False

    def settled(self, attempt_id: str, content: Mapping[str, object]) -> dict[str, object]:
        """See Leases; the attempt's id stays, and tells a repeat of this write from another attempt's."""
        metadata = content["metadata"]
        assert isinstance(metadata, dict)
        return {**content, "metadata": {**metadata, "attempt": attempt_id}}

    def is_held(self, update: AsyncSelectRequestBuilder, attempt_id: str) -> AsyncSelectRequestBuilder:
        """See Leases."""
        still_open = "status.eq.processing,and(status.eq.error,metadata->>stale.eq.true)"
        return update.eq(_ATTEMPT, attempt_id).or_(still_open)

    async def left_s(self, row: Mapping[str, Any]) -> float:
        """See Leases; a time beyond one lease from now was forged, and holds nothing."""
        since = _moment(row["updated_at"])
        if since is None:
            return 0.0
        ahead_s = (since - await self._rest.database_time()).total_seconds()
        return 0.0 if ahead_s > self._lease_s else ahead_s + self._lease_s

    def standing(self, row: Mapping[str, Any], attempt_id: str, *, shows_its_mask: bool) -> Standing:
        """See Leases; metadata without the attempt may have been edited after it had settled the row."""
        metadata = row["metadata"] if isinstance(row["metadata"], dict) else {}
        if row["status"] == "processing" or (row["status"] == "error" and metadata.get("stale") is True):
            return "held" if metadata.get("attempt") == attempt_id else "other"
        return "settled" if metadata.get("attempt") == attempt_id or shows_its_mask else "other"

    async def end_stale(self, grace_s: float) -> int:
        """See ResultStore; at most 1,000 rows that name an attempt, and all others, at once."""
        now = await self._rest.database_time()
        over = _over(now, self._lease_s + grace_s, self._lease_s)
        return await self._end_nameless(over) + await self._end_named(over)

    async def _end_nameless(self, over: str) -> int:
        """End the rows that name no attempt of ours: no result will come for them."""
        end = self._rest.update({"status": "error", "metadata": {"error_message": STALE_MESSAGE}})
        nameless = f"{_ATTEMPT}.is.null,{_ATTEMPT}.not.like.{_UUID_LIKE}"
        return await self._rest.count(end.eq("status", "processing").or_(over).or_(nameless))

    async def _end_named(self, over: str) -> int:
        ended = failed = 0
        while ended + failed < _MOST_AT_ONCE:
            # Only names of an id's length are read: users write to metadata too.
            query = self._rest.table.select("id", "updated_at", f"attempt:{_ATTEMPT}")
            query = query.eq("status", "processing").or_(over).like(_ATTEMPT, _UUID_LIKE)
            page = await self._rest.rows(query.order("id").range(failed, failed + _PAGE - 1))
            for row in page:
                try:
                    ended += await self._end(row)
                except ResultsError as error:
                    failed += 1
                    if isinstance(error, ResultsUnavailable) and failed >= _MOST_MISSES:
                        raise
                    logger.warning("a task that was left in the middle could not be ended: %s", error)
            if len(page) < _PAGE:
                break
        return ended

    async def _end(self, stale: Mapping[str, Any]) -> int:
        """End the row of `stale`, unless it has changed since it was read; how many rows that were."""
        metadata: dict[str, object] = {"error_message": STALE_MESSAGE, "stale": True}
        if _UUID.fullmatch(stale["attempt"]):
            metadata["attempt"] = stale["attempt"]
        end = self._rest.update({"status": "error", "metadata": metadata}).eq("id", stale["id"])
        return await self._rest.count(end.eq("status", "processing").eq("updated_at", stale["updated_at"]))


def without_attempt(metadata: Mapping[str, object]) -> dict[str, object]:
    """The metadata of a row that is done, without the attempt that MetadataLeases have left in it."""
    attempt = metadata.get("attempt")
    ours = isinstance(attempt, str) and _UUID.fullmatch(attempt)
    return {key: value for key, value in metadata.items() if not (ours and key == "attempt")}


def _over(now: datetime, age_s: float, ahead_s: float) -> str:
    """The filter, inside or=(...), of rows last changed `age_s` ago, or too far ahead to be true."""
    oldest, newest = now - timedelta(seconds=age_s), now + timedelta(seconds=ahead_s)
    return f'updated_at.lte."{oldest.isoformat()}",updated_at.gt."{newest.isoformat()}"'


def _moment(text: object) -> datetime | None:
    """A time of the database; None for infinity, and for years that Python does not know."""
    try:
        return datetime.fromisoformat(str(text)).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def _quoted(value: str) -> str:
    """`value` inside PostgREST's or=(...)."""
    return '"' + value.replace("\\", r"\\").replace('"', r"\"") + '"'
