"""The API worker's side of the runner: images in, results out, through BentoML's proxy."""

from __future__ import annotations

import asyncio
import pickle
import time
from typing import TYPE_CHECKING, Any

import aiohttp
from bentoml.exceptions import BentoMLException

from sam3_runner.engine import EngineStatus, SegmentOutcome, SegmentRequest
from sam3_runner.errors import DeadlineExceeded, InferenceFailed, ModelNotLoaded, RunnerStopped, SAM3Error
from sam3_runner.metrics import MODEL_READY, trace_parent

if TYPE_CHECKING:
    from sam3_runner.images.square import SquareImage
    from sam3_runner.instances import PredictResult
    from sam3_runner.liveness import RunnerLife

STOPPED = "the model's process stopped while it worked"
TRIES = 3
PAUSE_S = 0.03
LOOK_S = 0.25
"""How often a call that waits looks whether the process that got it still lives."""
STATUS_AGE_S = 1.0
STATUS_TIMEOUT_S = 0.7
"""With it a probe is answered within a second, whatever the runner does."""
TRUST_S = 30.0
"""A runner that lives but is too busy to answer is believed to be as it was for so long."""


class RunnerClient:
    """Calls `Sam3Runner` from an API worker.

    Args:
        proxy: what `bentoml.depends` gives.
        life: of the runner's process.
    """

    def __init__(self, proxy: Any, life: RunnerLife) -> None:
        _use_fresh_connections(proxy)
        self._proxy = proxy
        self._life = life
        self._status = EngineStatus(state="loading")
        self._status_of: str | None = None
        self._status_until_s = 0.0
        self._trusted_until_s = 0.0
        self._asking: asyncio.Task[None] | None = None

    async def segment(
        self,
        image: SquareImage,
        prompts: list[str],
        deadline_s: float,
        *,
        log_ids: dict[str, str] | None = None,
    ) -> tuple[list[PredictResult], float]:
        """One result a prompt, and the time in ms of the model's pass that they shared.

        It is sent once: an image that kills the runner must not kill its successor. BentoML hands the trace
        on in a header, but a batch has many: ours crosses with the request, as `log_ids` do, the fields of
        what the runner logs of it.

        Raises:
            ModelNotLoaded, PromptTooLong, InferenceFailed: as the runner says; ModelNotLoaded also when
                there is no runner.
            RunnerStopped: the runner died while it had the request.
            DeadlineExceeded: `deadline_s` (of `time.monotonic`) passed before the work began.
        """
        identity = self._life.look()
        if identity is None:
            raise ModelNotLoaded(self._life.absence)
        request = SegmentRequest(
            image=image,
            prompts=prompts,
            deadline_s=deadline_s,
            log_ids=log_ids or {},
            trace_parent=trace_parent(),
        )
        [packed] = await self._while_alive(identity, "segment", [pickle.dumps(request)])
        outcome: SegmentOutcome = pickle.loads(packed)  # noqa: S301 - from our own process
        if outcome.error is not None:
            raise outcome.error
        assert outcome.results is not None
        return outcome.results, outcome.inference_ms

    async def status(self) -> EngineStatus:
        """The runner's state, at most a second old; `loading` while its process is started anew.

        `error` when it lives but does not answer.
        """
        status = await self._latest_status()
        MODEL_READY.set(status.state == "ok")
        return status

    async def _latest_status(self) -> EngineStatus:
        identity = self._life.look()
        if identity is not None and (identity != self._status_of or time.monotonic() >= self._status_until_s):
            # One question for all who wait: in a burst, one each would drown the runner.
            if self._asking is None:
                self._asking = asyncio.create_task(self._ask(identity))
            await asyncio.shield(self._asking)
            identity = self._life.look()
        if identity is None or identity != self._status_of:
            return EngineStatus(state="loading", detail=self._life.absence)
        return self._status

    async def _ask(self, identity: str) -> None:
        if identity != self._status_of:
            self._status = EngineStatus(state="loading", detail="the model's process is starting")
            self._status_of, self._status_until_s = identity, 0.0
            self._trusted_until_s = time.monotonic() + TRUST_S
        try:
            async with asyncio.timeout(STATUS_TIMEOUT_S):
                self._status = await self._while_alive(identity, "status")
            self._trusted_until_s = time.monotonic() + TRUST_S
        except (SAM3Error, TimeoutError) as error:
            busy = isinstance(error, TimeoutError | DeadlineExceeded)
            if not busy or time.monotonic() > self._trusted_until_s:
                self._status = EngineStatus(state="error", detail="the model's process does not answer")
        finally:
            self._asking = None
        # "loading" is not remembered: whoever saw /readyz turn good is served at once.
        if self._status.state != "loading":
            self._status_until_s = time.monotonic() + STATUS_AGE_S

    async def _while_alive(self, identity: str, method: str, *arguments: object) -> Any:
        """Call the proxy, and give up once the process that got the call has died."""
        call = asyncio.create_task(self._call(identity, method, *arguments))
        call.add_done_callback(_heard)
        try:
            while not (await asyncio.wait({call}, timeout=LOOK_S))[0]:
                if self._life.look() != identity:
                    raise RunnerStopped(STOPPED)
            return call.result()
        finally:
            call.cancel()

    async def _call(self, identity: str, method: str, *arguments: object) -> Any:
        """Call the proxy; again only where the call was certainly not sent."""
        for rest in reversed(range(TRIES)):
            try:
                return await getattr(self._proxy.to_async, method)(*arguments)
            except aiohttp.ClientConnectorError as error:
                if not rest:
                    raise ModelNotLoaded("the model's process cannot be reached") from error
                await asyncio.sleep(PAUSE_S)
            except TimeoutError as error:
                raise DeadlineExceeded("the model's process took too long") from error
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
                self._life.cut_off(identity)
                raise RunnerStopped(STOPPED) from error
            except (aiohttp.ClientError, BentoMLException) as error:
                raise InferenceFailed("the model's process failed") from error
        raise AssertionError("unreachable")


def _heard(call: asyncio.Task[Any]) -> None:
    """Read the exception, or asyncio complains when nobody waits for it any more."""
    if not call.cancelled():
        call.exception()


def _use_fresh_connections(proxy: Any) -> None:
    """Make BentoML's client open a connection a call (private names of the pinned bentoml 1.4.40).

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
