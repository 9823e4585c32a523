"""The Python client when the server is overloaded or loads, and when connections fail."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from sam3_client import (
    AsyncClient,
    Client,
    InvalidRequest,
    ModelLoading,
    Overloaded,
    Sam3Error,
    ServerError,
    ServerUnreachable,
)
from sam3_client.retries import Retries
from tests.drawn import Scene, scene
from tests.edge import wait_for
from tests.sam3_client.conftest import CALLS
from tests.server_processes import RUNNER, children_of, started_server
from tests.services.faults import fault_proxy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future
    from pathlib import Path

    from commands.local_server import LocalServer
    from sam3_client import Result
    from tests.sam3_client.conftest import Segment
    from tests.services.faults import FaultProxy

pytestmark = pytest.mark.server

SEED = 200


@pytest.fixture(scope="module")
def drawn() -> Scene:
    """A picture whose objects are known."""
    return scene(SEED)


@pytest.fixture
def proxy(server: LocalServer) -> Iterator[FaultProxy]:
    """Stands before the server; each connection that fails does so there."""
    with fault_proxy(server.url) as running:
        yield running


@pytest.mark.parametrize(
    "fail",
    [
        lambda proxy: proxy.cut_next(2),
        lambda proxy: proxy.lose_answer_next(2),
        lambda proxy: proxy.fail_next(2, status=503),
        lambda proxy: proxy.fail_next(2, status=429, headers={"Retry-After": "0"}),
    ],
    ids=["connection closed", "answer lost", "503", "429"],
)
def test_call_is_tried_again(
    segment: Segment, proxy: FaultProxy, drawn: Scene, fail: Callable[[FaultProxy], None]
) -> None:
    """After two faults the third try is answered."""
    fail(proxy)
    assert segment(drawn.image, drawn.names[0], client={"url": proxy.url}).labels
    assert len(proxy.requests) == 3


def test_waits() -> None:
    """A wait is what the server asks for or a growing one, plus a share; none ends beyond the patience."""
    retries = Retries(max_wait_s=60.0)
    refused, broken = (
        Overloaded("", code="OVERLOADED", retry_after_s=7.0),
        ServerUnreachable("", code="UNREACHABLE"),
    )
    assert 7.0 <= retries.wait_s(refused, was_answered=False) <= 7.0 * 1.25
    waits_s = [retries.wait_s(broken, was_answered=True) for _ in range(6)]
    assert all(
        wait_s <= bound_s for wait_s, bound_s in zip(waits_s, (0.63, 1.25, 2.5, 5, 6.25, 6.25), strict=True)
    )
    assert waits_s[0] >= 0.5
    assert waits_s[-1] >= 5
    with pytest.raises(ServerUnreachable):
        retries.wait_s(broken, was_answered=False)
    with pytest.raises(Overloaded):
        Retries(max_wait_s=6.9).wait_s(refused, was_answered=True)


@pytest.mark.parametrize(
    ("kind", "sentence", "answer"),
    [
        (Overloaded, "429 Too Many Requests", {"status": 429, "headers": {"Retry-After": "30"}}),
        (ServerError, "502 Bad Gateway; check the URL", {"status": 502, "body": b"<html>"}),
        (ServerError, "301 Moved Permanently; check the URL", {"status": 301, "headers": {"Location": "/"}}),
        (ServerError, "is not that of a SAM3 server", {"status": 200, "body": b"<html>"}),
        (ServerError, "is not that of a SAM3 server", {"status": 200, "body": b'{"data": [{}]}'}),
    ],
)
def test_answers_that_end_a_call(
    segment: Segment, proxy: FaultProxy, kind: type[Sam3Error], sentence: str, answer: dict[str, Any]
) -> None:
    """What another server answers is an error at once, as is a wait beyond the patience."""
    proxy.fail_next(9, **answer)
    with pytest.raises(kind, match=sentence) as failed:
        segment(scene(SEED).image, "circle", client={"url": proxy.url, "max_wait_s": 20.0})
    assert failed.value.code
    assert len(proxy.requests) == 1


def test_no_answer_in_time(segment: Segment, proxy: FaultProxy, drawn: Scene) -> None:
    """A call that is not answered in time ends, and is not sent again."""
    proxy.hang_next()
    with pytest.raises(ServerUnreachable, match=r"did not answer within 1 s; pass a larger timeout_s"):
        segment(drawn.image, "circle", client={"url": proxy.url, "timeout_s": 1.0})
    assert len(proxy.requests) == 1


def test_requests_of_several_prompts(proxy: FaultProxy, server: LocalServer, drawn: Scene) -> None:
    """`AsyncClient` has them in flight together; when one fails, or the caller goes, all end."""

    async def call(prompts: list[str], **settings: Any) -> Any:
        async with AsyncClient(proxy.url, server.api_key, **settings) as client:
            task = asyncio.create_task(client.segment(drawn.image, prompts))
            await asyncio.to_thread(proxy.wait_for_requests, len(prompts))
            if not settings:
                task.cancel()
            return await task

    proxy.hang_next(3)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(call(["circle", "ring", "square"]))
    wait_for(lambda: proxy.connections_open, lambda count: count == 0)
    proxy.requests.clear()
    proxy.hang_next(1, when=lambda seen: b"circle" in seen.body)
    with pytest.raises(InvalidRequest, match="tokens"):
        asyncio.run(call(["circle", "a " * 60], timeout_s=60.0))
    wait_for(lambda: proxy.connections_open, lambda count: count == 0)


def test_server_that_loads_and_then_is_full(tmp_path: Path, drawn: Scene) -> None:
    """Each is an error of its own at once; callers with patience get their masks, by both clients."""
    settings = {"MAX_IN_FLIGHT": "1", "API_WORKERS": "1", "SAM3_CPU_THREADS": "1"}
    with started_server(tmp_path, settings) as (server, _), ThreadPoolExecutor(2) as callers:
        patient = {"url": server.url, "key": server.api_key}
        at_once = patient | {"max_wait_s": 0.0}
        [runner] = wait_for(lambda: children_of(server, RUNNER), bool)
        runner.suspend()
        wait_for(lambda: state_of(server), lambda state: state == "loading")
        for call in CALLS.values():
            with pytest.raises(ModelLoading, match=r"try again when health\(\) says ok") as loading:
                call(at_once, drawn.image, "circle")
            assert loading.value.code == "MODEL_NOT_LOADED"
        waiting = [callers.submit(call, patient, drawn.image, drawn.names[0]) for call in CALLS.values()]
        runner.resume()
        assert all(each.result().labels for each in waiting)
        for call in CALLS.values():
            held = callers.submit(call, patient, drawn.image, "circle", tiles=3)
            with pytest.raises(Overloaded, match="try again later") as refused:
                call_while(held, partial(call, at_once, drawn.image, "ring"))
            assert (refused.value.code, bool(refused.value.request_id)) == ("OVERLOADED", True)
            assert refused.value.retry_after_s is not None
            assert refused.value.retry_after_s >= 1
            assert call(patient, drawn.image, drawn.names[0]).labels
            held.result()


def state_of(server: LocalServer) -> str:
    """The state that the server reports; "" while it does not listen."""
    with Client(server.url) as client:
        try:
            return str(client.health()["status"])
        except ServerUnreachable:
            return ""


def call_while(held: Future[Result], call: Callable[[], Result]) -> None:
    """Repeat a call until it fails, or another one is done."""
    while not held.done():
        call()
