"""No task is lost: an attempt is on disk before its claim, its outcome before the row is told.

    claim ----> begun ----> outcome kept ----> row told ----> forgotten
                  |              '-- rows away: told later, by whichever process is up
                  '-- process killed: begun again, under the same attempt id

The row's own guards (results/base.py) make every repeat harmless.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING, Final
from uuid import uuid4

from prometheus_client import Gauge

from results.attempts import Attempt, AttemptFile, Outcome
from results.base import Claim, StoredResult, Task
from results.errors import ResultsError, ResultsUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path

    from results.base import ResultStore, SettledStatus

logger = logging.getLogger("bentoml.sam3")

MAX_STARTS: Final = 5
"""A task that is there whenever the server dies is given up after so many starts."""
FIRST_TRY_S: Final = 60.0
"""The process that did the work tells the row itself, in less; after it any process may."""
STALE_LEASES: Final = 2
"""A row that is `processing` for so many leases has a server that is gone, or is cut off from it."""
ROUND: Final = 20
"""Outcomes told in one go, before the caller looks at its other work."""
MAX_MISSES: Final = 2
"""One outcome that is always refused must not hold up the others, but rows that are away must."""

# "mostrecent": the processes share the file, and so the number.
DEPTH = Gauge("sam3_outbox_depth", "Outcomes that wait for the database", multiprocess_mode="mostrecent")


class Outbox:
    """The rows of a ResultStore, told through a file that outlives the process.

    Args:
        path: the file, made when it is missing; shared by the processes of one server.
        rows: the rows.
        lease_s: an attempt without an outcome after it is begun again; no attempt takes as long.
        now: the clock, in s.

    Raises ResultsUnavailable when the file cannot be opened; its methods too, when it fails.
    """

    def __init__(
        self, path: Path, rows: ResultStore, *, lease_s: float, now: Callable[[], float] = time.time
    ) -> None:
        self._attempts = AttemptFile(path, now=now)
        self._rows = rows
        self._lease_s = lease_s

    async def claim(self, task: Task) -> Claim | StoredResult:
        """See ResultStore. When the rows are away the task is kept, and begun when they are back."""
        attempt = Attempt(task, str(uuid4()))
        await self._attempts.add(attempt, self._lease_s)
        return await self.claim_again(attempt)

    async def claim_again(self, attempt: Attempt) -> Claim | StoredResult:
        """Claim for an attempt that is on the file already. Raises what `claim` raises."""
        try:
            claim = await self._rows.claim(attempt.task, attempt.attempt_id)
        except ResultsUnavailable as error:
            await self._attempts.postpone(attempt.attempt_id, undo_start=True)
            raise ResultsUnavailable(f"{error}; the task is kept, and done when they are back") from error
        except ResultsError:
            await self._forget(attempt.attempt_id)
            raise
        if isinstance(claim, StoredResult):
            await self._forget(attempt.attempt_id)
        return claim

    async def update_result(
        self, task_id: str, mask_url: str, labels: list[str], metadata: dict[str, object], *, attempt_id: str
    ) -> None:
        """See ResultStore; rows that are away are told later, which is no error."""
        outcome = Outcome("done", mask_url=mask_url, labels=labels, metadata=metadata)
        await self._end(task_id, attempt_id, outcome)

    async def update_status(
        self, task_id: str, status: SettledStatus, *, attempt_id: str, error_message: str | None = None
    ) -> None:
        """See ResultStore; rows that are away are told later, which is no error."""
        await self._end(task_id, attempt_id, Outcome(status, error_message=error_message))

    async def release(self) -> tuple[int, int]:
        """Call once at the server's start: what is on the file was left by a dead server, and is due.

        Returns how many outcomes wait to be told, and how many attempts to be begun again.
        """
        return await self._attempts.make_due("untold"), await self._attempts.make_due("unfinished")

    async def deliver_due(self) -> None:
        """Tell the rows the outcomes that are due; what they do not take is due again after a pause."""
        misses = 0
        for _ in range(ROUND):
            attempt = await self._attempts.take("untold", FIRST_TRY_S)
            if attempt is None:
                break
            misses += not await self._deliver(attempt)
            if misses == MAX_MISSES:
                break
        DEPTH.set(await self._attempts.count("untold"))

    async def take_unfinished(self) -> Attempt | None:
        """An attempt to begin again, out of others' hands for a lease; None when none is due."""
        while (attempt := await self._attempts.take("unfinished", self._lease_s)) is not None:
            if attempt.starts <= MAX_STARTS:
                return attempt
            logger.error("task %s is given up after %d starts", attempt.task.task_id, MAX_STARTS)
            message = f"the server stopped {MAX_STARTS} times while it worked on this task"
            outcome = Outcome("error", error_message=message)
            await self._attempts.set_outcome(attempt.attempt_id, outcome, hold_s=0)
        return None

    async def end_stale(self) -> None:
        """End the tasks of servers that are gone: nobody else would, and their users wait."""
        ended = await self._rows.end_stale(STALE_LEASES * self._lease_s)
        if ended:
            logger.warning("%d tasks were left in the middle by a server that is gone; ended as error", ended)

    async def drain(self, timeout_s: float) -> None:
        """Tell the rows all that they take within `timeout_s`, due or not; the rest stays on disk."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                left, before = await self._attempts.make_due("untold"), 0
                while left and left != before:
                    await self.deliver_due()
                    left, before = await self._attempts.count("untold"), left
        if left := await self._attempts.count("untold"):
            logger.warning("%d outcomes stay on disk until the next start", left)

    async def close(self) -> None:
        """Let go of the file, and of the rows too."""
        await self._attempts.close()
        await self._rows.close()

    async def _end(self, task_id: str, attempt_id: str, outcome: Outcome) -> None:
        await self._harmless(self._attempts.set_outcome(attempt_id, outcome, FIRST_TRY_S))
        try:
            await self._tell(task_id, attempt_id, outcome)
        except ResultsUnavailable as error:
            logger.warning("task %s is %s; its row is told later: %s", task_id, outcome.status, error)
            await self._attempts.postpone(attempt_id)
        except ResultsError:
            await self._forget(attempt_id)
            raise
        else:
            await self._forget(attempt_id)

    async def _deliver(self, attempt: Attempt) -> bool:
        """Whether the row needs no more telling."""
        assert attempt.outcome is not None
        task_id = attempt.task.task_id
        try:
            await self._tell(task_id, attempt.attempt_id, attempt.outcome)
        except ResultsUnavailable:
            await self._attempts.postpone(attempt.attempt_id)
            return False
        except ResultsError as error:
            logger.warning("a kept outcome is dropped: %s", error)
        else:
            logger.info("task %s: its row has been told that it is %s", task_id, attempt.outcome.status)
        await self._forget(attempt.attempt_id)
        return True

    async def _tell(self, task_id: str, attempt_id: str, outcome: Outcome) -> None:
        if outcome.status == "done":
            assert outcome.mask_url is not None
            await self._rows.update_result(
                *(task_id, outcome.mask_url, outcome.labels or [], outcome.metadata or {}),
                attempt_id=attempt_id,
            )
        else:
            await self._rows.update_status(
                task_id, outcome.status, attempt_id=attempt_id, error_message=outcome.error_message
            )

    async def _forget(self, attempt_id: str) -> None:
        await self._harmless(self._attempts.remove(attempt_id))

    async def _harmless(self, write: Coroutine[None, None, None]) -> None:
        """A write to the file without which things go on: a copy too few, or a row that is told twice."""
        try:
            await write
        except ResultsUnavailable:
            logger.exception("the outbox could not be written")
