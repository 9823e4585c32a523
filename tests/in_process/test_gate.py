"""The gate: keys, access modes, request ids, body limits, HEAD, errors, access log."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from http import HTTPStatus
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from contract import Failure
from gate import Gate
from storage import StorageUnavailable
from tests.edge import BATCH, PREDICT, error_of
from tests.in_process.bench import in_time

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from typing import Literal

    from starlette.types import Message, Receive, Scope, Send

pytestmark = pytest.mark.anyio

KEY, OTHER_KEY = "0123456789abcdef", "fedcba9876543210"
WITH_KEY = {"X-API-Key": KEY}
HOST = "127.0.0.1"
STRANGER = "203.0.113.7"
MAX_BODY_BYTES = 1024
PROBES = ("/health", "/livez", "/healthz", "/readyz")
CLOSED = ("/", "/docs.json", "/metrics", "/nothing", "//metrics", "/static_content/x.css")
TEXT = [(b"content-type", b"text/plain")]
JSON = [(b"content-type", b"application/json"), (b"content-length", b"2")]


@dataclass
class Application:
    """The application behind the gate: reads the body, and answers `{}` or what the test sets."""

    answer: Callable[[Scope, Receive, Send], Awaitable[None]] | None = None
    scopes: list[Scope] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        if scope["type"] != "http":
            return
        message = await receive()
        assert not message["more_body"]
        self.bodies.append(message["body"])
        await (self.answer or answering(200, JSON, b"{}"))(scope, receive, send)


def answering(
    status: int, headers: list[tuple[bytes, bytes]], *pieces: bytes
) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """The application sends these pieces of a body."""

    async def answer(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for number, piece in enumerate(pieces, start=1):
            more = number < len(pieces)
            await send({"type": "http.response.body", "body": piece, "more_body": more})

    return answer


def raising(error: Exception, *, after: bool = False) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """The application raises; `after`: once its answer has started."""

    async def answer(_scope: Scope, _receive: Receive, send: Send) -> None:
        if after:
            await send({"type": "http.response.start", "status": 200, "headers": JSON})
        raise error

    return answer


@pytest.fixture
def application() -> Application:
    return Application()


def gate_around(application: Application, **options: Any) -> Gate:
    given: dict[str, Any] = {
        "api_keys": (KEY, OTHER_KEY),
        "access": "open",
        "max_body_bytes": MAX_BODY_BYTES,
        "body_timeout_s": 30.0,
    }
    return Gate(application, **given | options)


def caller(
    application: Application, address: str = HOST, headers: dict[str, str] = WITH_KEY, **options: Any
) -> httpx.AsyncClient:
    """A client that calls the application through the gate."""
    transport = httpx.ASGITransport(gate_around(application, **options), client=(address, 50_000))
    return httpx.AsyncClient(transport=transport, base_url="http://server", headers=headers)


# Keys.


@pytest.mark.parametrize(
    ("key", "code"),
    [
        (None, "AUTH_REQUIRED"),
        (b"wrong", "AUTH_INVALID"),
        (b"", "AUTH_INVALID"),
        (KEY[:-1].encode(), "AUTH_INVALID"),
        (KEY.encode() + b"0", "AUTH_INVALID"),
        (KEY.upper().encode(), "AUTH_INVALID"),
        (f"{KEY},{OTHER_KEY}".encode(), "AUTH_INVALID"),
        ("schlüssel".encode(), "AUTH_INVALID"),
        (b"\xff\xfe", "AUTH_INVALID"),
        (b"a" * 5000, "AUTH_INVALID"),
    ],
)
async def test_api_needs_a_key(application: Application, key: bytes | None, code: str) -> None:
    """Without a valid key every path below /api/ gives 401, and the application is not called."""
    headers = {} if key is None else {b"X-API-Key": key}
    async with caller(application, headers={}) as client:
        for path in (PREDICT, BATCH, "/api/v1/model/info", "/api/v1/anything", "/api/"):
            for method in ("GET", "POST", "DELETE"):
                status, found, message = error_of(await client.request(method, path, headers=headers))
                assert (status, found) == (401, code)
                assert "X-API-Key" in message
            assert (await client.head(path, headers=headers)).status_code == HTTPStatus.UNAUTHORIZED
    assert application.scopes == []


@pytest.mark.parametrize("key", [KEY, OTHER_KEY])
async def test_each_of_several_keys_is_accepted(application: Application, key: str) -> None:
    """Each of several keys is accepted."""
    async with caller(application, headers={"X-API-Key": key}) as edge:
        assert (await edge.post(PREDICT)).status_code == HTTPStatus.OK


async def test_bearer_token_is_not_accepted_by_the_api(application: Application) -> None:
    """`Authorization` is not accepted below /api/."""
    async with caller(application, headers={"Authorization": f"Bearer {KEY}"}) as client:
        assert error_of(await client.post(PREDICT))[:2] == (401, "AUTH_REQUIRED")


async def test_preflight_needs_no_key(application: Application) -> None:
    """OPTIONS needs no key: browsers send preflights without one."""
    async with caller(application, headers={}) as page:
        assert (await page.options(PREDICT)).status_code == HTTPStatus.OK


# Access modes.


async def status_of(
    application: Application,
    access: Literal["open", "key", "loopback"],
    path: str,
    headers: dict[str, str],
    address: str = HOST,
) -> int:
    """The status of a GET."""
    async with caller(application, address, headers, access=access) as reader:
        return (await reader.get(f"http://server{path}")).status_code  # "//x" alone would name a host


@pytest.mark.parametrize("path", PROBES)
@pytest.mark.parametrize("access", ["open", "key", "loopback"])
async def test_probes_are_open(
    application: Application, access: Literal["open", "key", "loopback"], path: str
) -> None:
    """The probes need no key in any access mode."""
    assert await status_of(application, access, path, {}, STRANGER) == HTTPStatus.OK


@pytest.mark.parametrize("access", ["open", "key", "loopback"])
async def test_paths_that_are_opened_need_no_key(
    application: Application, access: Literal["open", "key", "loopback"]
) -> None:
    """A path that is opened by name needs no key in any access mode, and no path beside it is opened."""
    options = {"access": access, "open_paths": ["/page", "/page/app.js"]}
    async with caller(application, STRANGER, {}, **options) as reader:
        for path in ("/page", "/page/app.js"):
            assert (await reader.get(path)).status_code == HTTPStatus.OK
        closed = HTTPStatus.OK if access == "open" else HTTPStatus.UNAUTHORIZED
        for path in ("/page/", "/page/other", "/page/../metrics"):
            assert (await reader.get(f"http://server{path}")).status_code == closed


@pytest.mark.parametrize("path", CLOSED)
async def test_open_needs_no_key(application: Application, path: str) -> None:
    """`open` gives everyone access to all but the API."""
    assert await status_of(application, "open", path, {}, STRANGER) == HTTPStatus.OK
    assert await status_of(application, "open", PREDICT, {}, STRANGER) == HTTPStatus.UNAUTHORIZED


@pytest.mark.parametrize("path", CLOSED)
@pytest.mark.parametrize("address", [HOST, STRANGER])
async def test_key_mode_needs_a_key(application: Application, path: str, address: str) -> None:
    """`key` requires a key, in either header, for all paths but the probes."""
    assert await status_of(application, "key", path, {}, address) == HTTPStatus.UNAUTHORIZED
    for headers in (WITH_KEY, {"Authorization": f"Bearer {OTHER_KEY}"}, {"Authorization": f"bearer  {KEY}"}):
        assert await status_of(application, "key", path, headers, address) == HTTPStatus.OK


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, "AUTH_REQUIRED"),
        ({"X-API-Key": "x" * 16}, "AUTH_INVALID"),
        ({"Authorization": f"Bearer {'x' * 16}"}, "AUTH_INVALID"),
        ({"Authorization": "Bearer"}, "AUTH_INVALID"),
        ({"Authorization": f"Basic {KEY}"}, "AUTH_REQUIRED"),
        ({"X-API-Key": "x" * 16, "Authorization": f"Bearer {KEY}"}, "AUTH_INVALID"),
    ],
)
async def test_other_credentials_are_refused(
    application: Application, headers: dict[str, str], code: str
) -> None:
    """A wrong key in either header, and another authorization scheme, give 401."""
    async with caller(application, headers=headers, access="key") as reader:
        assert error_of(await reader.get("/metrics"))[:2] == (401, code)


@pytest.mark.parametrize("address", [HOST, "127.8.9.10", "::1"])
async def test_loopback_needs_no_key_on_this_machine(application: Application, address: str) -> None:
    """`loopback` gives callers on this machine access without a key."""
    assert await status_of(application, "loopback", "/metrics", {}, address) == HTTPStatus.OK


@pytest.mark.parametrize("address", [STRANGER, "2001:db8::1", "", "localhost"])
async def test_loopback_needs_a_key_from_others(application: Application, address: str) -> None:
    """Other addresses, and unix sockets, need a key; the API always does."""
    for path, expected in (("/metrics", 401), ("/docs.json", 401), ("/health", 200)):
        assert await status_of(application, "loopback", path, {}, address) == expected
    assert await status_of(application, "loopback", "/metrics", WITH_KEY, address) == HTTPStatus.OK
    assert await status_of(application, "loopback", PREDICT, {}) == HTTPStatus.UNAUTHORIZED


@pytest.mark.parametrize("name", ["Forwarded", "X-Forwarded-For", "X-Real-IP", "CF-Connecting-IP"])
@pytest.mark.parametrize("value", [STRANGER, HOST])
async def test_loopback_needs_a_key_behind_a_proxy(application: Application, name: str, value: str) -> None:
    """A request with a proxy's header needs a key: its address is the proxy's."""
    assert await status_of(application, "loopback", "/metrics", {name: value}) == HTTPStatus.UNAUTHORIZED
    assert await status_of(application, "loopback", "/metrics", {name: value} | WITH_KEY) == HTTPStatus.OK


# Request ids.


@pytest.mark.parametrize("given", ["a", "A.z_0:9-", "4dfdf367-bc5d-4da0-876b-2fb85ae067b2", "x" * 128])
async def test_request_id_of_the_caller_is_used(application: Application, given: str) -> None:
    """A valid request id is used for the application, the answer and error bodies."""
    async with caller(application) as edge:
        good = await edge.post(PREDICT, headers={"X-Request-ID": given})
        refused = await edge.post(PREDICT, headers={"X-Request-ID": given, "X-API-Key": "x"})
    assert good.headers["X-Request-ID"] == application.scopes[0]["state"]["request_id"] == given
    assert refused.json()["request_id"] == refused.headers["X-Request-ID"] == given


@pytest.mark.parametrize("given", [None, "", "x" * 129, "a b", "a\tb", 'a"b', "<b>", "\u00fc"])
async def test_request_id_is_made(application: Application, given: str | None) -> None:
    """A missing or invalid request id is replaced by a new one."""
    headers = {} if given is None else {b"X-Request-ID": given.encode()}
    async with caller(application) as edge:
        made = {(await edge.post(PREDICT, headers=headers)).headers["X-Request-ID"] for _ in range(3)}
    assert len(made) == 3
    assert all(len(each) == 32 and each.isalnum() for each in made)


# Bodies.


async def test_body_of_the_limit(application: Application) -> None:
    """A body of exactly MAX_BODY_BYTES reaches the application complete, whatever its chunks."""
    body = bytes(range(256)) * 4

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 100):
            yield body[start : start + 100]

    async with caller(application) as edge:
        assert (await edge.post(PREDICT, content=body)).status_code == HTTPStatus.OK
        assert (await edge.post(PREDICT, content=pieces())).status_code == HTTPStatus.OK
    assert application.bodies == [body, body]


async def test_body_over_the_limit(application: Application) -> None:
    """A body with one more byte gives 413 with the limit, with a Content-Length or without."""

    async def chunks() -> AsyncIterator[bytes]:
        yield bytes(MAX_BODY_BYTES)
        yield b"x"

    async with caller(application) as edge:
        for content in (bytes(MAX_BODY_BYTES + 1), chunks()):
            response = await edge.post(PREDICT, content=content)
            assert error_of(response) == (413, "FILE_TOO_LARGE", "the body has more than 1024 bytes")
    assert application.scopes == []


async def test_body_with_a_long_content_length_is_not_read(application: Application) -> None:
    """A body whose Content-Length is over the limit is not read."""
    read = 0

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal read
        read += 1
        yield b"x"

    async with caller(application) as edge:
        response = await edge.post(PREDICT, content=pieces(), headers={"Content-Length": "1000000000"})
    assert error_of(response)[:2] == (413, "FILE_TOO_LARGE")
    assert read == 0


async def test_endless_body_is_refused_at_the_limit(application: Application) -> None:
    """A body without a length is read until it is over the limit, and no further."""
    read = 0

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal read
        while True:
            read += 1
            yield bytes(512)

    async with caller(application) as edge:
        response = await in_time(edge.post(PREDICT, content=pieces()))
    assert error_of(response)[:2] == (413, "FILE_TOO_LARGE")
    assert read == 3
    assert application.scopes == []


@pytest.mark.parametrize("length", ["x", "-1", "1e9", ""])
async def test_invalid_content_length_is_ignored(application: Application, length: str) -> None:
    """An invalid Content-Length is ignored; the size of the body counts."""
    async with caller(application) as edge:
        headers = {"Content-Length": length}
        assert (await edge.post(PREDICT, content=b"{}", headers=headers)).status_code == HTTPStatus.OK
        response = await edge.post(PREDICT, content=bytes(MAX_BODY_BYTES + 1), headers=headers)
    assert error_of(response)[:2] == (413, "FILE_TOO_LARGE")


@pytest.mark.parametrize("first", [b"", b'{"text_prompt": '])
async def test_incomplete_body_times_out(application: Application, first: bytes) -> None:
    """An incomplete body gives 400 after `body_timeout_s`, and the application is not called."""

    async def pieces() -> AsyncIterator[bytes]:
        yield first
        await asyncio.Event().wait()

    async with caller(application, body_timeout_s=0.05) as edge:
        response = await in_time(edge.post(PREDICT, content=pieces()))
    assert error_of(response) == (400, "INVALID_REQUEST", "the body did not arrive within 0.05 s")
    assert application.scopes == []


async def test_slow_bytes_do_not_extend_the_timeout(application: Application) -> None:
    """The timeout is for the complete body: single bytes do not extend it."""

    async def pieces() -> AsyncIterator[bytes]:
        while True:
            yield b"x"
            await asyncio.sleep(0.005)

    async with caller(application, body_timeout_s=0.1) as edge:
        response = await in_time(edge.post(PREDICT, content=pieces()))
    assert error_of(response)[:2] == (400, "INVALID_REQUEST")


async def test_timeout_does_not_cover_the_answer(application: Application) -> None:
    """The timeout ends with the body; the application may take longer."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.75)
        await answering(200, JSON, b"{}")(scope, receive, send)

    application.answer = answer
    async with caller(application, body_timeout_s=0.5) as edge:
        assert (await edge.post(PREDICT, content=b"{}")).status_code == HTTPStatus.OK


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "zstd", "gzip, identity", "x", "identity, br"])
async def test_encoded_body_is_refused(application: Application, encoding: str) -> None:
    """A body with a Content-Encoding gives 415."""
    async with caller(application) as edge:
        response = await edge.post(PREDICT, content=b"{}", headers={"Content-Encoding": encoding})
    status, code, message = error_of(response)
    assert (status, code) == (415, "UNSUPPORTED_MEDIA_TYPE")
    assert "Content-Encoding" in message
    assert response.headers["Accept-Encoding"] == "identity"
    assert application.scopes == []


