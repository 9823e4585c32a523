"""The API worker's runners, one a GPU: each request goes to the one with the least work."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sam3_runner.errors import FeaturesNotHeld, ModelNotLoaded

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sam3_runner.images.decoded import DecodedImage
    from sam3_runner.instances import Results
    from sam3_runner.prompts import ConceptPrompt
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

    def work_of(self, image: DecodedImage, prompts: Sequence[ConceptPrompt]) -> int:
        """Work of a request here, in prompts: none for an image whose features are held."""
        return len(prompts) + (0 if self.may_hold(image) else IMAGE_WORK)

    def may_hold(self, image: DecodedImage) -> bool:
        return image.key is not None and self.client.may_hold(image.key)

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

    A worker counts its own requests alone. Those of other workers spread over the runners by the same rule.

    Args:
        clients: one for each runner, in the order of their numbers.
    """

    def __init__(self, clients: Sequence[RunnerClient]) -> None:
        self._queues = [_Queue(client) for client in clients]
        self._turns = itertools.count(1)

    async def segment(
        self,
        image: DecodedImage,
        prompts: Sequence[ConceptPrompt],
        deadline_s: float,
        *,
        with_masks: bool = False,
        log_ids: dict[str, str] | None = None,
    ) -> tuple[Results, float]:
        """As `RunnerClient.segment`, by one of the runners.

        A request is sent to another runner only where the first one has certainly not begun it. A runner
        that dies fails the requests that it had, and no others.
        """
        untried = list(self._queues)
        while True:
            queue = _next_queue(untried, image, prompts)
            untried.remove(queue)
            if image.pixels is None and not queue.may_hold(image):
                raise FeaturesNotHeld("the runner with the features of this image is busy or gone")
            try:
                with queue.holding(queue.work_of(image, prompts), next(self._turns)):
                    return await queue.client.segment(
                        image, prompts, deadline_s, with_masks=with_masks, log_ids=log_ids
                    )
            except ModelNotLoaded:
                if not any(each.is_ready for each in untried):
                    raise

    @property
    def is_ready(self) -> bool:
        """Whether one of the runners is ready, by their last status."""
        return any(queue.is_ready for queue in self._queues)

    @property
    def max_stored_px(self) -> int:
        """As `EngineStatus.max_stored_px`, by the last status of each runner."""
        return max(queue.client.max_stored_px for queue in self._queues)

    def may_hold(self, key: str) -> bool:
        """Whether a runner that is ready has lately segmented the image with this key for this worker."""
        return any(queue.client.may_hold(key) for queue in self._queues if queue.is_ready)

    @property
    def known_status(self) -> EngineStatus:
        """The state of the model by the last answer of each runner."""
        return overall_status([queue.client.known_status for queue in self._queues])

    async def status(self) -> EngineStatus:
        """The state of the model: ready where at least one runner is."""
        return overall_status(await self.statuses())

    async def statuses(self) -> list[EngineStatus]:
        """The state of each runner, in their order; at most a second old where they answer."""
        calls = [asyncio.create_task(queue.client.status()) for queue in self._queues]
        answered, late = await asyncio.wait(calls, timeout=STATUS_PATIENCE_S)
        # One that does not answer must not delay what the others can do.
        if late and not self.is_ready:
            answered, _ = await asyncio.wait(calls)
        for call in answered:
            call.result()  # raises what it met
        return [queue.client.known_status for queue in self._queues]


def overall_status(statuses: Sequence[EngineStatus]) -> EngineStatus:
    """Of several runners: that of the first one that is ready, else loading, else failed."""
    return min(statuses, key=lambda status: ("ok", "loading", "error").index(status.state))


def _next_queue(queues: Sequence[_Queue], image: DecodedImage, prompts: Sequence[ConceptPrompt]) -> _Queue:
    """Where the next request goes: the ready runner that would have the least work with it.

    So an image goes to the runner that holds its features, unless that one is busier by more than an
    encoding. Of equal ones that of longest ago is next.
    """
    ready = [queue for queue in queues if queue.is_ready]
    return min(
        ready or queues, key=lambda queue: (queue.work + queue.work_of(image, prompts), queue.last_turn)
    )
