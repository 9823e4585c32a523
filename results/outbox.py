"""The outbox: stores an attempt before its claim, and an outcome before its delivery, so that none is lost.

    claim ----> active ----> outcome stored ----> row settled ----> attempt removed
                 |  ^               '-- rows unavailable: delivered later, by any process of this server
                 |  '-- acquired again, under the same attempt id, when it is due
                 '-- waits: a process died, or the object store or the model is unavailable

Every step may be repeated: the conditional writes of the rows (results/base.py) make a repeat harmless.
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

    from results.attempts import Lease
    from results.base import ResultStore, Task
    from results.given_up import GivenUp

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

DELIVERY_HOLD_S: Final = 60.0
"""The process that did the work settles the row itself, in less time; after it any process may."""
RENEWALS_PER_LEASE: Final = 3
BATCH_SIZE: Final = 20
"""Outcomes or leases handled per call, so that the caller returns to its other work."""
MAX_FAILURES: Final = 2
"""One outcome that is always refused must not delay the others; unavailable rows must end the batch."""
WORK_POLL_S: Final = 0.05
MASK_RETRY_S: Final = 60.0
# Most hosts kill a process ten seconds after they ask it to stop.
LONG_WORK_GRACE_S: Final = 4.0
NO_MASKS: Final = ""
"""The masks that a row refers to when it does not hold this attempt's result."""

# "mostrecent": the processes share the file, and so the number.
DEPTH = Gauge(
    "sam3_outbox_depth", "Outcomes not yet delivered to the database", multiprocess_mode="mostrecent"
)
WAITING = Gauge("sam3_tasks_waiting", "Tasks that wait for a retry", multiprocess_mode="mostrecent")
GIVEN_UP = Gauge(
    "sam3_tasks_given_up", "Tasks refused after repeated process deaths", multiprocess_mode="mostrecent"
)


