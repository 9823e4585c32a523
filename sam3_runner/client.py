"""The API worker's side of the runner: images in, results out, through BentoML's proxy."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import aiohttp
from bentoml.exceptions import BentoMLException

from sam3_runner.engine import EngineStatus, SegmentRequest
from sam3_runner.errors import DeadlineExceeded, InferenceFailed, SAM3Error

if TYPE_CHECKING:
    from sam3_runner.images import SquareImage
    from sam3_runner.instances import PredictResult

TRIES = 3
PAUSE_S = 0.03
STATUS_AGE_S = 1.0
STATUS_TIMEOUT_S = 3.0


class RunnerClient:
    """Calls `Sam3Runner` from an API worker.

    Args:
        proxy: what `bentoml.depends` gives.
    """

    def __init__(self, proxy: Any) -> None:
        self._proxy = proxy
        self._status = EngineStatus(state="loading")
        self._status_until_s = 0.0
        self._asking: asyncio.Task[None] | None = None

    async def segment(
        self, image: SquareImage, prompts: list[str], deadline_s: float
    ) -> tuple[list[PredictResult], float]:
        """One result a prompt, and the time in ms of the model's pass that they shared.

        Raises:
            ModelNotLoaded, PromptTooLong, InferenceFailed: as the runner says; InferenceFailed also
                when it cannot be reached.
            DeadlineExceeded: `deadline_s` (of `time.monotonic`) passed before the work began.
        """
        request = SegmentRequest(image=image, prompts=prompts, deadline_s=deadline_s)
        [outcome] = await self._call("segment", [request])
        if outcome.error is not None:
            raise outcome.error
        return outcome.results, outcome.inference_ms

    async def status(self) -> EngineStatus:
        """The runner's state, at most a second old; `error` when its process does not answer."""
        if time.monotonic() >= self._status_until_s:
            # One question for all who wait: in a burst, one each would drown the runner.
            if self._asking is None:
                self._asking = asyncio.create_task(self._ask())
            await asyncio.shield(self._asking)
        return self._status

    async def _ask(self) -> None:
        try:
            async with asyncio.timeout(STATUS_TIMEOUT_S):
                self._status = await self._call("status")
        except (SAM3Error, TimeoutError):
            self._status = EngineStatus(state="error", error="the model's process does not answer")
        finally:
            self._asking = None
        # "loading" is not remembered: whoever saw /readyz turn good is served at once.
        if self._status.state != "loading":
            self._status_until_s = time.monotonic() + STATUS_AGE_S

    async def _call(self, method: str, *arguments: object) -> Any:
        """Call the proxy; a keep-alive connection that closed under the call is tried again."""
        for rest in reversed(range(TRIES)):
            try:
                return await getattr(self._proxy.to_async, method)(*arguments)
            except aiohttp.ClientConnectionError as error:
                if not rest:
                    raise InferenceFailed("the model's process cannot be reached") from error
                await asyncio.sleep(PAUSE_S)
            except TimeoutError as error:
                raise DeadlineExceeded("the model's process took too long") from error
            except (aiohttp.ClientError, BentoMLException) as error:
                raise InferenceFailed("the model's process failed") from error
        raise AssertionError("unreachable")
