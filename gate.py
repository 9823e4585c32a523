"""What every request passes first: request id, API key, body limit, and one body for every error.

Plain ASGI around all that is served, BentoML's own routes too. It never raises: after an exception in a
middleware BentoML does not answer the client.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import re
import time
import uuid
from contextlib import contextmanager
from http import HTTPStatus
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from contract import Failure, OverloadedError, framework_failure
from observability.log_lines import log_ids
from observability.tracing import root_span

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
BODY_TIMEOUT_S = 10.0
"""A caller that needs longer for 64 KiB is an attacker, or has no usable connection."""

LARGE_BODY_TIMEOUT_S = 30.0
"""For bodies of up to 10 MB, whose callers have a key."""
MAX_LARGE_BODIES = 16
"""Held at once by an API worker: 10 MB each, twice while the form is read."""
KEYED = ("/api/", "/v1/")
"""Paths that need a key, whoever may read the others."""

UNENCODED = {b"content-encoding": {b"", b"identity"}, b"transfer-encoding": {b"chunked"}}
"""Header values with which the body is used as it is; the HTTP server joins chunks."""
PROBES = {"/health", "/livez", "/healthz", "/readyz"}
"""Open to everyone: hosts poll them, and they hold no secret."""
QUIET_PATHS = PROBES | {"/metrics"}
"""Polled often, so not logged unless they are refused."""
FORWARDED = {b"forwarded", b"x-forwarded-for", b"x-real-ip", b"cf-connecting-ip"}
"""Headers of a request that came through a proxy or a tunnel, whose address is not the caller's."""
LOGGED_PATH_CHARACTERS = 200


