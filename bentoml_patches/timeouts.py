"""BentoML's timeout of a request: it holds nothing of requests that have been answered."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import TYPE_CHECKING

from bentoml._internal.server.http import traffic
from starlette.responses import JSONResponse

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send


class EndingTimeout(traffic.TimeoutMiddleware):
    """BentoML's middleware, whose timer ends when the answer begins.

    BentoML's own timer runs on to its end, and holds the request's span and context variables meanwhile.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; answer 504 where no answer has begun after the timeout."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return

        async def begin_answer(message: Message) -> None:
            if not timer.expired():
                timer.reschedule(None)
            await send(message)

        try:
            async with asyncio.timeout(self.timeout) as timer:
                await self.app(scope, receive, begin_answer)
        except TimeoutError:
            if not timer.expired():
                raise
            body = {"error": f"Not able to process the request in {self.timeout} seconds"}
            answer = JSONResponse(body, status_code=HTTPStatus.GATEWAY_TIMEOUT)
            await answer(scope, receive, send)


def patch() -> None:
    """Make BentoML's applications end the timer of a request. Call it before a service is served."""
    traffic.TimeoutMiddleware = EndingTimeout  # type: ignore[misc]
