"""The file of attempts: which tasks this server has taken, who works on them, and how they ended.

One attempt a task and user. An attempt is in one of three states:

    at work      `owner` is the process that works on it
    waiting      no owner: begun again when it is due
    undelivered  it has an outcome that the task's row does not hold yet

Times are those of `time.monotonic`, which the processes of a host share and no one sets; `start_over`
brings them up to date after a restart.
"""

from __future__ import annotations

import json
import logging
import random
import time
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from results.attempts import Attempt, GivenUp, Lease, Outcome, read_attempt, read_task
from results.errors import TaskInProgress
from results.sqlite_file import SqliteFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from results.base import Task

logger = logging.getLogger(__name__)

MAX_PAUSE_S: Final = 30.0
MAX_DEATHS_ALONE: Final = 3
"""A task is given up when a process has died so often while it worked on this task and on no other."""
GIVEN_UP_MESSAGE: Final = (
    f"the server's process stopped {MAX_DEATHS_ALONE} times while it worked on this task alone; it is not "
    "tried again until its image or the server's version changes"
)
RETRY_AFTER_S: Final = 2.0
"""Most tasks at work here are done by then."""
DELETE_AFTER_S: Final = 30.0
"""An upload that was given up may still arrive for so long; deleted before, its mask would stay."""
FIRST_RENEWAL_S: Final = 20.0
"""A claim that a task brings with it when it begins to wait may have a minute left, not more."""

# Values of the column `begun`: has the work that may kill a process begun?
_NOT_BEGUN, _BESIDE_OTHERS, _WAITS_TO_BE_ALONE, _ALONE = range(4)

_MIGRATIONS: Final = (
    # Version 1: what server 0.1.0 wrote, without a version.
    (
        """CREATE TABLE IF NOT EXISTS attempts (
            attempt_id TEXT PRIMARY KEY,
            task TEXT NOT NULL,
            outcome TEXT,
            starts INTEGER NOT NULL,
            tries INTEGER NOT NULL DEFAULT 0,
            due_s REAL NOT NULL
        ) STRICT""",
    ),
    # Version 2: one attempt a task, its owner, its lease, its deaths, its masks.
    (
        "ALTER TABLE attempts RENAME TO attempts_1",
        """CREATE TABLE attempts (
            attempt_id TEXT PRIMARY KEY,
            task_id TEXT NOT NULL,
            user_id TEXT NOT NULL,
            task TEXT NOT NULL,
            request_id TEXT NOT NULL DEFAULT '-',
            outcome TEXT,
            owner TEXT,
            due_s REAL NOT NULL DEFAULT 0,
            tries INTEGER NOT NULL DEFAULT 0,
            renew_at_s REAL,
            waiting_since_s REAL,
            waiting_for TEXT,
            begun INTEGER NOT NULL DEFAULT 0,
            deaths INTEGER NOT NULL DEFAULT 0,
            deaths_alone INTEGER NOT NULL DEFAULT 0,
            image_sha256 TEXT,
            mask_keys TEXT NOT NULL DEFAULT '[]',
            UNIQUE (task_id, user_id)
        ) STRICT""",
        "CREATE INDEX attempts_due ON attempts (due_s) WHERE owner IS NULL",
        "CREATE INDEX attempts_owner ON attempts (owner) WHERE owner IS NOT NULL",
        "CREATE INDEX attempts_begun ON attempts (begun) WHERE begun > 0",
        "CREATE INDEX attempts_lease ON attempts (renew_at_s) WHERE owner IS NULL",
        "CREATE INDEX attempts_undelivered ON attempts (due_s) WHERE outcome IS NOT NULL",
        """CREATE TABLE given_up (
            task_id TEXT NOT NULL,
            user_id TEXT NOT NULL,
            task TEXT NOT NULL,
            image_sha256 TEXT,
            server_version TEXT NOT NULL,
            error_message TEXT NOT NULL,
            given_up_at TEXT NOT NULL,
            PRIMARY KEY (task_id, user_id)
        ) STRICT""",
        "CREATE TABLE unneeded_masks (key TEXT PRIMARY KEY, due_s REAL NOT NULL) STRICT",
        "CREATE TABLE set_aside (found_at TEXT NOT NULL, reason TEXT NOT NULL, content TEXT NOT NULL) STRICT",
        # Where there were several attempts at a task, one that has ended goes first. What was to be given
        # back as pending is done instead.
        """INSERT OR IGNORE INTO attempts (attempt_id, task_id, user_id, task, tries, outcome)
            SELECT attempt_id, json_extract(task, '$.task_id'), json_extract(task, '$.user_id'), task,
                tries, CASE WHEN outcome LIKE '%"status": "pending"%' THEN NULL ELSE outcome END
            FROM attempts_1
            WHERE CASE WHEN json_valid(task) THEN json_type(task, '$.task_id') = 'text'
                AND json_type(task, '$.user_id') = 'text' END
            ORDER BY outcome IS NULL, due_s""",
        """INSERT INTO set_aside
            SELECT datetime(), 'not readable', json_array(attempt_id, task, outcome) FROM attempts_1
            WHERE coalesce(CASE WHEN json_valid(task) THEN json_type(task, '$.task_id') = 'text'
                AND json_type(task, '$.user_id') = 'text' END, 0) = 0""",
        "DROP TABLE attempts_1",
    ),
)

