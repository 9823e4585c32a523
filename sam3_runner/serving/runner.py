"""Sam3Runner: the engine as a BentoML service, which runs the requests of all API workers in batches."""

from __future__ import annotations

import asyncio
import pickle
import sys
from typing import TYPE_CHECKING, Any

import bentoml

from sam3_runner.serving.engine import Engine, EngineConfig, EngineStatus, SegmentRequest
from sam3_runner.serving.scheduler import SWITCH_INTERVAL_S, Scheduler

if TYPE_CHECKING:
    from collections.abc import Callable

NEVER = 1_000_000_000


def runner_service(
    config: EngineConfig,
    *,
    name: str,
    timeout_s: float,
    on_start: Callable[[], None],
    on_failure: Callable[[], None],
    on_device_lost: Callable[[], None],
) -> Any:
    """A service class `Sam3Runner`, one for each GPU; one process, since a GPU holds one copy of the weights.

    It asks BentoML for no GPU: BentoML would give none of those that `CUDA_VISIBLE_DEVICES` names.

    Args:
        config: of the engine.
        name: of the service. Services of one name, and processes of one service, share a socket, so that
            the caller could not choose between them.
        timeout_s: longest time that a request may wait and run; the requests' own deadlines are shorter.
        on_start: is called first in the runner's process, takes its GPU, and may end it.
        on_failure: is called when the model cannot be loaded.
        on_device_lost: is called when the device no longer works in the runner's process, and ends it.
    """

    @bentoml.service(
        name=name,
        workers=1,
        traffic={"timeout": timeout_s},
        # The model's CPU threads spin for microseconds only before they sleep. By default they spin on,
        # and where other processes want the same cores a pass takes ten times as long.
        envs=[{"name": "GOMP_SPINCOUNT", "value": "2000"}],
        # By default the connection to this service is renewed every 100 calls, killing those in flight.
        runner_connection={"max_requests": NEVER, "max_age": float(NEVER)},
        # Its own address is a private socket; the API worker logs every request once.
        logging={"access": {"enabled": False}},
        # Never exported: the spans of a pass are ours.
        tracing={"excluded_urls": ".*"},
    )
    class Sam3Runner:
        def __init__(self) -> None:
            on_start()
            sys.setswitchinterval(SWITCH_INTERVAL_S)
            self._engine = Engine(config)
            self._scheduler = Scheduler(self._engine, config.max_batch)
            self._engine.start(on_failure, on_device_lost)

        def __is_ready__(self) -> bool:
            return self._engine.ready

        # Pickled by us: BentoML would check and copy the values field by field, 5 ms a request.
        # max_latency_ms: ten times the timeout, so that BentoML never drops a request that waits. Our own
        # deadlines do, with an outcome; BentoML's way would be an exception.
        @bentoml.api(batchable=True, max_batch_size=config.max_batch, max_latency_ms=int(timeout_s * 10_000))
        async def segment(self, packed: list[bytes]) -> list[bytes]:
            requests: list[SegmentRequest] = [pickle.loads(each) for each in packed]  # noqa: S301 - our own
            outcomes = [asyncio.wrap_future(self._scheduler.submit(request)) for request in requests]
            return [pickle.dumps(outcome) for outcome in await asyncio.gather(*outcomes)]

        # async: answers from the event loop, beside the threads that stage images and run the model.
        @bentoml.api
        async def status(self) -> EngineStatus:
            return self._engine.status()

    return Sam3Runner
