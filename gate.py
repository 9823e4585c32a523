"""What every request passes first: request id, API key, body limit, and the last net for errors.

Plain ASGI, and never raises: an exception that leaves a middleware of BentoML hangs the client.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import time
import uuid
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from contract import Failure

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping

    Scope = MutableMapping[str, Any]
    Message = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]
    App = Callable[[Scope, Receive, Send], Awaitable[None]]

logger = logging.getLogger("bentoml.sam3")

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
BODY_TIMEOUT_S = 10.0
"""64 KiB that take longer are an attack, or a line on which nothing works."""

QUIET_PATHS = {"/health", "/livez", "/readyz", "/metrics"}
"""Polled all day; not worth a log line."""


class Gate:
    """Outermost layer of the API.

    Args:
        app: what comes behind it.
        api_keys: any of them opens `/api/`.
        max_body_bytes: longer bodies are refused before they are read whole.
    """

    def __init__(self, app: App, *, api_keys: tuple[str, ...], max_body_bytes: int) -> None:
        self._app = app
        self._api_keys = [key.encode() for key in api_keys]
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; other scopes pass."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        answer = _Answer(send, request_id_of(headers))
        scope.setdefault("state", {})["request_id"] = answer.request_id
        try:
            self._check_key(scope, headers)
            await self._app(scope, await self._read_body(headers, receive), answer.send)
        except Failure as failure:
            await answer.fail(failure)
        except Exception as error:  # the last net: nothing behind it would answer the caller
            logger.exception("request %s failed", answer.request_id)
            await answer.fail(Failure.of(error))
        if scope["path"] not in QUIET_PATHS:
            logger.info(
                "%s %s %d %.0f ms request %s",
                scope["method"],
                scope["path"],
                answer.status,
                answer.elapsed_ms,
                answer.request_id,
            )

    def _check_key(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        # A preflight carries no key by its nature.
        if not scope["path"].startswith("/api/") or scope["method"] == "OPTIONS":
            return
        given = headers.get(b"x-api-key")
        if given is None:
            raise Failure("AUTH_REQUIRED", HTTPStatus.UNAUTHORIZED, "the header X-API-Key is missing")
        if not any(hmac.compare_digest(given, key) for key in self._api_keys):
            raise Failure("AUTH_INVALID", HTTPStatus.UNAUTHORIZED, "the key in X-API-Key is not valid")

    async def _read_body(self, headers: dict[bytes, bytes], receive: Receive) -> Receive:
        """The body, read up to the limits of size and time, as a new `receive`."""
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_body_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                body = await self._collect(receive)
        except TimeoutError as error:
            late = f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s"
            raise Failure("INVALID_REQUEST", HTTPStatus.BAD_REQUEST, late) from error
        whole = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replay() -> Message:
            return next(whole, None) or await receive()

        return replay

    async def _collect(self, receive: Receive) -> bytes:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                break
            body += message.get("body", b"")
            if len(body) > self._max_body_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                break
        return bytes(body)

    def _too_large(self) -> Failure:
        return Failure(
            "FILE_TOO_LARGE",
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"the body has more than {self._max_body_bytes} bytes",
        )


class _Answer:
    """Sends the answer of one request: adds the request id, remembers the status."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._started_s = time.monotonic()
        self.request_id = request_id
        self.status = 0

    @property
    def elapsed_ms(self) -> float:
        return (time.monotonic() - self._started_s) * 1000

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message["headers"], self._id_header]}
        await self._send(message)

    async def fail(self, failure: Failure) -> None:
        if self.status:  # the answer has begun; nothing can be said any more
            return
        body = json.dumps(failure.body(self.request_id).model_dump()).encode()
        headers = [(name.lower().encode(), value.encode()) for name, value in failure.headers.items()]
        headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self.send({"type": "http.response.start", "status": int(failure.status), "headers": headers})
        await self.send({"type": "http.response.body", "body": body})

    @property
    def _id_header(self) -> tuple[bytes, bytes]:
        return b"x-request-id", self.request_id.encode()


def request_id_of(headers: dict[bytes, bytes]) -> str:
    """The caller's X-Request-ID if it is a proper one, else a new id."""
    given = headers.get(b"x-request-id", b"").decode("latin-1")
    return given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
