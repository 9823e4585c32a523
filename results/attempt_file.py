"""The attempts in the file of attempts: the tasks that this server has taken, their owners and outcomes.

A task and user have at most one attempt. An attempt is in one of three states:

    active       `owner` is the process that works on it
    waiting      it has no owner: a process acquires it when it is due
    undelivered  it has an outcome that the task's row does not hold yet

Times are those of `time.monotonic`, which all processes of a host share and nobody can set;
`reset_after_restart` resets them, since the clock of another boot has another origin.
"""

from __future__ import annotations

import json
import logging
import random
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from results.attempt_schema import MIGRATIONS
from results.attempts import Attempt, Lease, Outcome, read_attempt, task_text
from results.errors import TaskInProgress
from results.given_up import GIVEN_UP_MESSAGE, MAX_EXCLUSIVE_DEATHS, GivenUpList
from results.sqlite_file import SqliteFile
from results.unneeded_masks import UnneededMasks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from results.base import Task

logger = logging.getLogger(__name__)

MAX_BACKOFF_S: Final = 30.0
RETRY_AFTER_S: Final = 2.0
"""Most active tasks of this server are done by then."""
FIRST_RENEWAL_S: Final = 20.0
"""When an attempt begins to wait, the claim that it brings may have a minute left."""

# Values of the column `begun`: whether the work that may kill a process is in progress, and in which mode.
_NOT_IN_WORK, _SHARED, _WAITS_FOR_EXCLUSIVE, _EXCLUSIVE = range(4)

_COLUMNS: Final = "attempt_id, task, request_id, outcome, deaths"


