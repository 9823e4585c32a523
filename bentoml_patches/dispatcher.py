"""BentoML's batch dispatcher: bound how long it waits for more requests, and measure by a monotonic clock."""

from __future__ import annotations

import time
from types import SimpleNamespace

from bentoml._internal.marshal import dispatcher
from bentoml._internal.utils import alg

MAX_BATCH_WAIT_S = 0.005
"""Longest time that an idle runner waits for more requests: batches form while it is busy."""


class BoundedOptimizer(dispatcher.Optimizer):
    """BentoML's estimate of how long to wait for more requests, with an upper bound.

    Without the bound, lone requests wait over a second for minutes after 64 clients called at once.
    """

    wait: float  # type: ignore[assignment]

    def trigger_refresh(self) -> None:
        """Learn from the last batches, then bound the result."""
        super().trigger_refresh()  # type: ignore[no-untyped-call]
        self.wait = min(self.wait, MAX_BATCH_WAIT_S)


def patch() -> None:
    """Make BentoML's dispatchers use `BoundedOptimizer` and a monotonic clock.

    By the wall clock, requests that wait in the queue count as late, and fail, when it is set forward.
    """
    dispatcher.Optimizer = BoundedOptimizer  # type: ignore[misc]
    clock = SimpleNamespace(time=time.monotonic)
    dispatcher.time = alg.time = clock  # type: ignore[attr-defined, assignment]
