"""No task is lost: an attempt is on disk before its claim, its outcome before the row is told.

    claim ----> at work ----> outcome kept ----> row settled ----> forgotten
                  |   ^            '-- rows away: delivered later, by whichever process is up
                  |   '-- begun again, under the same attempt id, when it is due
                  '-- waits: a process died, the object store or the model is away; its lease is renewed

The row's own guards (results/base.py) make every repeat harmless.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar
from uuid import uuid4

from prometheus_client import Gauge

from results.attempt_file import AttemptFile
from results.attempts import Attempt, Outcome
from results.base import StoredResult
from results.errors import AlreadySettled, AttemptLost, ResultsError, ResultsUnavailable, TaskNotFound

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from results.attempts import GivenUp, Lease
    from results.base import ResultStore, Task

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

FIRST_TRY_S: Final = 60.0
"""The process that did the work settles the row itself, in less; after it any process may."""
RENEWALS_A_LEASE: Final = 3
ROUND: Final = 20
"""Outcomes or leases seen to in one go, before the caller looks at its other work."""
MAX_MISSES: Final = 2
"""One outcome that is always refused must not hold up the others, but rows that are away must."""
TURN_POLL_S: Final = 0.05
UNNEEDED_MASK_PAUSE_S: Final = 60.0
# At a stop, which most hosts turn into a kill after ten seconds.
LONG_WORK_S: Final = 4.0
NOTHING: Final = ""
"""What a row names that does not hold this attempt's result."""

# "mostrecent": the processes share the file, and so the number.
DEPTH = Gauge("sam3_outbox_depth", "Outcomes that wait for the database", multiprocess_mode="mostrecent")
WAITING = Gauge("sam3_tasks_waiting", "Tasks that wait to be begun again", multiprocess_mode="mostrecent")
GIVEN_UP = Gauge(
    "sam3_tasks_given_up", "Tasks that killed too often and are refused", multiprocess_mode="mostrecent"
)