class Outbox:
    """The rows of a ResultStore, behind a file that outlives the process.

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
        # By attempt id: the write that the file did not accept, for instance because its disk was full.
        self._pending_writes: dict[str, Callable[[], Awaitable[object]]] = {}
        # By attempt id: the number of its runs. A retry may start before the previous run is released.
        self._active_runs: Counter[str] = Counter()
        self._blocked: set[str] = set()
        self._other_work: set[str] = set()
        # `requeue_abandoned` must not see an acquired attempt that is not in `_active_runs` yet.
        self._acquire_lock = asyncio.Lock()
        self._is_stopping, self._long_work_deadline_s = False, math.inf

    async def record(self, task: Task, request_id: str) -> Attempt:
        """Store a task's attempt in the file, before its claim; acquire the one that waits there already.

        Raises TaskInProgress when a process of this server works on the task, and ResultsUnavailable.
        """
        async with self._acquire_lock:
            attempt = await self._attempts.add(Attempt(task, str(uuid4()), request_id=request_id))
            self._active_runs[attempt.attempt_id] += 1
        return attempt

    def release(self, attempt: Attempt) -> None:
        """End this process's run of the attempt; the background does whatever remains to be done."""
        self._active_runs[attempt.attempt_id] -= 1
        self._active_runs += Counter()  # drops the ids without a run
        self._blocked.discard(attempt.attempt_id)

    def has_blocked_attempts(self) -> bool:
        """Whether an attempt of this process waits in `begin_work`."""
        return bool(self._blocked)

    async def claim(self, attempt: Attempt) -> StoredResult | None:
        """Claim the row for a recorded attempt; returns the result of a task that is done already.

        Raises ResultsUnavailable when the rows are unavailable: the task is kept, and retried later. Raises
        the other errors of ResultStore.claim, and then the attempt is removed.
        """
        try:
            claim = await self._rows.claim(attempt.task, attempt.attempt_id)
        except ResultsUnavailable as error:
            requeue = partial(self._attempts.requeue, attempt.attempt_id, None, with_backoff=True)
            await self._write(attempt, requeue)
            raise ResultsUnavailable(f"{error}; the task is kept, and done when they are back") from error
        except ResultsError:
            await self._remove(attempt, NO_MASKS)
            raise
        if not isinstance(claim, StoredResult):
            return None
        await self._remove(attempt, _referenced_by(claim))
        return claim

    async def begin_work(self, attempt: Attempt, image_sha256: str | None, *, is_long: bool = False) -> bool:
        """Wait until the attempt may work, then record that the work that may kill a process begins.

        A task during whose work a process has died works exclusively. False: the work may not begin any
        more, since this process stops; work that `is_long` may begin for `LONG_WORK_GRACE_S` from then on.
        """
        # When the file fails, the work goes on without the record.
        with contextlib.suppress(ResultsUnavailable):
            while not self._is_stopping:
                if await self._attempts.begin_work(attempt, image_sha256):
                    self._blocked.discard(attempt.attempt_id)
                    return True
                self._blocked.add(attempt.attempt_id)
                await asyncio.sleep(WORK_POLL_S)
            # Not recorded: if this process is killed from now on, the death does not count.
            return not attempt.suspect and (not is_long or time.monotonic() < self._long_work_deadline_s)
        return True

    async def begin_other_work(self, work_id: str) -> None:
        """Wait until work that is no attempt's and may kill a process may begin; `end_other_work` follows.

        It never runs beside a suspect's: a death is counted against the task whose work it was.
        """
        self._other_work.add(work_id)
        # As in `begin_work`.
        with contextlib.suppress(ResultsUnavailable):
            while True:
                if await self._attempts.begin_other_work(work_id):
                    return
                await asyncio.sleep(WORK_POLL_S)

    async def end_other_work(self, work_id: str) -> None:
        """Record that this work is over, whether it has begun or not."""
        if work_id in self._other_work:
            self._other_work.remove(work_id)
            # What the file does not accept is repeated by `requeue_abandoned`.
            with contextlib.suppress(ResultsUnavailable):
                await self._attempts.end_other_work(self._other_work)

    async def begin_storing(self, attempt: Attempt, mask_keys: list[str]) -> None:
        """Record that this work is over, and which masks are stored next."""
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
        """End the attempt as done. When the rows are unavailable, the row is settled later: no error.

        Raises AttemptLost, TaskNotFound when the row is gone, and MetadataInvalid when the values are not
        JSON.
        """
        await self._end(
            attempt,
            Outcome("done", mask_url=mask_url, labels=labels, metadata=metadata, mask_keys=mask_keys),
        )

    async def end_as_error(self, attempt: Attempt, error_message: str) -> None:
        """End the attempt without a result. Raises AttemptLost, TaskNotFound."""
        await self._end(attempt, Outcome("error", error_message=error_message))

    async def requeue(self, attempt: Attempt, reason: str, *, with_backoff: bool) -> bool:
        """Let a claimed attempt wait for a service that is unavailable; False: it has waited too long.

        Args:
            attempt: has no owner once it waits.
            reason: what is unavailable, in words for the user.
            with_backoff: it is due after a growing backoff, not at once.
        """
        requeue = partial(
            self._attempts.requeue,
            attempt.attempt_id,
            reason,
            limit_s=self._outage_limit_s,
            with_backoff=with_backoff,
        )
        return await self._write(attempt, requeue) is not False

    async def requeue_after_death(self, attempt: Attempt) -> bool:
        """Let an attempt wait whose model process died; its retry is exclusive. False: it is given up."""
        requeue = partial(self._attempts.requeue_after_death, attempt.attempt_id)
        return await self._write(attempt, requeue) is not False

    async def find_given_up(self, task: Task) -> GivenUp | None:
        """The entry of a task that was given up and is not attempted again; None otherwise."""
        return await self._attempts.given_up.find(task)

    async def refuse(self, task: Task, error_message: str) -> None:
        """End a row that is pending as error, without a claim; others stay. Raises ResultsUnavailable."""
        await self._rows.refuse(task, error_message)

    async def remove_given_up(self, task_id: str) -> None:
        """Allow a task that was given up to be attempted again."""
        await self._attempts.given_up.remove(task_id)

    async def reset_after_restart(self) -> tuple[int, int]:
        """Call once at the server's start: whatever a previous server left is due now.

        Returns the number of undelivered outcomes, and of waiting tasks.
        """
        await self._attempts.reset_after_restart()
        return await self._attempts.count_undelivered(), await self._attempts.count_waiting()

    async def requeue_abandoned(self) -> None:
        """Let the attempts wait that no process works on any more."""
        await self._attempts.end_other_work(self._other_work)
        async with self._acquire_lock:
            requeued = await self._attempts.requeue_abandoned({*self._active_runs, *self._pending_writes})
        if requeued:
            logger.warning("tasks were abandoned by a dead process, or after an error; they are retried")

    async def deliver_due(self) -> None:
        """Settle the rows whose outcome is due; a failed one is due again after a backoff."""
        await self._flush_pending_writes()
        failures = 0
        for _ in range(BATCH_SIZE):
            attempt = await self._attempts.acquire_undelivered(DELIVERY_HOLD_S)
            if attempt is None:
                break
            failures += not await self._deliver(attempt)
            if failures == MAX_FAILURES:
                break
        DEPTH.set(await self._attempts.count_undelivered())
        WAITING.set(await self._attempts.count_waiting())
        GIVEN_UP.set(await self._attempts.given_up.count())

    async def renew_leases(self, *, model_is_ready: bool) -> None:
        """Renew the leases of claimed tasks that wait; end those that have waited too long.

        Args:
            model_is_ready: a task that only waits for its exclusive work is not limited then.
        """
        leases = []
        for _ in range(BATCH_SIZE):
            lease = await self._attempts.acquire_due_lease(
                self._lease_s / RENEWALS_PER_LEASE, self._outage_limit_s
            )
            if lease is None:
                break
            leases.append(lease)
        await asyncio.gather(*(self._renew(lease, model_is_ready=model_is_ready) for lease in leases))

    async def _renew(self, lease: Lease, *, model_is_ready: bool) -> None:
        attempt = lease.attempt
        if lease.is_over_limit:
            await self._end_over_limit(lease)
            return
        try:
            claim = await self._rows.claim(attempt.task, attempt.attempt_id)
        except ResultsUnavailable as error:
            logger.warning(
                "the lease of task %s could not be renewed: %s",
                *(attempt.task.task_id, error),
                extra=_log_ids(attempt),
            )
        except ResultsError as error:
            logger.warning("a waiting task is removed: %s", error, extra=_log_ids(attempt))
            await self._remove(attempt, NO_MASKS)
        else:
            if isinstance(claim, StoredResult):
                await self._remove(attempt, _referenced_by(claim))
            else:
                await self._attempts.start_wait_limit(attempt.attempt_id, model_is_ready=model_is_ready)

    async def _end_over_limit(self, lease: Lease) -> None:
        minutes = self._outage_limit_s / 60
        message = f"{lease.reason}; given up after waiting {minutes:.0f} minutes"
        outcome = Outcome("error", error_message=message)
        if await self._attempts.end_waiting(lease.attempt.attempt_id, outcome):
            logger.warning(
                "task %s is given up after %.0f minutes",
                *(lease.attempt.task.task_id, minutes),
                extra=_log_ids(lease.attempt),
            )

    async def acquire_waiting(self) -> Attempt | None:
        """The next waiting attempt that is due, now owned by this process; None when none is due."""
        async with self._acquire_lock:
            attempt = await self._attempts.acquire_waiting()
            if attempt is not None:
                self._active_runs[attempt.attempt_id] += 1
        return attempt

    async def end_stale(self) -> None:
        """End the tasks of lost servers as error: no server would end them, and their users wait."""
        ended = await self._rows.end_stale(self._lease_s)
        if ended:
            logger.warning("%d tasks of a lost server were not finished; ended as error", ended)

    async def acquire_unneeded_mask(self) -> str | None:
        """The key of a stored mask that no row refers to, to be deleted; None when there is none."""
        return await self._attempts.unneeded_masks.acquire_due(MASK_RETRY_S)

    async def remove_unneeded_mask(self, key: str) -> None:
        """Remove the key of a mask that has been deleted."""
        await self._attempts.unneeded_masks.remove(key)

    async def prepare_stop(self) -> None:
        """This process was asked to stop: its death no longer counts against its tasks."""
        if not self._is_stopping:
            self._is_stopping, self._long_work_deadline_s = True, time.monotonic() + LONG_WORK_GRACE_S
        with contextlib.suppress(ResultsUnavailable):
            await self._attempts.stop_counting_deaths()

    async def drain(self, timeout_s: float) -> None:
        """Settle all rows that can be settled within `timeout_s`, due or not; the rest stays in the file."""
        # A file that fails must not prevent the stop.
        with contextlib.suppress(TimeoutError, ResultsUnavailable):
            async with asyncio.timeout(timeout_s):
                left, before = await self._attempts.make_undelivered_due(), 0
                while left and left != before:
                    await self.deliver_due()
                    left, before = await self._attempts.count_undelivered(), left
        with contextlib.suppress(ResultsUnavailable):
            if left := await self._attempts.count_undelivered():
                logger.warning("%d outcomes stay in the file until the next start", left)

    async def close(self) -> None:
        """Close the file and the rows."""
        await self._attempts.close()
        await self._rows.close()

    async def _end(self, attempt: Attempt, outcome: Outcome) -> None:
        outcome.to_json()  # raises MetadataInvalid before anything is written
        store = partial(self._attempts.set_outcome, attempt.attempt_id, outcome)
        await self._write(attempt, partial(store, hold_s=DELIVERY_HOLD_S), later=partial(store, hold_s=0))
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
        """Settle the row of a stored outcome; False: it must be retried."""
        assert attempt.outcome is not None
        try:
            await self._settle(attempt, attempt.outcome)
        except ResultsUnavailable:
            await self._attempts.postpone_delivery(attempt.attempt_id)
            return False
        except (AttemptLost, TaskNotFound) as error:
            logger.warning("a stored outcome is discarded: %s", error, extra=_log_ids(attempt))
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
        """Settle the row, then remove the attempt. Raises the errors of the rows."""
        referenced: str | None = " ".join(outcome.mask_keys or ())
        try:
            await self._update_row(attempt, outcome)
        except AlreadySettled:
            # By this same attempt, and its user has changed the row since: it may refer to any of the masks.
            referenced = None
        except (AttemptLost, TaskNotFound):
            await self._remove(attempt, NO_MASKS)
            raise
        await self._remove(attempt, referenced)

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

    async def _remove(self, attempt: Attempt, referenced: str | None) -> None:
        """Remove an attempt; see AttemptFile.remove."""
        await self._write(attempt, partial(self._attempts.remove, attempt.attempt_id, referenced))

    async def _write(
        self,
        attempt: Attempt,
        write: Callable[[], Awaitable[_T]],
        *,
        later: Callable[[], Awaitable[object]] | None = None,
    ) -> _T | None:
        """The result of the write; None when the file fails: then it, or `later`, is done by `deliver_due`.

        Until then the file says that this process owns the attempt: if it dies, the task is retried.
        """
        try:
            written = await write()
        except ResultsUnavailable:
            self._pending_writes[attempt.attempt_id] = later or write
            return None
        self._pending_writes.pop(attempt.attempt_id, None)
        return written

    async def _flush_pending_writes(self) -> None:
        """Repeat the writes that failed while the file could not be written."""
        for attempt_id, write in list(self._pending_writes.items()):
            await write()
            if self._pending_writes.get(attempt_id) is write:
                del self._pending_writes[attempt_id]


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


def _referenced_by(stored: StoredResult) -> str:
    """Text with the keys of the masks of a done row, whichever attempt has settled it."""
    return f"{stored.mask_url} {stored.metadata}"


def _log_ids(attempt: Attempt) -> dict[str, str]:
    """Fields of an event, where logs are JSON."""
    return {"request_id": attempt.request_id, "task_id": attempt.task.task_id}