class AttemptFile:
    """The SQLite file `path`, created when it is missing; shared by the processes of one server.

    Args:
        path: of the file.
        owner: names this process.
        is_alive: whether the process that an owner names still runs.
        server_version: a given-up task is attempted again once it changes.
        now: the clock, in s.

    Attributes:
        given_up: the list of given-up tasks.
        unneeded_masks: the list of masks to delete.

    Raises ResultsMisconfigured when the file cannot be used; any method raises ResultsUnavailable when it
    fails later.
    """

    def __init__(
        self,
        path: Path,
        *,
        owner: str,
        is_alive: Callable[[str], bool],
        server_version: str,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file = SqliteFile(path, MIGRATIONS)
        self._owner = owner
        self._is_alive = is_alive
        self._now = now
        self.given_up: Final = GivenUpList(self._file, server_version)
        self.unneeded_masks: Final = UnneededMasks(self._file, now)

    async def add(self, attempt: Attempt) -> Attempt:
        """Store an attempt that this process owns; acquire the one that waits for the same task instead.

        Raises TaskInProgress while a process works on the task, its outcome is undelivered, or the waiting
        attempt is for another image or other prompts.
        """
        return await self._file.run(lambda: self._add(attempt))

    async def acquire_waiting(self) -> Attempt | None:
        """The next waiting attempt that is due, now owned by this process; None when none is due.

        Suspects come last. One suspect is acquired at a time: the next one when the former's dangerous work
        is over.
        """
        return await self._acquire(
            """UPDATE attempts SET owner = :owner WHERE attempt_id = (
                SELECT attempt_id FROM attempts WHERE owner IS NULL AND outcome IS NULL AND due_s <= :now
                AND (deaths = 0 OR NOT EXISTS (SELECT 1 FROM attempts
                    WHERE owner IS NOT NULL AND outcome IS NULL AND deaths > 0 AND mask_keys = '[]'))
                ORDER BY deaths, due_s LIMIT 1)"""
        )

    async def acquire_undelivered(self, hold_s: float) -> Attempt | None:
        """The attempt whose outcome is overdue the longest, hidden from other calls for `hold_s`.

        None when no outcome is due.
        """
        return await self._acquire(
            """UPDATE attempts SET due_s = :now + :hold_s WHERE attempt_id = (
                SELECT attempt_id FROM attempts WHERE outcome IS NOT NULL AND due_s <= :now
                ORDER BY due_s LIMIT 1)""",
            hold_s=hold_s,
        )

    async def begin_work(self, attempt: Attempt, image_sha256: str | None) -> bool:
        """Record that the work that may kill a process begins; False: it may not begin yet, ask again.

        Work never begins for an attempt that this process does not own. A suspect works exclusively: it
        begins when no other work is in progress, and none begins beside it, that of no task included. No
        other work begins while a suspect waits for that either, so the suspect does not starve.
        """
        if not attempt.suspect:
            statement = f"""UPDATE attempts SET begun = {_SHARED}
                WHERE attempt_id = :attempt_id AND owner = :owner AND outcome IS NULL
                AND NOT EXISTS (SELECT 1 FROM attempts WHERE begun >= {_WAITS_FOR_EXCLUSIVE})
                RETURNING begun"""
        else:
            statement = f"""UPDATE attempts SET image_sha256 = :image_sha256, begun = CASE
                WHEN EXISTS (SELECT 1 FROM attempts WHERE begun = {_SHARED})
                    OR EXISTS (SELECT 1 FROM other_work)
                THEN {_WAITS_FOR_EXCLUSIVE} ELSE {_EXCLUSIVE} END
                WHERE attempt_id = :attempt_id AND owner = :owner AND outcome IS NULL
                AND NOT EXISTS (SELECT 1 FROM attempts
                    WHERE begun >= {_WAITS_FOR_EXCLUSIVE} AND attempt_id <> :attempt_id)
                RETURNING begun"""
        rows = await self._execute(statement, attempt_id=attempt.attempt_id, image_sha256=image_sha256)
        return bool(rows) and rows[0][0] != _WAITS_FOR_EXCLUSIVE

    async def end_work(self, attempt_id: str, mask_keys: list[str]) -> None:
        """Record that the work that may kill a process is over, and which masks are stored next."""
        await self._execute(
            f"""UPDATE attempts SET begun = {_NOT_IN_WORK}, mask_keys = (SELECT json_group_array(value) FROM
                (SELECT value FROM json_each(mask_keys) UNION SELECT value FROM json_each(:keys)))
            WHERE attempt_id = :attempt_id""",
            attempt_id=attempt_id,
            keys=json.dumps(mask_keys),
        )

    async def begin_other_work(self, work_id: str) -> bool:
        """Record that work begins that is no attempt's and may kill a process; False: not yet, ask again."""
        rows = await self._execute(
            f"""INSERT INTO other_work (work_id, owner) SELECT :work_id, :owner
            WHERE NOT EXISTS (SELECT 1 FROM attempts WHERE begun >= {_WAITS_FOR_EXCLUSIVE}) RETURNING 1""",
            work_id=work_id,
        )
        return bool(rows)

    async def end_other_work(self, work_ids: Iterable[str]) -> None:
        """Record that all such work of this process is over, but for `work_ids`."""
        await self._execute(
            """DELETE FROM other_work
            WHERE owner = :owner AND work_id NOT IN (SELECT value FROM json_each(:work_ids))""",
            work_ids=json.dumps(list(work_ids)),
        )

    async def requeue_after_death(self, attempt_id: str) -> bool:
        """Count a process death during this attempt's work; the attempt waits. False: it is given up."""
        return await self._file.run(partial(self._count_deaths, "attempt_id", attempt_id)) == 0

    async def requeue(
        self, attempt_id: str, reason: str | None, *, limit_s: float = 0.0, with_backoff: bool
    ) -> bool:
        """Let the attempt wait, without an owner; False, and no change, when it has waited too long.

        Args:
            attempt_id: of the attempt.
            reason: what a claimed task waits for, in words for its user; None: its row is not claimed, so
                there is no lease to renew and no limit.
            limit_s: how long a claimed task may wait in total.
            with_backoff: it is due after a backoff that doubles each time, with jitter; else it is due now.
        """
        now_s = self._now()
        rows = await self._execute(
            f"""UPDATE attempts SET owner = NULL, begun = {_NOT_IN_WORK},
                tries = tries + :with_backoff, due_s = :due_s,
                renew_at_s = CASE WHEN :reason IS NULL THEN renew_at_s ELSE :renew_at_s END,
                waiting_since_s = CASE WHEN :reason IS NULL THEN waiting_since_s
                    ELSE coalesce(waiting_since_s, :now) END,
                waiting_for = coalesce(:reason, waiting_for)
            WHERE attempt_id = :attempt_id
                AND (:reason IS NULL OR waiting_since_s IS NULL OR :now - waiting_since_s <= :limit_s)
            RETURNING tries""",
            attempt_id=attempt_id,
            reason=reason,
            limit_s=limit_s,
            with_backoff=int(with_backoff),
            due_s=now_s + MAX_BACKOFF_S if with_backoff else now_s,
            renew_at_s=now_s + FIRST_RENEWAL_S,
        )
        for (tries,) in rows if with_backoff else ():
            await self._execute(
                "UPDATE attempts SET due_s = :due_s WHERE attempt_id = :attempt_id AND owner IS NULL",
                attempt_id=attempt_id,
                due_s=now_s + _backoff_s(tries),
            )
        return bool(rows)

    async def acquire_due_lease(self, hold_s: float, limit_s: float) -> Lease | None:
        """A waiting attempt whose lease must be renewed now, and again in `hold_s`; None: none is due."""
        rows = await self._execute(
            f"""UPDATE attempts SET renew_at_s = :now + :hold_s
            WHERE attempt_id = (SELECT attempt_id FROM attempts
                WHERE owner IS NULL AND outcome IS NULL AND renew_at_s <= :now ORDER BY renew_at_s LIMIT 1)
            RETURNING {_COLUMNS}, coalesce(:now - waiting_since_s > :limit_s, 0), waiting_for""",
            hold_s=hold_s,
            limit_s=limit_s,
        )
        for *columns, is_over_limit, reason in rows:
            if attempt := await self._read(columns):
                return Lease(attempt, bool(is_over_limit), reason or "the model was not ready")
        return None

    async def start_wait_limit(self, attempt_id: str, *, model_is_ready: bool) -> None:
        """Count a waiting attempt's time against the limit from now on, since its row is claimed.

        Args:
            attempt_id: of the attempt.
            model_is_ready: an attempt that waits for no outage is not limited then: it only waits for its
                exclusive work.
        """
        await self._execute(
            """UPDATE attempts SET waiting_since_s = CASE WHEN waiting_for IS NULL AND :model_is_ready
                THEN NULL ELSE coalesce(waiting_since_s, :now) END
            WHERE attempt_id = :attempt_id AND owner IS NULL""",
            attempt_id=attempt_id,
            model_is_ready=int(model_is_ready),
        )

    async def end_waiting(self, attempt_id: str, outcome: Outcome) -> bool:
        """End a waiting attempt; False, and no change, when a process has acquired it meanwhile."""
        return bool(
            await self._execute(
                """UPDATE attempts SET outcome = :outcome, due_s = :now
                WHERE attempt_id = :attempt_id AND owner IS NULL AND outcome IS NULL RETURNING 1""",
                attempt_id=attempt_id,
                outcome=outcome.to_json(),
            )
        )

    async def set_outcome(self, attempt_id: str, outcome: Outcome, hold_s: float) -> None:
        """Store how an attempt ended; its delivery is due in `hold_s` unless it is removed before.

        Raises MetadataInvalid.
        """
        await self._execute(
            f"""UPDATE attempts SET outcome = :outcome, due_s = :now + :hold_s, begun = {_NOT_IN_WORK}
            WHERE attempt_id = :attempt_id""",
            attempt_id=attempt_id,
            outcome=outcome.to_json(),
            hold_s=hold_s,
        )

    async def postpone_delivery(self, attempt_id: str) -> None:
        """Make the outcome due after a backoff that doubles each time, with jitter."""
        for (tries,) in await self._execute(
            "UPDATE attempts SET tries = tries + 1 WHERE attempt_id = :attempt_id RETURNING tries",
            attempt_id=attempt_id,
        ):
            await self._execute(
                "UPDATE attempts SET due_s = :due_s WHERE attempt_id = :attempt_id",
                attempt_id=attempt_id,
                due_s=self._now() + _backoff_s(tries),
            )

    async def remove(self, attempt_id: str, referenced: str | None = None) -> None:
        """Remove an attempt that needs nothing more.

        Args:
            attempt_id: of the attempt.
            referenced: text with the keys of the masks that the task's row refers to; the attempt's other
                masks are to be deleted. None: no mask is deleted.
        """
        await self._file.run(lambda: self._remove(attempt_id, referenced))

    async def requeue_abandoned(self, active: Iterable[str]) -> int:
        """Let the attempts wait that no process works on any more; return their number.

        Where the work that may kill a process was in progress, the end of the process counts as a death.

        Args:
            active: the ids of the attempts that this process works on; its other ones were left by an error.
        """
        left = await self._execute(
            f"""UPDATE attempts SET owner = NULL, begun = {_NOT_IN_WORK}, due_s = :now, renew_at_s = :now
            WHERE owner = :owner AND outcome IS NULL
                AND attempt_id NOT IN (SELECT value FROM json_each(:active)) RETURNING 1""",
            active=json.dumps(list(active)),
        )
        owners = await self._execute(
            "SELECT owner FROM attempts WHERE owner IS NOT NULL UNION SELECT owner FROM other_work"
        )
        dead = [owner for (owner,) in owners if owner != self._owner and not self._is_alive(owner)]
        for owner in dead:
            await self._file.run(partial(self._count_deaths, "owner", owner))
        return len(left) + len(dead)

    async def reset_after_restart(self) -> None:
        """Call once at the server's start: whatever waits is due now, by the current clock."""
        await self.requeue_abandoned(active=())
        await self._execute(
            """UPDATE attempts SET due_s = :now, tries = 0, renew_at_s = :now,
                waiting_since_s = CASE WHEN waiting_since_s IS NULL THEN NULL ELSE :now END
            WHERE owner IS NULL OR outcome IS NOT NULL"""
        )
        await self.unneeded_masks.make_all_due()

    async def stop_counting_deaths(self) -> None:
        """This process stops: its end does not count as a death during its attempts' work."""
        await self._execute(f"UPDATE attempts SET begun = {_NOT_IN_WORK} WHERE owner = :owner")

    async def make_undelivered_due(self) -> int:
        """Make all outcomes due now; return their number."""
        await self._execute("UPDATE attempts SET due_s = :now WHERE outcome IS NOT NULL")
        return await self.count_undelivered()

    async def count_undelivered(self) -> int:
        """The number of outcomes that the rows do not hold yet."""
        [[count]] = await self._execute("SELECT count(*) FROM attempts WHERE outcome IS NOT NULL")
        return int(count)

    async def count_waiting(self) -> int:
        """The number of attempts that wait."""
        [[count]] = await self._execute(
            "SELECT count(*) FROM attempts WHERE owner IS NULL AND outcome IS NULL"
        )
        return int(count)

    async def close(self) -> None:
        """Finish running calls and close the file; closing twice is harmless."""
        await self._file.close()

    def _add(self, attempt: Attempt) -> Attempt:
        with self._file.transaction():
            found = self._select(attempt.task)
            if found is None:
                self._insert(attempt)
                return attempt
            owner, outcome, *columns = found
            waiting = read_attempt(*columns) if owner is None and outcome is None else None
            if waiting is None or waiting.task != attempt.task:
                raise TaskInProgress(attempt.task.task_id, RETRY_AFTER_S)
            self._file.db.execute(
                "UPDATE attempts SET owner = ?, request_id = ? WHERE attempt_id = ?",
                (self._owner, attempt.request_id, waiting.attempt_id),
            )
        return replace(waiting, request_id=attempt.request_id)

    def _select(self, task: Task) -> tuple[Any, ...] | None:
        """The owner, the outcome and `_COLUMNS` of the task's attempt."""
        row: tuple[Any, ...] | None = self._file.db.execute(
            f"SELECT owner, outcome, {_COLUMNS} FROM attempts WHERE task_id = ? AND user_id = ?",
            (task.task_id, task.user_id),
        ).fetchone()
        return row

    def _insert(self, attempt: Attempt) -> None:
        task = attempt.task
        self._file.db.execute(
            "INSERT INTO attempts (attempt_id, task_id, user_id, task, request_id, owner)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            (
                *(attempt.attempt_id, task.task_id, task.user_id, task_text(task)),
                *(attempt.request_id, self._owner),
            ),
        )

    def _count_deaths(self, column: str, value: str) -> int:
        """Requeue attempts whose process died; the number of those that are given up for too many deaths."""
        given_up = 0
        with self._file.transaction():
            if column == "owner":
                self._file.db.execute("DELETE FROM other_work WHERE owner = ?", (value,))
            rows = self._file.db.execute(
                f"""UPDATE attempts SET owner = NULL, due_s = :now, renew_at_s = :now,
                    deaths = deaths + (begun IN ({_SHARED}, {_EXCLUSIVE})),
                    deaths_alone = deaths_alone + (begun = {_EXCLUSIVE}), begun = {_NOT_IN_WORK}
                WHERE {column} = :value
                RETURNING attempt_id, outcome, deaths_alone""",
                {"now": self._now(), "value": value},
            ).fetchall()
            for attempt_id, outcome, deaths_alone in rows:
                if outcome is None and deaths_alone >= MAX_EXCLUSIVE_DEATHS:
                    self._give_up(attempt_id)
                    given_up += 1
        return given_up

    def _give_up(self, attempt_id: str) -> None:
        self.given_up.add(attempt_id)
        self._file.db.execute(
            "UPDATE attempts SET outcome = ?, due_s = ? WHERE attempt_id = ?",
            (Outcome("error", error_message=GIVEN_UP_MESSAGE).to_json(), self._now(), attempt_id),
        )

    def _remove(self, attempt_id: str, referenced: str | None) -> None:
        with self._file.transaction():
            if referenced is not None:
                self.unneeded_masks.add(attempt_id, referenced)
            self._file.db.execute("DELETE FROM attempts WHERE attempt_id = ?", (attempt_id,))

    async def _acquire(self, update: str, **values: object) -> Attempt | None:
        """The attempt that `update` has changed. One that is not readable is set aside and skipped."""
        while rows := await self._execute(f"{update} RETURNING {_COLUMNS}", **values):
            if attempt := await self._read(rows[0]):
                return attempt
        return None

    async def _read(self, columns: Any) -> Attempt | None:
        """The attempt; None when it is not readable: it is set aside, since no retry would succeed."""
        try:
            return read_attempt(*columns)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            logger.error("an attempt in the file is not readable (%s): set aside", type(error).__name__)  # noqa: TRY400 - its content is private
            await self._file.run(partial(self._set_aside, columns[0], type(error).__name__))
            return None

    def _set_aside(self, attempt_id: str, reason: str) -> None:
        with self._file.transaction():
            self._file.db.execute(
                """INSERT INTO set_aside SELECT datetime(), ?, json_array(attempt_id, task, outcome)
                FROM attempts WHERE attempt_id = ?""",
                (reason, attempt_id),
            )
            self._file.db.execute("DELETE FROM attempts WHERE attempt_id = ?", (attempt_id,))

    async def _execute(self, statement: str, **values: object) -> list[tuple[Any, ...]]:
        return await self._file.execute(statement, {"owner": self._owner, "now": self._now(), **values})


def _backoff_s(tries: int) -> float:
    return min(MAX_BACKOFF_S, 2.0 ** min(tries - 1, 10)) * random.uniform(0.8, 1.2)  # noqa: S311 - jitter