@pytest.mark.parametrize("encoding", ["gzip", "gzip, chunked", "identity"])
async def test_transfer_encoding_is_refused(application: Application, encoding: str) -> None:
    """A Transfer-Encoding other than chunked gives 415."""
    async with caller(application) as edge:
        response = await edge.post(PREDICT, content=b"{}", headers={"Transfer-Encoding": encoding})
    assert error_of(response)[:2] == (415, "UNSUPPORTED_MEDIA_TYPE")
    assert "Transfer-Encoding" in response.text


@pytest.mark.parametrize("encoding", ["identity", "Identity", " identity ", ""])
async def test_identity_encoding_is_accepted(application: Application, encoding: str) -> None:
    """`identity` is accepted."""
    async with caller(application) as edge:
        response = await edge.post(PREDICT, content=b"{}", headers={"Content-Encoding": encoding})
    assert response.status_code == HTTPStatus.OK
    assert application.bodies == [b"{}"]


# HEAD.


async def messages_of(gate: Gate, method: str, path: str = "/health") -> list[Message]:
    """The ASGI messages that the gate sends."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "headers": [(b"x-api-key", KEY.encode())],
        "client": (HOST, 50_000),
    }
    await gate(scope, receive, send)
    return sent


async def test_head_is_get_without_a_body(application: Application) -> None:
    """The application gets GET for HEAD; the answer has GET's headers and no body."""
    application.answer = answering(200, [*TEXT, (b"content-length", b"5")], b"hello")
    async with caller(application) as edge:
        got, head = await edge.get("/health"), await edge.head("/health")
    assert [scope["method"] for scope in application.scopes] == ["GET", "GET"]
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["Content-Length"] == got.headers["Content-Length"] == "5"
    assert head.headers["Content-Type"] == got.headers["Content-Type"]


