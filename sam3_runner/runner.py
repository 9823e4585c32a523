"""Sam3Runner: the engine as a BentoML service, which gathers the requests of all API workers into batches."""

from __future__ import annotations

import logging
import pickle
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import bentoml
import pynvml
from bentoml._internal.marshal import dispatcher
from bentoml._internal.resource import NvidiaGpuResource
from bentoml._internal.utils import alg

from sam3_runner.engine import Engine, EngineConfig, EngineStatus, SegmentRequest
from sam3_runner.supervision import end_server, outlive_siblings

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger("bentoml.sam3")

MAX_BATCH_WAIT_S = 0.005
"""Longest time that an idle runner waits for company: batches form while it is busy, not by waiting."""

NEVER = 1_000_000_000


def runner_service(config: EngineConfig, *, timeout_s: float, gpu: bool, on_start: Callable[[], None]) -> Any:
    """The service class `Sam3Runner`; one process, since one GPU holds one copy of the weights.

    Args:
        config: of the engine.
        timeout_s: longest time that a request may wait and run; the requests' own deadlines are shorter.
        gpu: asks BentoML for a GPU of the host.
        on_start: is called first in the runner's process, and may end it.
    """
    bound_batch_wait()
    wait_by_monotonic_time()
    count_no_gpus_on_nvml_errors()

    @bentoml.service(
        name="sam3_runner",
        workers=1,
        resources={"gpu": 1} if gpu else {},
        traffic={"timeout": timeout_s},
        # The model's CPU threads spin for microseconds only before they sleep. By default they spin on,
        # and where other processes want the same cores a pass takes ten times as long.
        envs=[{"name": "GOMP_SPINCOUNT", "value": "2000"}],
        # By default the connection to this service is renewed every 100 calls, killing those in flight.
        runner_connection={"max_requests": NEVER, "max_age": float(NEVER)},
        # Its own address is a private socket; the API worker logs every request once.
        logging={"access": {"enabled": False}},
    )
    class Sam3Runner:
        def __init__(self) -> None:
            on_start()
            outlive_siblings(timeout_s)
            self._engine = Engine(config)
            self._engine.start(on_failure=end_server)

        def __is_ready__(self) -> bool:
            return self._engine.ready

        # Packed by us: BentoML checks and copies values that it knows field by field, 5 ms a request.
        # Our own deadlines shed late work, with an outcome; BentoML's shedding would be an exception.
        @bentoml.api(batchable=True, max_batch_size=config.max_batch, max_latency_ms=int(timeout_s * 10_000))
        def segment(self, packed: list[bytes]) -> list[bytes]:
            requests: list[SegmentRequest] = [pickle.loads(each) for each in packed]  # noqa: S301 - our own
            return [pickle.dumps(outcome) for outcome in self._engine.segment(requests)]

        # async: answers from the event loop while a batch holds the worker thread.
        @bentoml.api
        async def status(self) -> EngineStatus:
            return self._engine.status()

    return Sam3Runner


class BoundedOptimizer(dispatcher.Optimizer):
    """BentoML's estimate of how long to wait for company, kept from sticking after a burst.

    Unbounded, lone requests wait over a second for minutes after 64 clients came at once.
    """

    wait: float  # type: ignore[assignment]

    def trigger_refresh(self) -> None:
        """Learn from the last batches, then bound what was learnt."""
        super().trigger_refresh()  # type: ignore[no-untyped-call]
        self.wait = min(self.wait, MAX_BATCH_WAIT_S)


def bound_batch_wait() -> None:
    """Make BentoML's dispatchers use `BoundedOptimizer` (a private name of the pinned bentoml 1.4.40)."""
    dispatcher.Optimizer = BoundedOptimizer  # type: ignore[misc]


def wait_by_monotonic_time() -> None:
    """Let BentoML's dispatchers measure by a clock that nobody sets (private names of the pinned 1.4.40).

    They go by the wall clock: when it jumps forward, what waits in the queue counts as late and fails.
    """
    dispatcher.time = alg.time = SimpleNamespace(time=time.monotonic)


def count_no_gpus_on_nvml_errors() -> None:
    """Let BentoML count no GPU where NVML fails, as it does where there is none.

    It counts before any check of ours, whatever the device; after an upgrade of the host's driver NVML no
    longer fits it, and the start would end in a traceback (a private name of the pinned bentoml 1.4.40).
    """
    count = NvidiaGpuResource.from_system

    def count_or_none() -> list[int]:
        try:
            gpus: list[int] = count()
        except pynvml.NVMLError as error:
            logger.warning("GPUs cannot be counted: %s", error)
            return []
        return gpus

    NvidiaGpuResource.from_system = staticmethod(count_or_none)  # type: ignore[method-assign, assignment]