class Gate:
    """Outermost layer of the server.

    Args:
        app: what comes behind it.
        api_keys: any of them opens `/api/`.
        access: who may read all but `/api/` and the probes: everyone, callers with a key, or also callers on
            this machine.
        max_body_bytes: longer bodies are refused before they are read whole.
        body_timeout_s: so are bodies that take longer.
        large_bodies: limits in bytes of bodies by the paths that have their own. An API worker holds
            `MAX_LARGE_BODIES` of them at once.
        absent: paths that are answered as unknown ones, before their bodies are read.
        open_paths: open to everyone besides the probes, whatever `access` is.
        find_refusal: by the path of a POST that needs a key, its header X-Deadline-Ms and its body, why the
            server is too busy for it; None: it is not. Asked twice: before the body is read, with None in
            its place, and after.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_keys: tuple[str, ...],
        access: Literal["open", "key", "loopback"],
        max_body_bytes: int,
        body_timeout_s: float = BODY_TIMEOUT_S,
        large_bodies: Mapping[str, int] = MappingProxyType({}),
        absent: Collection[str] = (),
        open_paths: Collection[str] = (),
        find_refusal: Callable[[str, str | None, bytes | None], Failure | None] = lambda *_: None,
    ) -> None:
        self._app = app
        self._access = access
        self._api_keys = [key.encode() for key in api_keys]
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s
        self._large_bodies = large_bodies
        self._absent = absent
        self._open = PROBES.union(open_paths)
        self._large_in_flight = 0
        self._find_refusal = find_refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; other scopes pass."""
        if scope["type"] == "lifespan":
            # BentoML's own application, which no other interface gives.
            scope["app"].router.redirect_slashes = False
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        answer = _Answer(send, request_id_of(headers), with_body=scope["method"] != "HEAD")
        scope.setdefault("state", {})["request_id"] = answer.request_id
        with log_ids(request_id=answer.request_id):
            try:
                self._check_access(scope, headers)
            except Failure as failure:
                await answer.fail(failure)
                _log_access(scope, answer)
                return
            with _span(scope, headers, answer):
                if scope["path"] in self._large_bodies:
                    await self._serve_large(scope, receive, headers, answer)
                else:
                    await self._serve(scope, receive, headers, answer)
                if scope["path"] not in QUIET_PATHS:
                    _log_access(scope, answer)

    async def _serve_large(
        self, scope: Scope, receive: Receive, headers: dict[bytes, bytes], answer: _Answer
    ) -> None:
        """Serve a request with a large body, unless too many are held already."""
        if self._large_in_flight >= MAX_LARGE_BODIES:
            message = f"{MAX_LARGE_BODIES} requests with images are in flight; try again later"
            await answer.fail(Failure.of(OverloadedError(message)))
            return
        self._large_in_flight += 1
        try:
            await self._serve(scope, receive, headers, answer)
        finally:
            self._large_in_flight -= 1

    async def _serve(
        self, scope: Scope, receive: Receive, headers: dict[bytes, bytes], answer: _Answer
    ) -> None:
        try:
            max_bytes = self._large_bodies.get(scope["path"], self._max_body_bytes)
            _refuse_encodings(scope)
            _refuse_length(headers, max_bytes)
            self._refuse_overload(scope, headers, None)
            body = await self._read_body(scope, receive, max_bytes)
            self._refuse_overload(scope, headers, body)
            await self._app(_with_get_for_head(scope), _replay(body, receive), answer.send)
        except Failure as failure:
            await answer.fail(failure)
        except Exception as error:  # without this the caller would get no answer
            logger.exception("request %s failed", answer.request_id)
            await answer.fail(Failure.of(error))

    def _check_access(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        """Raise `Failure` where the caller may not read the path, or it is absent.

        Every path is closed unless it is open.
        """
        path = scope["path"]
        if path.startswith(KEYED):
            # Browsers send preflights without a key.
            if scope["method"] != "OPTIONS":
                self._check_key(headers.get(b"x-api-key"), "X-API-Key")
        elif path not in self._open and not self._is_open_to(scope, headers):
            # Prometheus sends its key in this way.
            scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
            token = bearer.strip() if scheme.lower() == b"bearer" else None
            self._check_key(headers.get(b"x-api-key", token), "X-API-Key or Authorization: Bearer")
        if path in self._absent:
            raise framework_failure(HTTPStatus.NOT_FOUND, None)

    def _is_open_to(self, scope: Scope, headers: dict[bytes, bytes]) -> bool:
        return self._access == "open" or (
            self._access == "loopback" and not FORWARDED & headers.keys() and _is_on_this_machine(scope)
        )

    def _check_key(self, given: bytes | None, header: str) -> None:
        if given is None:
            raise Failure("AUTH_REQUIRED", f"the header {header} is missing")
        if not any(hmac.compare_digest(given, key) for key in self._api_keys):
            raise Failure("AUTH_INVALID", f"the key in {header} is not valid")

    def _refuse_overload(self, scope: Scope, headers: dict[bytes, bytes], body: bytes | None) -> None:
        if scope["method"] == "POST" and scope["path"].startswith(KEYED):
            deadline_ms = headers.get(b"x-deadline-ms")
            text = None if deadline_ms is None else deadline_ms.decode("latin-1")
            refusal = self._find_refusal(scope["path"], text, body)
            if refusal is not None:
                raise refusal

    async def _read_body(self, scope: Scope, receive: Receive, max_bytes: int) -> bytes:
        """The body, read up to the limits of size and time."""
        timeout_s = LARGE_BODY_TIMEOUT_S if scope["path"] in self._large_bodies else self._body_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                return await _collect(receive, max_bytes)
        except TimeoutError as error:
            late = f"the body did not arrive within {timeout_s:g} s"
            raise Failure("INVALID_REQUEST", late) from error


def _refuse_length(headers: dict[bytes, bytes], max_bytes: int) -> None:
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length) > max_bytes:
        raise _too_large(max_bytes)


async def _collect(receive: Receive, max_bytes: int) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            break
        body += message.get("body", b"")
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
        if not message.get("more_body", False):
            break
    return bytes(body)


def _too_large(max_bytes: int) -> Failure:
    return Failure("FILE_TOO_LARGE", f"the body has more than {max_bytes} bytes")