async def test_head_of_an_error(application: Application) -> None:
    """Errors of the gate and of the application have no body for HEAD."""
    application.answer = answering(404, TEXT, b"Not Found")
    async with caller(application) as edge:
        for response in (await edge.head("/nothing"), await edge.head(PREDICT, headers={"X-API-Key": "x"})):
            assert response.status_code in {404, 401}
            assert response.content == b""
            assert int(response.headers["Content-Length"]) > 0


async def test_head_is_answered_after_the_application(application: Application) -> None:
    """The answer to HEAD is sent when the application has finished: the next request may follow at once."""
    application.answer = answering(200, TEXT, b"one", b"two", b"three")
    sent = await messages_of(gate_around(application), "HEAD")
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[1].get("body", b"") == b""
    assert not sent[1].get("more_body", False)
    pieces = await messages_of(gate_around(application), "GET")
    assert [message.get("body") for message in pieces] == [None, b"one", b"two", b"three"]


# Errors behind the gate.


@pytest.mark.parametrize(
    ("status", "code"),
    [(404, "NOT_FOUND"), (405, "METHOD_NOT_ALLOWED"), (500, "INTERNAL_ERROR"), (503, "MODEL_NOT_LOADED")],
)
async def test_plain_text_error_gets_our_body(application: Application, status: int, code: str) -> None:
    """The framework's plain-text errors get our error body."""
    application.answer = answering(status, TEXT, b"in ", b"other words")
    async with caller(application) as edge:
        response = await edge.get("/nothing")
    assert error_of(response)[:2] == (status, code)
    assert "other words" not in response.text
    assert ("Retry-After" in response.headers) == (status == 503)


