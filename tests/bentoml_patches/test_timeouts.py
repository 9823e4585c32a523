"""The patch of BentoML's timeout of a request."""

from __future__ import annotations

import asyncio
import gc
import weakref
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import pytest
from bentoml._internal.server import base_app
from bentoml._internal.server.http import traffic

from bentoml_patches.timeouts import EndingTimeout, patch

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

pytestmark = pytest.mark.anyio

LONG_S, SHORT_S = 3600.0, 0.01


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Span:
    """What a request puts in a context variable, as OpenTelemetry does."""


SPAN: ContextVar[Span] = ContextVar("span")


async def answer_empty(_: Scope, _receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def statuses_of(app: ASGIApp) -> list[int]:
    """Call the application once; returns the status of each answer that it begins."""

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        messages.append(message)

    messages: list[Message] = []
    await app({"type": "http", "method": "GET", "path": "/", "headers": []}, receive, send)
    return [message["status"] for message in messages if message["type"] == "http.response.start"]


async def spans_held_after(middleware: Any, requests: int) -> int:
    """How many spans are in memory after so many requests have been answered."""

    async def request() -> None:
        span = Span()
        spans.add(span)
        SPAN.set(span)
        assert await statuses_of(app) == [200]

    spans: weakref.WeakSet[Span] = weakref.WeakSet()
    app = middleware(answer_empty, timeout=LONG_S)
    for _ in range(requests):
        await asyncio.create_task(request())
    await asyncio.sleep(0)  # the loop lets go of the last task
    gc.collect()
    return len(spans)


async def test_the_patch_is_needed(unpatched: Any) -> None:
    """BentoML's own timer holds what a request had in its context until the timeout, not the answer."""
    assert await spans_held_after(unpatched(traffic).TimeoutMiddleware, requests=8) == 8


async def test_answered_requests_hold_nothing() -> None:
    assert await spans_held_after(EndingTimeout, requests=8) == 0


async def test_late_answer_becomes_504() -> None:
    """The request ends, and its caller gets an answer."""

    async def never_answer(*_: object) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    ended = asyncio.Event()
    assert await statuses_of(EndingTimeout(never_answer, timeout=SHORT_S)) == [504]
    assert ended.is_set()


async def test_begun_answer_may_take_longer() -> None:
    """The timeout is that of the answer's begin, as BentoML's."""

    async def begin_and_wait(_: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        # A timer of the same loop that is due after the timeout: the timeout would have come before it.
        await asyncio.sleep(2 * SHORT_S)
        await send({"type": "http.response.body", "body": b""})

    assert await statuses_of(EndingTimeout(begin_and_wait, timeout=SHORT_S)) == [200]


async def test_timeouts_of_the_application_are_its_own() -> None:
    """An error of the application is not taken for a late answer."""

    async def fail(*_: object) -> None:
        raise TimeoutError("of a store")

    with pytest.raises(TimeoutError, match="of a store"):
        await statuses_of(EndingTimeout(fail, timeout=LONG_S))


def test_bentoml_serves_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The applications that BentoML makes have our middleware."""
    monkeypatch.setattr(traffic, "TimeoutMiddleware", traffic.TimeoutMiddleware)
    patch()

    class Applications(base_app.BaseAppFactory):
        name = "test"

        async def readyz(self, _: Any) -> Any:
            raise NotImplementedError

    [made] = Applications(timeout=LONG_S).middlewares
    middleware: object = made.cls
    assert middleware is EndingTimeout