class _Answer:
    """Sends the answer of one request: adds the request id, replaces plain-text errors, keeps the status."""

    def __init__(self, send: Send, request_id: str, *, with_body: bool) -> None:
        self._send = send
        self._with_body = with_body
        self._is_reworded = False
        self._head: Message = {}
        self._started_s = time.monotonic()
        self.request_id = request_id
        self.status = 0

    @property
    def elapsed_ms(self) -> float:
        return (time.monotonic() - self._started_s) * 1000

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = dict(message["headers"])
            self._is_reworded = message["status"] >= HTTPStatus.BAD_REQUEST and not _is_json(headers)
            if self._is_reworded:
                allow = headers.get(b"allow", b"").decode("latin-1")
                await self.fail(framework_failure(message["status"], allow))
            else:
                await self._start(message["status"], message["headers"])
        elif not self._is_reworded:
            await self._send_body(message)

    async def fail(self, failure: Failure) -> None:
        if self.status:  # the answer has begun
            return
        body = failure.body(self.request_id).model_dump_json().encode()
        headers = [(name.lower().encode(), value.encode()) for name, value in failure.headers.items()]
        headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self._start(int(failure.status), headers)
        await self._send_body({"type": "http.response.body", "body": body})

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.status = status
        completed = [(name, _with_head(value) if name == b"allow" else value) for name, value in headers]
        completed.append((b"x-request-id", self.request_id.encode()))
        self._head = {"type": "http.response.start", "status": status, "headers": completed}
        if self._with_body:
            await self._send(self._head)

    async def _send_body(self, message: Message) -> None:
        if self._with_body:
            await self._send(message)
        elif not message.get("more_body", False):
            # The caller waits for the head alone. Sent before the app is done, it would let the next request
            # come while this one is in progress, which ends the connection.
            await self._send(self._head)
            await self._send({"type": "http.response.body", "body": b""})


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` of a request whose body is read."""
    whole = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def replay() -> Message:
        return next(whole, None) or await receive()

    return replay


def _log_access(scope: Scope, answer: _Answer) -> None:
    path, elapsed_ms = _path_as_sent(scope), round(answer.elapsed_ms)
    logger.info(
        "%s %s %d %d ms request %s",
        *(scope["method"], path, answer.status, elapsed_ms, answer.request_id),
        extra={
            "method": scope["method"],
            "path": path,
            "status": answer.status,
            "duration_ms": elapsed_ms,
        },
    )


@contextmanager
def _span(scope: Scope, headers: dict[bytes, bytes], answer: _Answer) -> Iterator[None]:
    """A span of a request to `/api/`, whose caller has a key: callers without one start no traces."""
    if not scope["path"].startswith(KEYED):
        yield
        return
    parent = {"traceparent": headers.get(b"traceparent", b"").decode("latin-1")}
    name = f"{scope['method']} {_path_as_sent(scope)}"
    with root_span(name, parent, **{"sam3.request_id": answer.request_id}) as span:
        try:
            yield
        finally:
            span.set_attribute("http.response.status_code", answer.status)


def _is_on_this_machine(scope: Scope) -> bool:
    try:
        return ipaddress.ip_address((scope.get("client") or ("",))[0]).is_loopback
    except ValueError:  # a unix socket has no address
        return False


def _with_get_for_head(scope: Scope) -> Scope:
    """HEAD is answered as GET on every route, without the body."""
    return {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope


def _with_head(allow: bytes) -> bytes:
    methods = {method.strip() for method in allow.split(b",")}
    return b", ".join(sorted(methods | {b"HEAD"} if b"GET" in methods else methods))


def _is_json(headers: dict[bytes, bytes]) -> bool:
    return headers.get(b"content-type", b"").startswith(b"application/json")


def _refuse_encodings(scope: Scope) -> None:
    for name, value in scope["headers"]:
        if name in UNENCODED and value.strip().lower() not in UNENCODED[name]:
            raise Failure(
                "UNSUPPORTED_MEDIA_TYPE",
                f"the body has a {name.decode().title()} that is not decoded here; send it as it is",
                headers={"Accept-Encoding": "identity"},
            )


def _path_as_sent(scope: Scope) -> str:
    """The path with its percent escapes: decoded, its spaces could imitate the rest of a log line."""
    path: str = scope["raw_path"].decode("latin-1")
    return path if len(path) <= LOGGED_PATH_CHARACTERS else f"{path[:LOGGED_PATH_CHARACTERS]}..."


def request_id_of(headers: dict[bytes, bytes]) -> str:
    """The caller's X-Request-ID if it is valid, else a new id."""
    given = headers.get(b"x-request-id", b"").decode("latin-1")
    return given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