async def test_json_error_is_not_changed(application: Application) -> None:
    """Errors in JSON, and successful answers in plain text, are not changed."""
    application.answer = answering(404, [(b"content-type", b"application/json; charset=utf-8")], b'{"a": 1}')
    async with caller(application) as edge:
        assert (await edge.get("/nothing")).json() == {"a": 1}
        application.answer = answering(200, TEXT, b"hello")
        assert (await edge.get("/health")).text == "hello"


@pytest.mark.parametrize(
    ("allow", "named"), [(b"GET", "GET, HEAD"), (b"POST", "POST"), (b"POST, GET", "GET, HEAD, POST")]
)
async def test_allow_contains_head(application: Application, allow: bytes, named: str) -> None:
    """`Allow` contains HEAD where it contains GET."""
    application.answer = answering(405, [*TEXT, (b"allow", allow)], b"no")
    async with caller(application) as edge:
        response = await edge.delete("/health")
    assert error_of(response)[:2] == (405, "METHOD_NOT_ALLOWED")
    assert response.headers["Allow"] == named


async def test_unknown_exception_is_answered(
    application: Application, caplog: pytest.LogCaptureFixture
) -> None:
    """An unknown exception gives 500 without its message; the log has one traceback with the request id."""
    application.answer = raising(ZeroDivisionError("private words"))
    async with caller(application) as edge:
        response = await edge.get("/health", headers={"X-Request-ID": "request-17"})
    assert error_of(response) == (500, "INTERNAL_ERROR", "something went wrong on our side")
    [record] = [record for record in caplog.records if record.exc_info]
    assert "request-17" in record.getMessage()


