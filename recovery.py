"""Background work of an API worker, so that every task that was begun ends.

Twice a second it reads the file of attempts: it releases the attempts of dead processes, settles rows that
could not be settled, renews the leases of tasks that wait, begins these again, and deletes masks that no row
names. Once a minute it ends rows that a lost machine left `processing`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING

from contract import Failure
from observability.log_lines import log_ids
from observability.tracing import root_span
from results import ResultsUnavailable
from storage import StorageUnavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from pipeline import Pipeline
    from results import Attempt, Outbox
    from sam3_runner.base import Runner
    from storage import ObjectStore

logger = logging.getLogger(__name__)

POLL_S = 0.5
POLL_AFTER_ERROR_S = 5.0
STALE_POLL_S = 60.0
"""How often it looks for rows that a lost machine left."""
MASKS_AT_ONCE = 20
TASKS_AT_ONCE = 4
"""Kept tasks that a worker works on at once, beside those of its callers."""


class Recovery:
    """Finishes tasks that were interrupted; one in each API worker.

    Args:
        outbox: the file of attempts, and the rows.
        objects: for the deletion of unneeded masks.
        runner: no task is begun while the model is away.
        pipeline: runs the tasks.
    """

    def __init__(self, outbox: Outbox, objects: ObjectStore, runner: Runner, pipeline: Pipeline) -> None:
        self._outbox = outbox
        self._objects = objects
        self._runner = runner
        self._pipeline = pipeline
        self._at_work: set[asyncio.Task[None]] = set()
        self._loops: list[asyncio.Task[None]] = []
        self._next_stale_s = time.monotonic() + STALE_POLL_S
        self._task_ended = asyncio.Event()

    def start(self) -> None:
        """Begin; call it in the event loop that serves."""
        steps = (
            self._outbox.requeue_abandoned,
            self._outbox.deliver_due,
            self._renew_leases,
            self._retry_waiting,
            self._end_stale,
            self._delete_unneeded_masks,
        )
        # A task each: a step that fails or is slow must not delay the others.
        self._loops = [asyncio.create_task(self._repeat(step)) for step in steps]

    def stop(self) -> None:
        """Begin nothing more. A step in progress is repeated by the drain, or after the next start."""
        for loop in self._loops:
            loop.cancel()

    async def _repeat(self, step: Callable[[], Awaitable[None]]) -> None:
        while True:
            pause_s = POLL_S if await self._try(step) else POLL_AFTER_ERROR_S
            if step == self._retry_waiting:
                # A waiting task can begin when one has ended.
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._task_ended.wait(), pause_s)
                self._task_ended.clear()
            else:
                await asyncio.sleep(pause_s)

    async def _try(self, step: Callable[[], Awaitable[None]]) -> bool:
        try:
            await step()
        except (ResultsUnavailable, StorageUnavailable) as error:
            logger.warning("interrupted tasks have to wait: %s", error)
            return False
        except Exception:
            # After any error the next step may succeed; without this loop tasks would be lost.
            logger.exception("interrupted tasks could not be finished")
            return False
        return True

    async def _renew_leases(self) -> None:
        status = await self._runner.status()
        await self._outbox.renew_leases(model_is_ready=status.state == "ok")

    async def _retry_waiting(self) -> None:
        if (await self._runner.status()).state != "ok":
            return
        while len(self._at_work) < TASKS_AT_ONCE:
            attempt = await self._outbox.acquire_waiting()
            if attempt is None:
                return
            beginning = asyncio.create_task(self._run(attempt))
            self._at_work.add(beginning)
            beginning.add_done_callback(self._at_work.discard)

    async def _run(self, attempt: Attempt) -> None:
        task_id, request_id = attempt.task.task_id, attempt.request_id
        with (
            log_ids(request_id=request_id, task_id=task_id),
            root_span("retry", {}, **{"sam3.request_id": request_id}),
        ):
            logger.info("task %s is retried (request %s)", task_id, request_id)
            try:
                await self._pipeline.run_again(attempt)
            except Failure as failure:
                logger.warning("the retry of task %s met %s (request %s)", task_id, failure.code, request_id)
        self._task_ended.set()

    async def _end_stale(self) -> None:
        if time.monotonic() >= self._next_stale_s:
            self._next_stale_s = time.monotonic() + STALE_POLL_S
            await self._outbox.end_stale()

    async def _delete_unneeded_masks(self) -> None:
        for _ in range(MASKS_AT_ONCE):
            key = await self._outbox.acquire_unneeded_mask()
            if key is None:
                return
            await self._objects.delete_mask(key)
            await self._outbox.remove_unneeded_mask(key)
