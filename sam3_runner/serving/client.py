"""The API worker's client of the runner: images in, results out, through BentoML's proxy."""

from __future__ import annotations

import asyncio
import pickle
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Literal

import aiohttp
from bentoml.exceptions import BentoMLException

from sam3_runner.errors import DeadlineExceeded, InferenceFailed, ModelNotLoaded, RunnerStopped, SAM3Error
from sam3_runner.metrics import GPU_MEMORY_BYTES, MODEL_READY, add_request_s, trace_parent
from sam3_runner.serving.engine import EngineStatus, SegmentOutcome, SegmentRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sam3_runner.images.decoded import DecodedImage
    from sam3_runner.instances import Results
    from sam3_runner.prompts import ConceptPrompt
    from sam3_runner.serving.liveness import RunnerLiveness

STOPPED = "the model's process stopped while it worked"
CONNECT_ATTEMPTS = 3
RETRY_PAUSE_S = 0.03
POLL_S = 0.25
"""How often a call that waits checks that the runner's process still lives."""
STATUS_AGE_S = 1.0
STATUS_TIMEOUT_S = 0.7
"""Keeps the answer of a probe under a second, whatever the runner does."""
REMEMBERED_KEYS = 32
"""Images whose features the runner is assumed to hold; a wrong guess costs one short call."""
BUSY_TIME_S = 30.0
"""For so long the last status of a runner counts that lives but is too busy to answer."""