async def test_known_exception_is_answered_by_the_table(application: Application) -> None:
    """One of our exceptions gives its code; a Failure also its headers."""
    async with caller(application) as edge:
        application.answer = raising(StorageUnavailable("the object store does not answer"))
        assert error_of(await edge.post(PREDICT))[:2] == (502, "STORAGE_UNAVAILABLE")
        full = Failure("OVERLOADED", "full", retry_after_s=7)
        application.answer = raising(full)
        response = await edge.post(PREDICT)
    assert error_of(response) == (429, "OVERLOADED", "full")
    assert response.headers["Retry-After"] == "7"


async def test_exception_after_the_answer_has_started(
    application: Application, caplog: pytest.LogCaptureFixture
) -> None:
    """After the answer has started no second one is sent; the exception is logged and not raised."""
    application.answer = raising(ZeroDivisionError("a bug"), after=True)
    sent = await messages_of(gate_around(application), "GET")
    assert [message["type"] for message in sent] == ["http.response.start"]
    assert len([record for record in caplog.records if record.exc_info]) == 1


async def test_other_scopes_reach_the_application(application: Application) -> None:
    """Other scopes reach the application; lifespan turns the framework's redirects off."""
    router = SimpleNamespace(redirect_slashes=True)

    async def nothing(*_: object) -> Any:
        raise AssertionError("nothing is read or sent here")

    gate = gate_around(application)
    for scope in ({"type": "lifespan", "app": SimpleNamespace(router=router)}, {"type": "websocket"}):
        await gate(scope, nothing, nothing)
    assert [scope["type"] for scope in application.scopes] == ["lifespan", "websocket"]
    assert not router.redirect_slashes