_GIVEN_UP: Final = "task, image_sha256, server_version, error_message, given_up_at"
_COLUMNS: Final = "attempt_id, task, request_id, outcome, deaths"


class AttemptFile:
    """The SQLite file `path`, made when it is missing; shared by the processes of one server.

    Args:
        path: of the file.
        owner: names this process.
        is_alive: whether the process that an owner's name means is still there.
        server_version: a task that is given up stays so until it changes.
        now: the clock, in s.

    Making it raises ResultsMisconfigured; any method raises ResultsUnavailable when the file fails.
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
        self._file = SqliteFile(path, _MIGRATIONS)
        self._owner = owner
        self._is_alive = is_alive
        self._server_version = server_version
        self._now = now

    async def add(self, attempt: Attempt) -> Attempt:
        """Note an attempt that begins in this process; a waiting one at the same task is begun instead.

        Raises TaskInProgress while a process works on the task, its outcome is undelivered, or the waiting
        attempt is for another image or other prompts.
        """
        return await self._file.run(lambda: self._add(attempt))

    async def take_waiting(self) -> Attempt | None:
        """The next attempt to begin again, now this process's; None when none is due.

        Those that no process has died of come first. Of the others the next is handed out when the former
        has its dangerous work behind it.
        """
        return await self._take(
            """UPDATE attempts SET owner = :owner WHERE attempt_id = (
                SELECT attempt_id FROM attempts WHERE owner IS NULL AND outcome IS NULL AND due_s <= :now
                AND (deaths = 0 OR NOT EXISTS (SELECT 1 FROM attempts
                    WHERE owner IS NOT NULL AND outcome IS NULL AND deaths > 0 AND mask_keys = '[]'))
                ORDER BY deaths, due_s LIMIT 1)"""
        )

    async def take_undelivered(self, hold_s: float) -> Attempt | None:
        """The outcome that is due the longest, out of others' hands for `hold_s`; None if none is due."""
        return await self._take(
            """UPDATE attempts SET due_s = :now + :hold_s WHERE attempt_id = (
                SELECT attempt_id FROM attempts WHERE outcome IS NOT NULL AND due_s <= :now
                ORDER BY due_s LIMIT 1)""",
            hold_s=hold_s,
        )

    async def begin(self, attempt: Attempt, image_sha256: str | None) -> bool:
        """Whether the work that may kill a process may begin; noted when it may, else to be asked again.

        It may not while the attempt is not this process's. A suspect begins when nothing else is at work,
        and nothing else begins beside it. While it waits for that no other begins, so its turn comes.
        """
        if not attempt.suspect:
            statement = f"""UPDATE attempts SET begun = {_BESIDE_OTHERS}
                WHERE attempt_id = :attempt_id AND owner = :owner AND outcome IS NULL
                AND NOT EXISTS (SELECT 1 FROM attempts WHERE begun >= {_WAITS_TO_BE_ALONE})
                RETURNING begun"""
        else:
            statement = f"""UPDATE attempts SET image_sha256 = :image_sha256, begun = CASE
                WHEN EXISTS (SELECT 1 FROM attempts WHERE begun = {_BESIDE_OTHERS})
                THEN {_WAITS_TO_BE_ALONE} ELSE {_ALONE} END
                WHERE attempt_id = :attempt_id AND owner = :owner AND outcome IS NULL
                AND NOT EXISTS (SELECT 1 FROM attempts
                    WHERE begun >= {_WAITS_TO_BE_ALONE} AND attempt_id <> :attempt_id)
                RETURNING begun"""
        rows = await self._execute(statement, attempt_id=attempt.attempt_id, image_sha256=image_sha256)
        return bool(rows) and rows[0][0] != _WAITS_TO_BE_ALONE

    async def end_work(self, attempt_id: str, mask_keys: list[str]) -> None:
        """The work that may kill a process is over; these masks are stored next."""
        await self._execute(
            f"""UPDATE attempts SET begun = {_NOT_BEGUN}, mask_keys = (SELECT json_group_array(value) FROM
                (SELECT value FROM json_each(mask_keys) UNION SELECT value FROM json_each(:keys)))
            WHERE attempt_id = :attempt_id""",
            attempt_id=attempt_id,
            keys=json.dumps(mask_keys),
        )

    async def count_death(self, attempt_id: str) -> bool:
        """A process died in the middle of this attempt's work: it waits; False: it is given up."""
        return await self._file.run(partial(self._count_deaths, "attempt_id", attempt_id)) == 0

    async def wait(self, attempt_id: str, reason: str | None, *, limit_s: float = 0.0, pause: bool) -> bool:
        """Let the attempt wait, without an owner; False, and no change, when it has waited too long.

        Args:
            attempt_id: of the attempt.
            reason: what a claimed task waits for, in words for its user; None: its row is not claimed, so
                there is no lease to renew and no limit.
            limit_s: how long a claimed task may wait in all.
            pause: it is due after a pause that doubles each time, with jitter; else at once.
        """
        now_s = self._now()
        rows = await self._execute(
            f"""UPDATE attempts SET owner = NULL, begun = {_NOT_BEGUN},
                tries = tries + :pause, due_s = :due_s,
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
            pause=int(pause),
            due_s=now_s + MAX_PAUSE_S if pause else now_s,
            renew_at_s=now_s + FIRST_RENEWAL_S,
        )
        for (tries,) in rows if pause else ():
            await self._execute(
                "UPDATE attempts SET due_s = :due_s WHERE attempt_id = :attempt_id AND owner IS NULL",
                attempt_id=attempt_id,
                due_s=now_s + _pause_s(tries),
            )
        return bool(rows)

    async def take_lease(self, hold_s: float, limit_s: float) -> Lease | None:
        """A waiting attempt whose lease must be renewed now, and again in `hold_s`; None: none is due."""
        rows = await self._execute(
            f"""UPDATE attempts SET renew_at_s = :now + :hold_s
            WHERE attempt_id = (SELECT attempt_id FROM attempts
                WHERE owner IS NULL AND outcome IS NULL AND renew_at_s <= :now ORDER BY renew_at_s LIMIT 1)
            RETURNING {_COLUMNS}, coalesce(:now - waiting_since_s > :limit_s, 0), waiting_for""",
            hold_s=hold_s,
            limit_s=limit_s,
        )
        for *columns, is_over, reason in rows:
            if attempt := await self._read(columns):
                return Lease(attempt, bool(is_over), reason or "the model was not ready")
        return None

    async def count_waiting_time(self, attempt_id: str, *, is_for_its_turn: bool) -> None:
        """The row of a waiting attempt is claimed: from now on its time of waiting counts against the limit.

        Not where it waits for its turn alone, and for nothing that is away.
        """
        await self._execute(
            """UPDATE attempts SET waiting_since_s = CASE WHEN waiting_for IS NULL AND :is_for_its_turn
                THEN NULL ELSE coalesce(waiting_since_s, :now) END
            WHERE attempt_id = :attempt_id AND owner IS NULL""",
            attempt_id=attempt_id,
            is_for_its_turn=int(is_for_its_turn),
        )

    async def end_waiting(self, attempt_id: str, outcome: Outcome) -> bool:
        """End an attempt that waits; False, and no change, when somebody has begun it meanwhile."""
        return bool(
            await self._execute(
                """UPDATE attempts SET outcome = :outcome, due_s = :now
                WHERE attempt_id = :attempt_id AND owner IS NULL AND outcome IS NULL RETURNING 1""",
                attempt_id=attempt_id,
                outcome=outcome.to_json(),
            )
        )

    async def set_outcome(self, attempt_id: str, outcome: Outcome, hold_s: float) -> None:
        """Note how an attempt ended; it is due in `hold_s` unless it is removed before.

        Raises MetadataInvalid.
        """
        await self._execute(
            f"""UPDATE attempts SET outcome = :outcome, due_s = :now + :hold_s, begun = {_NOT_BEGUN}
            WHERE attempt_id = :attempt_id""",
            attempt_id=attempt_id,
            outcome=outcome.to_json(),
            hold_s=hold_s,
        )

    async def postpone_delivery(self, attempt_id: str) -> None:
        """The outcome is due after a pause that doubles each time, with jitter."""
        for (tries,) in await self._execute(
            "UPDATE attempts SET tries = tries + 1 WHERE attempt_id = :attempt_id RETURNING tries",
            attempt_id=attempt_id,
        ):
            await self._execute(
                "UPDATE attempts SET due_s = :due_s WHERE attempt_id = :attempt_id",
                attempt_id=attempt_id,
                due_s=self._now() + _pause_s(tries),
            )

    async def remove(self, attempt_id: str, named: str | None = None) -> None:
        """Forget an attempt that needs nothing more.

        Args:
            attempt_id: of the attempt.
            named: text that holds the keys of the masks that its task's row names; the others are to be
                deleted. None: all are needed.
        """
        await self._file.run(lambda: self._remove(attempt_id, named))

    async def release_dead(self, at_work: Iterable[str]) -> int:
        """Let the attempts wait that nobody works on any more; how many they are.

        Where the work that may kill a process had begun, the end of the process counts as a death.

        Args:
            at_work: the attempts that this process works on; others that it owns were left by an error.
        """
        left = await self._execute(
            f"""UPDATE attempts SET owner = NULL, begun = {_NOT_BEGUN}, due_s = :now, renew_at_s = :now
            WHERE owner = :owner AND outcome IS NULL
                AND attempt_id NOT IN (SELECT value FROM json_each(:at_work)) RETURNING 1""",
            at_work=json.dumps(list(at_work)),
        )
        owners = await self._execute("SELECT DISTINCT owner FROM attempts WHERE owner IS NOT NULL")
        dead = [owner for (owner,) in owners if owner != self._owner and not self._is_alive(owner)]
        for owner in dead:
            await self._file.run(partial(self._count_deaths, "owner", owner))
        return len(left) + len(dead)

    async def start_over(self) -> None:
        """Call once at the server's start: what waits is due, and its times are this boot's."""
        await self.release_dead(at_work=())
        await self._execute(
            """UPDATE attempts SET due_s = :now, tries = 0, renew_at_s = :now,
                waiting_since_s = CASE WHEN waiting_since_s IS NULL THEN NULL ELSE :now END
            WHERE owner IS NULL OR outcome IS NOT NULL"""
        )
        await self._execute("UPDATE unneeded_masks SET due_s = :now")

    async def excuse(self) -> None:
        """This process is told to stop: should it be killed meanwhile, its tasks are not to blame."""
        await self._execute(f"UPDATE attempts SET begun = {_NOT_BEGUN} WHERE owner = :owner")

    async def make_undelivered_due(self) -> int:
        """Make all outcomes due now; how many they are."""
        await self._execute("UPDATE attempts SET due_s = :now WHERE outcome IS NOT NULL")
        return await self.count_undelivered()

    async def count_undelivered(self) -> int:
        """How many outcomes the rows do not hold yet."""
        [[count]] = await self._execute("SELECT count(*) FROM attempts WHERE outcome IS NOT NULL")
        return int(count)

    async def count_waiting(self) -> int:
        """How many tasks wait to be begun again."""
        [[count]] = await self._execute(
            "SELECT count(*) FROM attempts WHERE owner IS NULL AND outcome IS NULL"
        )
        return int(count)

    async def given_up(self, task: Task) -> GivenUp | None:
        """What is known of a task that was given up; None when it was not, or not for this request.

        Other prompts, and another version of the server, are another matter: then the record goes. So is
        another image, which its bytes tell, not its URL.
        """
        rows = await self._execute(
            f"SELECT {_GIVEN_UP} FROM given_up WHERE task_id = :task_id AND user_id = :user_id",
            task_id=task.task_id,
            user_id=task.user_id,
        )
        for row in rows:
            known = _given_up(*row)
            if known.task.prompts == task.prompts and known.server_version == self._server_version:
                return known
            await self.forgive(task.task_id)
        return None

    async def all_given_up(self) -> list[GivenUp]:
        """Every task that was given up, the latest first."""
        rows = await self._execute(f"SELECT {_GIVEN_UP} FROM given_up ORDER BY given_up_at DESC")
        return [_given_up(*row) for row in rows]

    async def count_given_up(self) -> int:
        """How many tasks are given up."""
        [[count]] = await self._execute("SELECT count(*) FROM given_up")
        return int(count)

    async def forgive(self, task_id: str) -> bool:
        """Let a task that was given up be tried again when it is sent again; False when there is none."""
        return bool(
            await self._execute("DELETE FROM given_up WHERE task_id = :task_id RETURNING 1", task_id=task_id)
        )

    async def unneeded_mask(self, next_s: float) -> str | None:
        """The key of a stored mask that nobody was told of; then in `next_s` again, until it is deleted."""
        rows = await self._execute(
            """UPDATE unneeded_masks SET due_s = :now + :next_s WHERE key = (
                SELECT key FROM unneeded_masks WHERE due_s <= :now ORDER BY due_s LIMIT 1) RETURNING key""",
            next_s=next_s,
        )
        return rows[0][0] if rows else None

    async def mask_deleted(self, key: str) -> None:
        """Forget the mask."""
        await self._execute("DELETE FROM unneeded_masks WHERE key = :key", key=key)

    async def close(self) -> None:
        """Finish what was begun; closing twice is harmless."""
        await self._file.close()

    def _add(self, attempt: Attempt) -> Attempt:
        task = attempt.task
        with self._file.transaction():
            found = self._file.db.execute(
                f"SELECT owner, outcome, {_COLUMNS} FROM attempts WHERE task_id = ? AND user_id = ?",
                (task.task_id, task.user_id),
            ).fetchone()
            if found is None:
                self._file.db.execute(
                    "INSERT INTO attempts (attempt_id, task_id, user_id, task, request_id, owner)"
                    " VALUES (?, ?, ?, ?, ?, ?)",
                    (
                        *(attempt.attempt_id, task.task_id, task.user_id, json.dumps(asdict(task))),
                        *(attempt.request_id, self._owner),
                    ),
                )
                return attempt
            owner, outcome, *columns = found
            waiting = read_attempt(*columns) if owner is None and outcome is None else None
            if waiting is None or waiting.task != task:
                raise TaskInProgress(task.task_id, RETRY_AFTER_S)
            self._file.db.execute(
                "UPDATE attempts SET owner = ?, request_id = ? WHERE attempt_id = ?",
                (self._owner, attempt.request_id, waiting.attempt_id),
            )
        return replace(waiting, request_id=attempt.request_id)

    def _count_deaths(self, column: str, value: str) -> int:
        """Set attempts back whose process died; how many have seen too many deaths alone and are given up."""
        given_up = 0
        with self._file.transaction():
            rows = self._file.db.execute(
                f"""UPDATE attempts SET owner = NULL, due_s = :now, renew_at_s = :now,
                    deaths = deaths + (begun IN ({_BESIDE_OTHERS}, {_ALONE})),
                    deaths_alone = deaths_alone + (begun = {_ALONE}), begun = {_NOT_BEGUN}
                WHERE {column} = :value
                RETURNING attempt_id, outcome, deaths_alone""",
                {"now": self._now(), "value": value},
            ).fetchall()
            for attempt_id, outcome, deaths_alone in rows:
                if outcome is None and deaths_alone >= MAX_DEATHS_ALONE:
                    self._give_up(attempt_id)
                    given_up += 1
        return given_up

    def _give_up(self, attempt_id: str) -> None:
        self._file.db.execute(
            """INSERT OR REPLACE INTO given_up
            SELECT task_id, user_id, task, image_sha256, ?, ?, datetime() FROM attempts
            WHERE attempt_id = ?""",
            (self._server_version, GIVEN_UP_MESSAGE, attempt_id),
        )
        self._file.db.execute(
            "UPDATE attempts SET outcome = ?, due_s = ? WHERE attempt_id = ?",
            (Outcome("error", error_message=GIVEN_UP_MESSAGE).to_json(), self._now(), attempt_id),
        )

    def _remove(self, attempt_id: str, named: str | None) -> None:
        with self._file.transaction():
            if named is not None:
                self._file.db.execute(
                    """INSERT OR IGNORE INTO unneeded_masks
                    SELECT value, ? FROM attempts, json_each(mask_keys)
                    WHERE attempt_id = ? AND instr(?, value) = 0""",
                    (self._now() + DELETE_AFTER_S, attempt_id, named),
                )
            self._file.db.execute("DELETE FROM attempts WHERE attempt_id = ?", (attempt_id,))

    async def _take(self, update: str, **values: object) -> Attempt | None:
        """The attempt that `update` has taken. One that cannot be read is set aside, and the next taken."""
        while rows := await self._execute(f"{update} RETURNING {_COLUMNS}", **values):
            if attempt := await self._read(rows[0]):
                return attempt
        return None

    async def _read(self, columns: Any) -> Attempt | None:
        """The attempt, or None when it cannot be read: then it is set aside, since no look would help."""
        try:
            return read_attempt(*columns)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            logger.error("an attempt on the file cannot be read (%s): set aside", type(error).__name__)  # noqa: TRY400 - its content is private
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
        named = {"owner": self._owner, "now": self._now(), **values}
        # All rows are fetched: an UPDATE with RETURNING is committed when its last row is read.
        return await self._file.run(lambda: self._file.db.execute(statement, named).fetchall())


def _given_up(task: str, *rest: str) -> GivenUp:
    return GivenUp(read_task(task), *rest)


def _pause_s(tries: int) -> float:
    return min(MAX_PAUSE_S, 2.0 ** min(tries - 1, 10)) * random.uniform(0.8, 1.2)  # noqa: S311 - jitter