class RunnerClient:
    """Calls one `Sam3Runner` from an API worker.

    Args:
        proxy: what `bentoml.depends` gives.
        liveness: of the runner's process.
        label: of the runner in metrics.
    """

    def __init__(self, proxy: Any, liveness: RunnerLiveness, label: str = "0") -> None:
        self._label = label
        self._proxy = proxy
        self._liveness = liveness
        self._status = EngineStatus(state="loading")
        self._status_of: str | None = None
        self._status_until_s = 0.0
        self._busy_until_s = 0.0
        self._status_call: asyncio.Task[None] | None = None
        self._keys: OrderedDict[tuple[str, str], None] = OrderedDict()

    def may_hold(self, key: str) -> bool:
        """Whether the runner has lately segmented the image with this key for this client."""
        return (self._liveness.find() or "", key) in self._keys

    async def segment(
        self,
        image: DecodedImage,
        prompts: Sequence[ConceptPrompt],
        deadline_s: float,
        *,
        with_masks: bool = False,
        log_ids: dict[str, str] | None = None,
    ) -> tuple[Results, float]:
        """One result a prompt, and the time in ms of the model's pass that they shared.

        The call is sent once: an image that kills the runner must not kill its successor. The trace and
        `log_ids` (fields of what the runner logs about the request) travel in the request: BentoML's header
        would have one trace for a batch of many requests.

        Raises:
            ModelNotLoaded, PromptTooLong, BoxOutsideImage, InferenceFailed: as the runner says;
                ModelNotLoaded also when there is no runner.
            RunnerStopped: the runner died while it had the request, or is about to, since its device failed.
            DeadlineExceeded: `deadline_s` (of `time.monotonic`) passed before the work began.
            FeaturesNotHeld: the image has a key, but no pixels, and they are needed.
        """
        identity = self._liveness.find()
        if identity is None:
            raise ModelNotLoaded(self._liveness.reason_absent)
        request = SegmentRequest(
            image=image.sendable(),
            prompts=list(prompts),
            deadline_s=deadline_s,
            with_masks=with_masks,
            log_ids=log_ids or {},
            trace_parent=trace_parent(),
        )
        [packed] = await self._call_while_alive(identity, "segment", [pickle.dumps(request)])
        outcome: SegmentOutcome = pickle.loads(packed)  # noqa: S301 - from our own process
        if isinstance(outcome.error, RunnerStopped):
            self._liveness.mark_dying(identity)
        if isinstance(outcome.error, ModelNotLoaded):
            self._status_until_s = 0.0  # the last status is out of date
        if image.key is not None:
            self._remember((identity, image.key), held=outcome.is_held)
        if outcome.error is not None:
            raise outcome.error
        assert outcome.results is not None
        add_request_s(outcome.stages_s)
        return outcome.results, outcome.inference_ms

    def _remember(self, key: tuple[str, str], *, held: bool) -> None:
        self._keys.pop(key, None)
        if held:
            self._keys[key] = None
        if len(self._keys) > REMEMBERED_KEYS:
            self._keys.popitem(last=False)

    async def status(self) -> EngineStatus:
        """The runner's state, at most a second old; `loading` while its process restarts.

        `error` when it lives but does not answer.
        """
        await self._refresh_status()
        status = self.known_status
        MODEL_READY.labels(self._label).set(status.state == "ok")
        GPU_MEMORY_BYTES.labels(self._label, "used").set(status.vram_used_bytes or 0)
        GPU_MEMORY_BYTES.labels(self._label, "total").set(status.vram_total_bytes or 0)
        return status

    @property
    def max_stored_px(self) -> int:
        """As `EngineStatus.max_stored_px`, by the last status."""
        return self.known_status.max_stored_px

    @property
    def known_status(self) -> EngineStatus:
        """The last status of the process that lives now, without asking it.

        `loading` where there is none, and `error` where there will be none.
        """
        identity = self._liveness.find()
        if identity is None or identity != self._status_of:
            state: Literal["loading", "error"] = "error" if self._liveness.has_failed else "loading"
            return EngineStatus(state=state, detail=self._liveness.reason_absent)
        return self._status

    async def _refresh_status(self) -> None:
        identity = self._liveness.find()
        if identity is not None and (identity != self._status_of or time.monotonic() >= self._status_until_s):
            # One call for all callers: in a burst, one each would keep the runner from its work.
            if self._status_call is None:
                self._status_call = asyncio.create_task(self._update_status(identity))
            await asyncio.shield(self._status_call)

    async def _update_status(self, identity: str) -> None:
        if identity != self._status_of:
            self._status = EngineStatus(state="loading", detail="the model's process is starting")
            self._status_of, self._status_until_s = identity, 0.0
            self._busy_until_s = time.monotonic() + BUSY_TIME_S
        try:
            async with asyncio.timeout(STATUS_TIMEOUT_S):
                self._status = await self._call_while_alive(identity, "status")
            self._busy_until_s = time.monotonic() + BUSY_TIME_S
        except (SAM3Error, TimeoutError) as error:
            busy = isinstance(error, TimeoutError | DeadlineExceeded)
            if not busy or time.monotonic() > self._busy_until_s:
                self._status = EngineStatus(state="error", detail="the model's process does not answer")
        finally:
            self._status_call = None
        # "loading" is not cached: a caller that saw a good /readyz is served at once.
        if self._status.state != "loading":
            self._status_until_s = time.monotonic() + STATUS_AGE_S

    async def _call_while_alive(self, identity: str, method: str, *arguments: object) -> Any:
        """Call the proxy, and give up when the process that got the call has died."""
        call = asyncio.create_task(self._call(identity, method, *arguments))
        call.add_done_callback(_consume_exception)
        try:
            while not (await asyncio.wait({call}, timeout=POLL_S))[0]:
                if self._liveness.find() != identity:
                    raise RunnerStopped(STOPPED)
            return call.result()
        finally:
            call.cancel()

    async def _call(self, identity: str, method: str, *arguments: object) -> Any:
        """Call the proxy; retry only what was certainly not sent."""
        for attempts_left in reversed(range(CONNECT_ATTEMPTS)):
            try:
                return await getattr(self._proxy.to_async, method)(*arguments)
            except aiohttp.ClientConnectorError as error:
                if not attempts_left:
                    raise ModelNotLoaded("the model's process cannot be reached") from error
                await asyncio.sleep(RETRY_PAUSE_S)
            except TimeoutError as error:
                raise DeadlineExceeded("the model's process took too long") from error
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
                self._liveness.mark_dying(identity)
                raise RunnerStopped(STOPPED) from error
            except (aiohttp.ClientError, BentoMLException) as error:
                raise InferenceFailed("the model's process failed") from error
        raise AssertionError("unreachable")


def _consume_exception(call: asyncio.Task[Any]) -> None:
    """Read the exception: asyncio logs one that nobody has read."""
    if not call.cancelled():
        call.exception()
