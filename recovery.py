"""What goes on in the background of an API worker, so that every task that was begun ends.

Looks twice a second at the file of attempts, and lets go of what a dead process held, settles rows that
could not be settled, renews the leases of tasks that wait, begins these again, and deletes masks that nobody
was told of. Once a minute it ends rows that a lost machine left `processing`.
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
    from sam3_runner.client import RunnerClient
    from storage import ObjectStore

logger = logging.getLogger(__name__)

POLL_S = 0.5
POLL_AFTER_ERROR_S = 5.0
STALE_POLL_S = 60.0
"""How often it looks for what another machine left behind that may never come back."""
MASKS_AT_ONCE = 20
TASKS_AT_ONCE = 4
"""Kept tasks that a worker has in work at once, beside those of its callers."""


class Recovery:
    """Finishes what was left behind; one in each API worker.

    Args:
        outbox: the file of attempts, and the rows.
        objects: where unneeded masks are deleted.
        runner: nothing is begun while the model is away.
        pipeline: does the tasks.
    """

    def __init__(
        self, outbox: Outbox, objects: ObjectStore, runner: RunnerClient, pipeline: Pipeline
    ) -> None:
        self._outbox = outbox
        self._objects = objects
        self._runner = runner
        self._pipeline = pipeline
        self._at_work: set[asyncio.Task[None]] = set()
        self._looking: list[asyncio.Task[None]] = []
        self._next_stale_s = time.monotonic() + STALE_POLL_S
        self._one_is_done = asyncio.Event()

    def start(self) -> None:
        """Begin; needs the event loop that serves."""
        steps = (
            self._outbox.release_dead,
            self._outbox.deliver_due,
            self._renew_leases,
            self._begin_again,
            self._end_stale,
            self._delete_unneeded_masks,
        )
        # Each apart: what one cannot do now, or only slowly, must not hold up the others.
        self._looking = [asyncio.create_task(self._repeat(step)) for step in steps]

    def stop(self) -> None:
        """Begin nothing more. What was in the middle is done again at the drain, or after the next start."""
        for look in self._looking:
            look.cancel()

    async def _repeat(self, step: Callable[[], Awaitable[None]]) -> None:
        while True:
            pause_s = POLL_S if await self._try(step) else POLL_AFTER_ERROR_S
            if step == self._begin_again:
                # The next one's turn comes with the end of the one before.
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._one_is_done.wait(), pause_s)
                self._one_is_done.clear()
            else:
                await asyncio.sleep(pause_s)

    async def _try(self, step: Callable[[], Awaitable[None]]) -> bool:
        try:
            await step()
        except (ResultsUnavailable, StorageUnavailable) as error:
            logger.warning("what was left behind has to wait: %s", error)
            return False
        except Exception:
            # Whatever it was, the next look may do better; without this loop tasks would be lost.
            logger.exception("what was left behind could not be finished")
            return False
        return True

    async def _renew_leases(self) -> None:
        status = await self._runner.status()
        await self._outbox.renew_leases(model_is_there=status.state == "ok")

    async def _begin_again(self) -> None:
        if (await self._runner.status()).state != "ok":
            return
        while len(self._at_work) < TASKS_AT_ONCE:
            attempt = await self._outbox.take_waiting()
            if attempt is None:
                return
            beginning = asyncio.create_task(self._run(attempt))
            self._at_work.add(beginning)
            beginning.add_done_callback(self._at_work.discard)

    async def _run(self, attempt: Attempt) -> None:
        task_id, request_id = attempt.task.task_id, attempt.request_id
        with (
            log_ids(request_id=request_id, task_id=task_id),
            root_span("begin again", {}, **{"sam3.request_id": request_id}),
        ):
            logger.info("task %s is begun again (request %s)", task_id, request_id)
            try:
                await self._pipeline.run_again(attempt)
            except Failure as failure:
                logger.warning("task %s, begun again, met %s (request %s)", task_id, failure.code, request_id)
        self._one_is_done.set()

    async def _end_stale(self) -> None:
        if time.monotonic() >= self._next_stale_s:
            self._next_stale_s = time.monotonic() + STALE_POLL_S
            await self._outbox.end_stale()

    async def _delete_unneeded_masks(self) -> None:
        for _ in range(MASKS_AT_ONCE):
            key = await self._outbox.unneeded_mask()
            if key is None:
                return
            await self._objects.delete_mask(key)
            await self._outbox.mask_deleted(key)
