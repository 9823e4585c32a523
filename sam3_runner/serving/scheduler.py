"""Requests in, batches to the engine: the order of the model's work.

A request is staged as soon as it comes, beside the pass that runs, so that a pass begins without waiting for
pixels. A request that comes while nothing runs is run at once.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from sam3_runner.errors import InferenceFailed
from sam3_runner.serving.engine import SegmentOutcome

if TYPE_CHECKING:
    from sam3_runner.serving.engine import Engine, SegmentRequest

logger = logging.getLogger(__name__)

MAX_PAIRS = 16
"""Prompts of one pass, unless a single request has more: so many are decoded together, and a request that
comes later waits for no more."""
MAX_SLACK_S = 1.0
"""Deadlines that are further off count as this. API workers send requests in the order of their users' turns,
and a user's earlier requests must not pass, one after another, the only one of somebody else."""
SWITCH_INTERVAL_S = 0.0005
"""How long a thread may keep the others from running Python. By default it is 5 ms: so long the thread of the
model would wait, again and again, for the one that receives requests."""
STAGING_THREADS = 4
"""Reading the pixels of a picture takes a millisecond, a fourteenth of its pass."""


@dataclass(order=True, slots=True)
class _Waiting:
    """A request and its outcome to be; that of the lowest `order_s` is next, of equal ones the first."""

    order_s: float
    number: int
    request: SegmentRequest = field(compare=False)
    outcome: Future[SegmentOutcome] = field(compare=False)


class Scheduler:
    """Runs requests in batches, earliest deadline first, in threads of its own.

    Args:
        engine: runs the batches.
        max_batch: most images of one batch.
        max_slack_s: see `MAX_SLACK_S`.
        max_pairs: most prompts of one batch, unless a single request has more.
        streams: batches at once; more than one on a CPU only, see `SAM3Predictor`.
    """

    def __init__(
        self,
        engine: Engine,
        max_batch: int,
        max_slack_s: float = MAX_SLACK_S,
        *,
        max_pairs: int = MAX_PAIRS,
        streams: int = 1,
    ) -> None:
        self._engine = engine
        self._max_batch = max_batch
        self._max_slack_s = max_slack_s
        self._max_pairs = max_pairs
        self._numbers = itertools.count()
        self._staged: list[_Waiting] = []
        self._changed = threading.Condition()
        self._stagers = ThreadPoolExecutor(STAGING_THREADS, thread_name_prefix="stage")
        for _ in range(streams):
            threading.Thread(target=self._run, name="model", daemon=True).start()

    def submit(self, request: SegmentRequest) -> Future[SegmentOutcome]:
        """Queue a request. The future never raises."""
        order_s = min(request.deadline_s, request.sent_s + self._max_slack_s)
        waiting = _Waiting(order_s, next(self._numbers), request, Future())
        # From now on it cannot be cancelled: to set its outcome would end the model's thread.
        waiting.outcome.set_running_or_notify_cancel()
        self._stagers.submit(self._stage, waiting)
        return waiting.outcome

    def _stage(self, waiting: _Waiting) -> None:
        """Stage a request's image, and let the model's thread have it."""
        try:
            staged = self._engine.stage(waiting.request)
        except Exception:  # the request would wait for ever
            logger.exception("an image failed in the engine")
            staged = SegmentOutcome(error=InferenceFailed("the model's process failed"))
        if isinstance(staged, SegmentOutcome):
            waiting.outcome.set_result(staged)
            return
        with self._changed:
            heapq.heappush(self._staged, replace(waiting, request=staged))
            self._changed.notify()

    def _run(self) -> None:
        while True:
            batch = self._next_batch()
            try:
                outcomes = self._engine.segment([waiting.request for waiting in batch])
            except Exception:  # without this thread no later request would ever end
                logger.exception("a batch of %d failed in the engine", len(batch))
                outcomes = [SegmentOutcome(error=InferenceFailed("the model's process failed"))] * len(batch)
            for waiting, outcome in zip(batch, outcomes, strict=True):
                waiting.outcome.set_result(outcome)

    def _next_batch(self) -> list[_Waiting]:
        """Wait for a staged request. Returns the next batch: at least one request, whatever its prompts."""
        with self._changed:
            self._changed.wait_for(lambda: self._staged)
            batch = [heapq.heappop(self._staged)]
            pairs = len(batch[0].request.prompts)
            while self._staged and len(batch) < self._max_batch:
                pairs += len(self._staged[0].request.prompts)
                if pairs > self._max_pairs:
                    break
                batch.append(heapq.heappop(self._staged))
            return batch