# The log.


async def access_lines(
    application: Application, caplog: pytest.LogCaptureFixture, path: str, headers: dict[str, str]
) -> list[str]:
    """The log lines of a GET."""
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="gate"):
        async with caller(application, headers=headers, access="key") as edge:
            await edge.get(path)
    return [record.getMessage() for record in caplog.records]


async def test_each_request_is_logged(application: Application, caplog: pytest.LogCaptureFixture) -> None:
    """Each request has a log line; probes and scrapes only when they are refused."""
    [line] = await access_lines(application, caplog, "/api/v1/model/info", WITH_KEY | {"X-Request-ID": "r-1"})
    assert line.startswith("GET /api/v1/model/info 200 ")
    assert line.endswith(" request r-1")
    for path in (*PROBES, "/metrics"):
        assert await access_lines(application, caplog, path, WITH_KEY) == []
    [line] = await access_lines(application, caplog, "/metrics", {})
    assert line.startswith("GET /metrics 401 ")


async def test_path_cannot_forge_log_lines(
    application: Application, caplog: pytest.LogCaptureFixture
) -> None:
    """The logged path keeps its percent escapes, and is truncated if it is long."""
    forged = "/api/x%0d%0a2026-01-01%20forged%1b%5b2K%e2%80%ae%20200"
    [line] = await access_lines(application, caplog, forged, {})
    assert f"GET {forged} 401 " in line
    [line] = await access_lines(application, caplog, f"/{'x' * 5000}", WITH_KEY)
    assert len(line) < 300
