"""The file of attempts: what was begun, how it ended, and when somebody must see to it next."""

from __future__ import annotations

import json
import random
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from results.base import Task
from results.errors import MetadataInvalid
from results.sqlite_file import SqliteFile

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MAX_PAUSE_S: Final = 30.0

State = Literal["unfinished", "untold"]
_CONDITIONS: Final[dict[State, str]] = {"unfinished": "outcome IS NULL", "untold": "outcome IS NOT NULL"}

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS attempts (
    attempt_id TEXT PRIMARY KEY,
    task TEXT NOT NULL,
    outcome TEXT,
    starts INTEGER NOT NULL,
    tries INTEGER NOT NULL DEFAULT 0,
    due_s REAL NOT NULL
) STRICT"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt ended; `mask_url`, `labels` and `metadata` belong to `done`."""

    status: Literal["done", "error", "pending"]
    mask_url: str | None = None
    labels: list[str] | None = None
    metadata: dict[str, object] | None = None
    error_message: str | None = None

    def to_json(self) -> str:
        """Raises MetadataInvalid for what JSON has no word for."""
        try:
            return json.dumps(asdict(self), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise MetadataInvalid("labels or metadata hold something that JSON has no word for") from error


@dataclass(frozen=True, slots=True)
class Attempt:
    """An attempt on the file. `starts` counts how often its work was begun."""

    task: Task
    attempt_id: str
    starts: int = 1
    outcome: Outcome | None = None


class AttemptFile:
    """The SQLite file `path`, made when it is missing; shared by the processes of one server.

    `now` is the clock, in s. Any method raises ResultsUnavailable when the file fails.
    """

    def __init__(self, path: Path, *, now: Callable[[], float] = time.time) -> None:
        self._file = SqliteFile(path, _SCHEMA)
        self._now = now

    async def add(self, attempt: Attempt, hold_s: float) -> None:
        """Note an attempt that begins; it is due in `hold_s` unless it ends before."""
        await self._write(
            "INSERT INTO attempts (attempt_id, task, starts, due_s) VALUES (?, ?, ?, ?)",
            *(attempt.attempt_id, json.dumps(asdict(attempt.task)), attempt.starts, self._now() + hold_s),
        )

    async def set_outcome(self, attempt_id: str, outcome: Outcome, hold_s: float) -> None:
        """Note how an attempt ended; it is due in `hold_s` unless it is removed before.

        Raises MetadataInvalid.
        """
        await self._write(
            "UPDATE attempts SET outcome = ?, due_s = ? WHERE attempt_id = ?",
            *(outcome.to_json(), self._now() + hold_s, attempt_id),
        )

    async def remove(self, attempt_id: str) -> None:
        """Forget an attempt whose row knows how it ended."""
        await self._write("DELETE FROM attempts WHERE attempt_id = ?", attempt_id)

    async def take(self, state: State, hold_s: float) -> Attempt | None:
        """The attempt that is due the longest, out of others' hands for `hold_s`; None if none is due.

        Taking an unfinished one counts as a start.
        """
        starts = "starts + 1" if state == "unfinished" else "starts"
        rows = await self._write(
            f"""UPDATE attempts SET due_s = ?, starts = {starts} WHERE attempt_id = (
                SELECT attempt_id FROM attempts WHERE {_CONDITIONS[state]} AND due_s <= ?
                ORDER BY due_s LIMIT 1)
            RETURNING attempt_id, task, starts, outcome""",  # noqa: S608 - the words are ours
            *(self._now() + hold_s, self._now()),
        )
        return _attempt(*rows[0]) if rows else None

    async def postpone(self, attempt_id: str, *, undo_start: bool = False) -> None:
        """Due after a pause that doubles each time, with jitter. `undo_start`: the start came to nothing."""
        rows = await self._write(
            "UPDATE attempts SET tries = tries + 1, starts = starts - ? WHERE attempt_id = ? RETURNING tries",
            *(int(undo_start), attempt_id),
        )
        for (tries,) in rows:
            pause_s = min(MAX_PAUSE_S, 2.0 ** (tries - 1)) * random.uniform(0.8, 1.2)  # noqa: S311 - jitter
            await self._write(
                "UPDATE attempts SET due_s = ? WHERE attempt_id = ?", self._now() + pause_s, attempt_id
            )

    async def make_due(self, state: State) -> int:
        """Make all of a state due now; how many they are."""
        await self._write(f"UPDATE attempts SET due_s = 0 WHERE {_CONDITIONS[state]}")  # noqa: S608 - ours
        return await self.count(state)

    async def count(self, state: State) -> int:
        """How many attempts are in a state, due or not."""
        [[count]] = await self._write(f"SELECT count(*) FROM attempts WHERE {_CONDITIONS[state]}")  # noqa: S608 - ours
        return int(count)

    async def close(self) -> None:
        """Finish what was begun; closing twice is harmless."""
        await self._file.close()

    async def _write(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        # All rows are fetched: an UPDATE with RETURNING is committed when its last row is read.
        return await self._file.run(lambda: self._file.db.execute(statement, values).fetchall())


def _attempt(attempt_id: str, task: str, starts: int, outcome: str | None) -> Attempt:
    fields = json.loads(task)
    return Attempt(
        task=Task(**{**fields, "prompts": tuple(fields["prompts"])}),
        attempt_id=attempt_id,
        starts=starts,
        outcome=None if outcome is None else Outcome(**json.loads(outcome)),
    )
