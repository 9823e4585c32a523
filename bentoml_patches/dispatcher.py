"""BentoML's batch dispatcher: no waiting for more requests, several batches at once, a monotonic clock.

The runner's own scheduler (sam3_runner/serving/scheduler.py) forms the batches that the model runs.
"""

from __future__ import annotations

import time
from types import SimpleNamespace

from bentoml._internal.marshal import dispatcher
from bentoml._internal.utils import alg


class NoWait(dispatcher.Optimizer):
    """BentoML's estimate of how long to wait for more requests: it learns nothing, and so stays 0."""

    def log_outbound(self, n: int, wait: float, duration: float) -> None:
        """Ignore the times of a batch."""


class NoLimit(dispatcher.NonBlockSema):
    """BentoML's limit of the batches that are in progress at once: none."""

    def acquire(self) -> bool:
        """Begin a batch."""
        return True

    def is_locked(self) -> bool:
        """Never."""
        return False


async def _skip_training(*_: object) -> None:
    """In BentoML's training the first dozen of requests wait for others."""


def patch() -> None:
    """Make BentoML's dispatchers hand on requests at once, and measure by a monotonic clock.

    By the wall clock, requests that wait in the queue count as late, and fail, when it is set forward.
    """
    dispatcher.Optimizer = NoWait  # type: ignore[misc]
    dispatcher.NonBlockSema = NoLimit  # type: ignore[misc]
    dispatcher.CorkDispatcher.train_optimizer = _skip_training  # type: ignore[method-assign, assignment]
    clock = SimpleNamespace(time=time.monotonic)
    dispatcher.time = alg.time = clock  # type: ignore[attr-defined, assignment]
