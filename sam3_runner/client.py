"""The API worker's side of the runner: images in, results out, through BentoML's proxy."""

from __future__ import annotations

import asyncio
import pickle
import time
from typing import TYPE_CHECKING, Any

import aiohttp
from bentoml.exceptions import BentoMLException

from sam3_runner.engine import EngineStatus, SegmentOutcome, SegmentRequest
from sam3_runner.errors import DeadlineExceeded, InferenceFailed, SAM3Error

if TYPE_CHECKING:
    from sam3_runner.images import SquareImage
    from sam3_runner.instances import PredictResult

TRIES = 3
PAUSE_S = 0.03
STATUS_AGE_S = 1.0
STATUS_TIMEOUT_S = 3.0
TRUST_S = 30.0
"""A loaded runner that is too busy to answer is believed to be well for so long."""


class RunnerClient:
    """Calls `Sam3Runner` from an API worker.

    Args:
        proxy: what `bentoml.depends` gives.
    """

    def __init__(self, proxy: Any) -> None:
        _use_fresh_connections(proxy)
        self._proxy = proxy
        self._status = EngineStatus(state="loading")
        self._status_until_s = 0.0
        self._trusted_until_s = 0.0
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
        [packed] = await self._call("segment", [pickle.dumps(request)])
        outcome: SegmentOutcome = pickle.loads(packed)  # noqa: S301 - from our own process
        if outcome.error is not None:
            raise outcome.error
        assert outcome.results is not None
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
            self._trusted_until_s = time.monotonic() + TRUST_S
        except (SAM3Error, TimeoutError) as error:
            busy = isinstance(error, TimeoutError | DeadlineExceeded) and self._status.state == "ok"
            if not busy or time.monotonic() > self._trusted_until_s:
                self._status = EngineStatus(state="error", detail="the model's process does not answer")
        finally:
            self._asking = None
        # "loading" is not remembered: whoever saw /readyz turn good is served at once.
        if self._status.state != "loading":
            self._status_until_s = time.monotonic() + STATUS_AGE_S

    async def _call(self, method: str, *arguments: object) -> Any:
        """Call the proxy; the moment in which the runner is started anew is waited out."""
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


def _use_fresh_connections(proxy: Any) -> None:
    """Make BentoML's client open a connection a call (private names of the pinned bentoml 1.4.39).

    Its pool keeps idle connections for 15 s, the runner's server closes them after 5: calls that meet a
    closing one fail, several in a row when the worker was busy. On a unix socket a new one is cheap.
    """
    sessions = proxy.to_async._session_manager  # noqa: SLF001
    make_pooling = sessions._make_client  # noqa: SLF001

    def make_fresh() -> aiohttp.ClientSession:
        session: aiohttp.ClientSession = make_pooling()
        assert session.connector is not None
        session.connector._force_close = True  # noqa: SLF001
        return session

    sessions._make_client = make_fresh  # noqa: SLF001