class Outbox:
    """The rows of a ResultStore behind a file that outlives the process.

    Args:
        attempts: the file; shared by the processes of one server.
        rows: the rows.
        lease_s: of a claim; no attempt takes as long.
        outage_limit_s: a claimed task that waits longer for the object store or the model ends as error.
    """

    def __init__(
        self, attempts: AttemptFile, rows: ResultStore, *, lease_s: float, outage_limit_s: float
    ) -> None:
        self._attempts = attempts
        self._rows = rows
        self._lease_s = lease_s
        self._outage_limit_s = outage_limit_s
        # By attempt: the write that the file did not take, since its disk was full, say.
        self._unwritten: dict[str, Callable[[], Awaitable[object]]] = {}
        # How many runs have the attempt: the next one may begin before the one before has let go.
        self._at_work: Counter[str] = Counter()
        self._waiting_for_turn: set[str] = set()
        # What is taken is known here before anybody may look for what was left.
        self._taking = asyncio.Lock()
        self._is_stopping, self._long_work_until_s = False, math.inf

    async def note(self, task: Task, request_id: str) -> Attempt:
        """Put a task on the file, ahead of its claim; one that waits there already is begun by this process.

        Raises TaskInProgress when a process of this server works on it, and ResultsUnavailable.
        """
        async with self._taking:
            attempt = await self._attempts.add(Attempt(task, str(uuid4()), request_id=request_id))
            self._at_work[attempt.attempt_id] += 1
        return attempt

    def let_go(self, attempt: Attempt) -> None:
        """This process works on the attempt no more; what is left to do follows in the background."""
        self._at_work[attempt.attempt_id] -= 1
        self._at_work += Counter()  # without those that no run has
        self._waiting_for_turn.discard(attempt.attempt_id)

    def turns_are_awaited(self) -> bool:
        """Whether an attempt of this process waits in `begin_work` for another to be alone, or to be over."""
        return bool(self._waiting_for_turn)

    async def claim(self, attempt: Attempt) -> StoredResult | None:
        """Claim the row for an attempt that is on the file; the result, where the task is done already.

        When the rows are away the task is kept, and begun when they are back: ResultsUnavailable says so.
        Raises what ResultStore.claim raises, and then the attempt is forgotten.
        """
        try:
            claim = await self._rows.claim(attempt.task, attempt.attempt_id)
        except ResultsUnavailable as error:
            await self._write(attempt, partial(self._attempts.wait, attempt.attempt_id, None, pause=True))
            raise ResultsUnavailable(f"{error}; the task is kept, and done when they are back") from error
        except ResultsError:
            await self._forget(attempt, NOTHING)
            raise
        if not isinstance(claim, StoredResult):
            return None
        await self._forget(attempt, _named_by(claim))
        return claim

    async def begin_work(self, attempt: Attempt, image_sha256: str | None, *, is_long: bool = False) -> bool:
        """Wait for the attempt's turn, then note that the work that may kill a process has begun.

        A task during whose work a process has died gets a turn of its own, with nothing beside it. False:
        it gets none any more, since this process is to stop; work that `is_long` gets one for
        `LONG_WORK_S` from then on.
        """
        # Without the file the work is worth more than the note.
        with contextlib.suppress(ResultsUnavailable):
            while not self._is_stopping:
                if await self._attempts.begin(attempt, image_sha256):
                    self._waiting_for_turn.discard(attempt.attempt_id)
                    return True
                self._waiting_for_turn.add(attempt.attempt_id)
                await asyncio.sleep(TURN_POLL_S)
            # Nothing is noted any more: should this process be killed now, its tasks are not to blame.
            return not attempt.suspect and (not is_long or time.monotonic() < self._long_work_until_s)
        return True

    async def begin_storing(self, attempt: Attempt, mask_keys: list[str]) -> None:
        """Note the end of that work, and the masks that are stored next."""
        with contextlib.suppress(ResultsUnavailable):
            await self._attempts.end_work(attempt.attempt_id, mask_keys)

    async def update_result(
        self,
        attempt: Attempt,
        mask_url: str,
        labels: list[str],
        metadata: dict[str, object],
        mask_keys: list[str],
    ) -> None:
        """End the attempt as done; a row that is away is settled later, which is no error.

        Raises AttemptLost, TaskNotFound when the row is gone, and MetadataInvalid when it cannot be JSON.
        """
        await self._end(
            attempt,
            Outcome("done", mask_url=mask_url, labels=labels, metadata=metadata, mask_keys=mask_keys),
        )

    async def end_as_error(self, attempt: Attempt, error_message: str) -> None:
        """End the attempt without a result. Raises AttemptLost, TaskNotFound."""
        await self._end(attempt, Outcome("error", error_message=error_message))

    async def keep(self, attempt: Attempt, reason: str, *, pause: bool) -> bool:
        """Let a claimed attempt wait for what is away; False when it has waited as long as it may.

        Args:
            attempt: is this process's no more when it waits.
            reason: what is away, in words for the user.
            pause: not due at once, but after a pause that grows.
        """
        wait = partial(
            self._attempts.wait, attempt.attempt_id, reason, limit_s=self._outage_limit_s, pause=pause
        )
        return await self._write(attempt, wait) is not False

    async def keep_after_death(self, attempt: Attempt) -> bool:
        """The model's process died in the middle of the work: begin it again alone; False: it is given up."""
        counted = await self._write(attempt, partial(self._attempts.count_death, attempt.attempt_id))
        return counted is not False

    async def given_up(self, task: Task) -> GivenUp | None:
        """What is known of a task that was given up and is not to be tried again; None otherwise."""
        return await self._attempts.given_up(task)

    async def refuse(self, task: Task, error_message: str) -> None:
        """End a row that is pending as error, without a claim; others stay. Raises ResultsUnavailable."""
        await self._rows.refuse(task, error_message)

    async def forgive(self, task_id: str) -> None:
        """A task that was given up may be tried again."""
        await self._attempts.forgive(task_id)

    async def start_over(self) -> tuple[int, int]:
        """Call once at the server's start: what a dead server left behind is due.

        Returns how many outcomes wait for their rows, and how many tasks to be begun again.
        """
        await self._attempts.start_over()
        return await self._attempts.count_undelivered(), await self._attempts.count_waiting()

    async def release_dead(self) -> None:
        """Let the tasks be begun again on which nobody works any more."""
        async with self._taking:
            released = await self._attempts.release_dead({*self._at_work, *self._unwritten})
        if released:
            logger.warning("tasks were left behind by a process that is gone, or by an error")

    async def deliver_due(self) -> None:
        """Settle the rows whose outcome is due; those that fail are due again after a pause."""
        await self._write_unwritten()
        misses = 0
        for _ in range(ROUND):
            attempt = await self._attempts.take_undelivered(FIRST_TRY_S)
            if attempt is None:
                break
            misses += not await self._deliver(attempt)
            if misses == MAX_MISSES:
                break
        DEPTH.set(await self._attempts.count_undelivered())
        WAITING.set(await self._attempts.count_waiting())
        GIVEN_UP.set(await self._attempts.count_given_up())

    async def renew_leases(self, *, model_is_there: bool) -> None:
        """Renew the leases of claimed tasks that wait; end those that have waited too long.

        Args:
            model_is_there: a task that waits for its turn alone may wait as long as it takes.
        """
        leases = []
        for _ in range(ROUND):
            lease = await self._attempts.take_lease(self._lease_s / RENEWALS_A_LEASE, self._outage_limit_s)
            if lease is None:
                break
            leases.append(lease)
        await asyncio.gather(*(self._renew(lease, model_is_there=model_is_there) for lease in leases))

    async def _renew(self, lease: Lease, *, model_is_there: bool) -> None:
        attempt = lease.attempt
        if lease.is_over:
            minutes = self._outage_limit_s / 60
            message = f"{lease.reason}; given up after waiting {minutes:.0f} minutes"
            if await self._attempts.end_waiting(attempt.attempt_id, Outcome("error", error_message=message)):
                logger.warning(
                    "task %s is given up after %.0f minutes",
                    *(attempt.task.task_id, minutes),
                    extra=_log_ids(attempt),
                )
            return
        try:
            claim = await self._rows.claim(attempt.task, attempt.attempt_id)
        except ResultsUnavailable as error:
            logger.warning(
                "the lease of task %s is not renewed now: %s",
                *(attempt.task.task_id, error),
                extra=_log_ids(attempt),
            )
        except ResultsError as error:
            logger.warning("a waiting task is dropped: %s", error, extra=_log_ids(attempt))
            await self._forget(attempt, NOTHING)
        else:
            if isinstance(claim, StoredResult):
                await self._forget(attempt, _named_by(claim))
            else:
                await self._attempts.count_waiting_time(attempt.attempt_id, is_for_its_turn=model_is_there)

    async def take_waiting(self) -> Attempt | None:
        """An attempt to begin again, from now on this process's; None when none is due."""
        async with self._taking:
            attempt = await self._attempts.take_waiting()
            if attempt is not None:
                self._at_work[attempt.attempt_id] += 1
        return attempt

    async def end_stale(self) -> None:
        """End the tasks of servers that are gone: nobody else would, and their users wait."""
        ended = await self._rows.end_stale(self._lease_s)
        if ended:
            logger.warning("%d tasks were left in the middle by a server that is gone; ended as error", ended)

    async def unneeded_mask(self) -> str | None:
        """The key of a stored mask that nobody was told of, to be deleted; None when there is none."""
        return await self._attempts.unneeded_mask(UNNEEDED_MASK_PAUSE_S)

    async def mask_deleted(self, key: str) -> None:
        """Forget the mask."""
        await self._attempts.mask_deleted(key)

    async def excuse(self) -> None:
        """This process is told to stop: should it be killed meanwhile, its tasks are not to blame."""
        if not self._is_stopping:
            self._is_stopping, self._long_work_until_s = True, time.monotonic() + LONG_WORK_S
        with contextlib.suppress(ResultsUnavailable):
            await self._attempts.excuse()

    async def drain(self, timeout_s: float) -> None:
        """Settle all rows that can be settled within `timeout_s`, due or not; the rest stays on disk."""
        # A file that fails now must not stop the stop.
        with contextlib.suppress(TimeoutError, ResultsUnavailable):
            async with asyncio.timeout(timeout_s):
                left, before = await self._attempts.make_undelivered_due(), 0
                while left and left != before:
                    await self.deliver_due()
                    left, before = await self._attempts.count_undelivered(), left
        with contextlib.suppress(ResultsUnavailable):
            if left := await self._attempts.count_undelivered():
                logger.warning("%d outcomes stay on disk until the next start", left)

    async def close(self) -> None:
        """Let go of the file, and of the rows too."""
        await self._attempts.close()
        await self._rows.close()

    async def _end(self, attempt: Attempt, outcome: Outcome) -> None:
        outcome.to_json()  # raises MetadataInvalid before anything is written
        note = partial(self._attempts.set_outcome, attempt.attempt_id, outcome)
        await self._write(attempt, partial(note, hold_s=FIRST_TRY_S), later=partial(note, hold_s=0))
        try:
            await self._settle(attempt, outcome)
        except ResultsUnavailable as error:
            logger.warning(
                "task %s is %s; its row is settled later: %s",
                *(attempt.task.task_id, outcome.status, error),
                extra=_log_ids(attempt),
            )
            with contextlib.suppress(ResultsUnavailable):
                await self._attempts.postpone_delivery(attempt.attempt_id)

    async def _deliver(self, attempt: Attempt) -> bool:
        """Whether the row needs nothing more."""
        assert attempt.outcome is not None
        try:
            await self._settle(attempt, attempt.outcome)
        except ResultsUnavailable:
            await self._attempts.postpone_delivery(attempt.attempt_id)
            return False
        except (AttemptLost, TaskNotFound) as error:
            logger.warning("a kept outcome is dropped: %s", error, extra=_log_ids(attempt))
        except ResultsError as error:
            logger.exception(
                "task %s: its outcome cannot be stored", attempt.task.task_id, extra=_log_ids(attempt)
            )
            await self._attempts.set_outcome(
                attempt.attempt_id, Outcome("error", error_message=str(error)), hold_s=0
            )
        else:
            logger.info(
                "task %s: its row is settled as %s",
                *(attempt.task.task_id, attempt.outcome.status),
                extra=_log_ids(attempt),
            )
        return True

    async def _settle(self, attempt: Attempt, outcome: Outcome) -> None:
        """Settle the row, then forget the attempt. Raises what the rows raise."""
        named: str | None = " ".join(outcome.mask_keys or ())
        try:
            await self._update_row(attempt, outcome)
        except AlreadySettled:
            # By this very attempt; what its user has changed since is the user's affair.
            named = None
        except (AttemptLost, TaskNotFound):
            await self._forget(attempt, NOTHING)
            raise
        await self._forget(attempt, named)

    async def _update_row(self, attempt: Attempt, outcome: Outcome) -> None:
        task_id, attempt_id = attempt.task.task_id, attempt.attempt_id
        if outcome.status == "done":
            assert outcome.mask_url is not None
            await self._rows.update_result(
                *(task_id, outcome.mask_url, outcome.labels or [], outcome.metadata or {}),
                attempt_id=attempt_id,
            )
        else:
            await self._rows.update_status(
                task_id, "error", attempt_id=attempt_id, error_message=outcome.error_message
            )

    async def _forget(self, attempt: Attempt, named: str | None) -> None:
        """Forget an attempt, and let go of the masks that `named` does not hold (None: it holds all)."""
        await self._write(attempt, partial(self._attempts.remove, attempt.attempt_id, named))

    async def _write(
        self,
        attempt: Attempt,
        write: Callable[[], Awaitable[_T]],
        *,
        later: Callable[[], Awaitable[object]] | None = None,
    ) -> _T | None:
        """What the write gives; None when the file fails: then it, or `later`, is done when it can be.

        Until then the attempt is this process's on the file: should it die, the task is begun again.
        """
        try:
            written = await write()
        except ResultsUnavailable:
            self._unwritten[attempt.attempt_id] = later or write
            return None
        self._unwritten.pop(attempt.attempt_id, None)
        return written

    async def _write_unwritten(self) -> None:
        """Bring to the file what it did not take while it could not be written."""
        for attempt_id, write in list(self._unwritten.items()):
            await write()
            if self._unwritten.get(attempt_id) is write:
                del self._unwritten[attempt_id]


def open_outbox(
    path: Path,
    rows: ResultStore,
    *,
    owner: str,
    is_alive: Callable[[str], bool],
    server_version: str,
    lease_s: float,
    outage_limit_s: float,
    now: Callable[[], float] = time.monotonic,
) -> Outbox:
    """The outbox in the file `path`; see AttemptFile and Outbox. Raises ResultsMisconfigured."""
    attempts = AttemptFile(path, owner=owner, is_alive=is_alive, server_version=server_version, now=now)
    return Outbox(attempts, rows, lease_s=lease_s, outage_limit_s=outage_limit_s)


def _named_by(stored: StoredResult) -> str:
    """Text that holds the keys of the masks of a done row: another attempt's, or this one's."""
    return f"{stored.mask_url} {stored.metadata}"


def _log_ids(attempt: Attempt) -> dict[str, str]:
    """Fields of an event, where logs are JSON."""
    return {"request_id": attempt.request_id, "task_id": attempt.task.task_id}
