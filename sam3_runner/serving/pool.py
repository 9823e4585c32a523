"""The API worker's runners, one a GPU: each request goes to the one with the least outstanding work."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sam3_runner.errors import ModelNotLoaded

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sam3_runner.images.square import SquareImage
    from sam3_runner.instances import PredictResult
    from sam3_runner.serving.client import RunnerClient
    from sam3_runner.serving.engine import EngineStatus

IMAGE_WORK: Final = 9
"""Work of encoding an image, in prompts: on an H100 13.0 ms and 1.45 ms (README, Speed)."""
STATUS_PATIENCE_S: Final = 0.05
"""A runner that answers later than this is shown with its last status, where another one is ready."""


@dataclass(eq=False, slots=True)
class _Queue:
    """One runner.

    Attributes:
        work: what this worker waits for there, in prompts.
        last_turn: number of the last request that was sent there.
    """

    client: RunnerClient
    work: int = 0
    last_turn: int = 0

    @property
    def is_ready(self) -> bool:
        return self.client.known_status.state == "ok"

    @contextmanager
    def holding(self, work: int, turn: int) -> Iterator[None]:
        """Count `work` as outstanding until the end of the block."""
        self.work += work
        self.last_turn = turn
        try:
            yield
        finally:
            self.work -= work


class RunnerPool:
    """The runners of a server, seen from one API worker; a `sam3_runner.base.Runner`.

    A worker counts its own requests alone: those of the other workers spread over the runners by the same rule.

    Args:
        clients: one for each runner, in the order of their numbers.
    """

    def __init__(self, clients: Sequence[RunnerClient]) -> None:
        self._queues = [_Queue(client) for client in clients]
        self._turns = itertools.count(1)

    async def segment(
        self,
        image: SquareImage,
        prompts: list[str],
        deadline_s: float,
        *,
        log_ids: dict[str, str] | None = None,
    ) -> tuple[list[PredictResult], float]:
        """As `RunnerClient.segment`, by one of the runners.

        A request is sent to another runner only where the first one has certainly not begun it. A runner
        that dies fails the requests that it had, and no others.
        """
        untried = list(self._queues)
        while True:
            queue = _shortest(untried)
            untried.remove(queue)
            try:
                with queue.holding(IMAGE_WORK + len(prompts), next(self._turns)):
                    return await queue.client.segment(image, prompts, deadline_s, log_ids=log_ids)
            except ModelNotLoaded:
                if not any(each.is_ready for each in untried):
                    raise

    async def status(self) -> EngineStatus:
        """The state of the model: ready where at least one runner is."""
        return overall_status(await self.statuses())

    async def statuses(self) -> list[EngineStatus]:
        """The state of each runner, in their order; at most a second old where they answer."""
        calls = [asyncio.create_task(queue.client.status()) for queue in self._queues]
        answered, late = await asyncio.wait(calls, timeout=STATUS_PATIENCE_S)
        # One that does not answer must not delay what the others can do.
        if late and not any(queue.is_ready for queue in self._queues):
            answered, _ = await asyncio.wait(calls)
        for call in answered:
            call.result()  # raises what it met
        return [queue.client.known_status for queue in self._queues]


def overall_status(statuses: Sequence[EngineStatus]) -> EngineStatus:
    """Of several runners: that of the first one that is ready, else loading, else failed."""
    return min(statuses, key=lambda status: ("ok", "loading", "error").index(status.state))


def _shortest(queues: Sequence[_Queue]) -> _Queue:
    """Where the next request goes: the ready runner with the least work; of equals, that of longest ago."""
    ready = [queue for queue in queues if queue.is_ready]
    return min(ready or queues, key=lambda queue: (queue.work, queue.last_turn))
