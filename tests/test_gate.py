"""Common to every path, including BentoML's: the error body, the request id, methods, encodings."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from uuid import uuid4

import httpx
import pytest

from tests.edge import BATCH, PREDICT, error_of, wait_for
from tests.server_processes import started_server

if TYPE_CHECKING:
    from pathlib import Path

    from commands.local_server import LocalServer
    from tests.edge import Edge

pytestmark = pytest.mark.server

INFO = "/api/v1/model/info"
JSON = {"Content-Type": "application/json"}
SERVED = {
    **dict.fromkeys(("/", "/docs.json", "/health", "/livez", "/healthz", "/readyz", "/metrics"), "GET, HEAD"),
    **dict.fromkeys((INFO, "/schema.json", "/static_content/swagger-ui.css"), "GET, HEAD"),
    **dict.fromkeys((PREDICT, BATCH), "POST"),
}
"""Every served path, and its methods."""


@pytest.mark.parametrize(
    "path",
    [
        *("/nothing", "/favicon.ico", "/api", "/api/", "/api/v1", "/api/v1/anything", "/api/v1/%0ax"),
        *("/health/", "/livez/", f"{PREDICT}/", f"/{INFO}", "/%2e%2e/etc/passwd", "/%ff%00", "/a%20b"),
        *("/static_content", "/static_content/nothing", "/static_content/%00", "/static_content/%2e%2e/x"),
        f"/static_content/{'x' * 5000}",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "DELETE"])
def test_unknown_path_is_not_found(edge: Edge, method: str, path: str) -> None:
    """An unknown path gives 404 with our error body, and is never redirected."""
    response = edge.http.request(method, path)
    if path.startswith("/static_content/") and method != "GET":
        assert error_of(response)[:2] == (405, "METHOD_NOT_ALLOWED")
    else:
        assert error_of(response)[:2] == (404, "NOT_FOUND")


@pytest.mark.parametrize("path", SERVED)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"])
def test_wrong_method_gives_405_with_allow(edge: Edge, method: str, path: str) -> None:
    """A method that a path does not support gives 405, and Allow lists the supported ones."""
    if method in SERVED[path]:
        return
    response = edge.http.request(method, path)
    assert error_of(response)[:2] == (405, "METHOD_NOT_ALLOWED")
    assert response.headers["Allow"] == SERVED[path]


@pytest.mark.parametrize("path", [path for path, methods in SERVED.items() if "GET" in methods])
def test_head_is_get_without_a_body(edge: Edge, path: str) -> None:
    """HEAD works wherever GET does, with the same status and content type."""
    got, head = edge.http.get(path), edge.http.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["Content-Type"] == got.headers["Content-Type"]
    assert int(head.headers["Content-Length"]) > 0
    assert httpx.head(f"{edge.server.url}{PREDICT}").status_code == httpx.codes.UNAUTHORIZED
    assert edge.http.head("/nothing").status_code == httpx.codes.NOT_FOUND


def test_connection_stays_open_after_head(server: LocalServer) -> None:
    """A caller can send its next request immediately after the answer to HEAD."""
    request = b"HEAD /static_content/swagger-ui.css HTTP/1.1\r\nHost: a\r\n\r\n"
    address = urlsplit(server.url)
    with socket.create_connection((str(address.hostname), address.port or 0), timeout=30) as connection:
        for _ in range(200):
            connection.sendall(request)
            answer = b""
            while not answer.endswith(b"\r\n\r\n"):
                piece = connection.recv(4096)
                assert piece, "the server closed the connection"
                answer += piece
            assert answer.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("path", [*SERVED, "/nothing", "/api/v1/%0ax"])
def test_every_answer_has_the_request_id(edge: Edge, path: str) -> None:
    """Every path echoes the caller's request id, or generates one if it is missing."""
    given = str(uuid4())
    assert edge.http.get(path, headers={"X-Request-ID": given}).headers["X-Request-ID"] == given
    assert edge.http.get(path).headers["X-Request-ID"]


def test_readyz_uses_our_error_body(tmp_path: Path) -> None:
    """While the weights load, /readyz gives 503 with our error body and Retry-After."""
    with started_server(tmp_path, {"API_WORKERS": "1"}) as (server, _process), httpx.Client() as client:
        while True:
            try:
                response = client.get(f"{server.url}/readyz")
                break
            except httpx.TransportError:
                pass  # not listening yet
        assert error_of(response)[:2] == (503, "MODEL_NOT_LOADED")
        assert response.headers["Retry-After"] == "2"


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "zstd", "gzip, identity", "x", "identity, br"])
def test_encoded_body_is_refused(edge: Edge, encoding: str) -> None:
    """A body with a Content-Encoding gives 415 on every route, and is not read as plain JSON."""
    for path in (PREDICT, BATCH):
        response = edge.http.post(path, content=b"{}", headers={**JSON, "Content-Encoding": encoding})
        status, code, message = error_of(response)
        assert (status, code) == (415, "UNSUPPORTED_MEDIA_TYPE")
        assert "Content-Encoding" in message
        assert response.headers["Accept-Encoding"] == "identity"


def test_transfer_encoding_other_than_chunked_is_refused(edge: Edge) -> None:
    """A Transfer-Encoding other than chunked gives 415."""
    address = urlsplit(edge.server.url)
    head = (
        *(f"POST {PREDICT} HTTP/1.1", "Host: test", f"X-API-Key: {edge.server.api_key}"),
        *("Transfer-Encoding: gzip, chunked", "Connection: close", "", "0", "", ""),
    )
    with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
        connection.sendall("\r\n".join(head).encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 415 ")
    assert b"Transfer-Encoding" in answer


def test_identity_encoding_is_accepted(edge: Edge) -> None:
    """A body with Content-Encoding: identity is read as plain JSON."""
    for value in ("identity", "Identity", ""):
        response = edge.http.post(PREDICT, content=b"{}", headers={**JSON, "Content-Encoding": value})
        assert error_of(response)[:2] == (400, "INVALID_REQUEST")


SENTENCES: dict[str, tuple[bytes, str]] = {
    "half a pair in a name": (
        b'{"\\ud800": 1}',
        "the body: the name of a field holds half of a surrogate pair (U+D800)",
    ),
    "broken off": (
        b'{"image_url": "a',
        "the body: is not JSON: Unterminated string starting at (character 14)",
    ),
    "two values": (b"{} {}", "the body: is not JSON: Extra data (character 3)"),
    "not UTF-8": (b'{"image_url": "\xff"}', "the body: is not UTF-8 (byte 15)"),
    "too deep": (b"[" * 60_000, "the body: is nested too deeply"),
    "a number of 5,000 digits": (b"[" + b"9" * 5000 + b"]", "the body: holds a number of too many digits"),
    "no object": (b"[]", "the body: must be a JSON object, sent with Content-Type: application/json"),
    "NaN": (b"NaN", "the body: must be a JSON object, sent with Content-Type: application/json"),
}


@pytest.mark.parametrize("case", SENTENCES)
def test_error_describes_the_unreadable_body(edge: Edge, case: str) -> None:
    """The error names the fault of an unreadable body, without repeating its content."""
    content, sentence = SENTENCES[case]
    response = edge.http.post(PREDICT, content=content, headers=JSON)
    assert error_of(response) == (400, "INVALID_REQUEST", sentence)


@pytest.mark.parametrize("field", ["image_url", "user_id", "task_id"])
def test_lone_surrogate_is_refused(edge: Edge, field: str) -> None:
    """A lone surrogate in any field is refused; the error names its code point."""
    body = edge.body("uploads/user-1/none", "circle") | {field: "\udc00"}
    response = edge.http.post(PREDICT, content=json.dumps(body), headers=JSON)
    assert error_of(response)[2] == f"{field}: holds half of a surrogate pair (U+DC00)"


def test_long_name_of_an_unknown_field_is_truncated(edge: Edge) -> None:
    """The error does not repeat a field's name of 50,000 characters completely."""
    body = edge.body("uploads/user-1/none", "circle") | {"k" * 50_000: 1}
    status, _, message = error_of(edge.http.post(PREDICT, json=body))
    assert status == httpx.codes.BAD_REQUEST
    assert message.startswith("kkk")
    assert len(message) < 200


def test_byte_order_mark_is_ignored(edge: Edge) -> None:
    """A byte order mark before the JSON is ignored."""
    body = b"\xef\xbb\xbf" + json.dumps(edge.body("uploads/user-1/none", "circle")).encode()
    assert error_of(edge.http.post(PREDICT, content=body, headers=JSON))[:2] == (404, "IMAGE_NOT_FOUND")


def lines_with(edge: Edge, mark: str) -> list[str]:
    """Wait for lines of the server's log that contain `mark`; bytes beyond ASCII are surrogates."""

    def read() -> list[str]:
        log = edge.server.log_path.read_bytes().decode("ascii", "surrogateescape")
        return [line for line in log.split("\n") if mark in line]

    return wait_for(read, bool)


def test_path_cannot_forge_log_lines(edge: Edge) -> None:
    """A path with line breaks and terminal commands is logged in one line, with its percent escapes."""
    mark = uuid4().hex
    forged = f"/api/{mark}%0d%0a2026-01-01T00:00:00+0000%20forged{mark}%1b%5b2K%e2%80%ae%20200"
    httpx.get(f"{edge.server.url}{forged}")
    [line] = lines_with(edge, mark)
    assert f"GET {forged} 401 " in line
    assert line.isascii()
    assert line.isprintable()


def test_long_path_is_truncated_in_the_log(edge: Edge) -> None:
    """A path of 5,000 characters makes a line of the usual length."""
    mark = uuid4().hex
    edge.http.get(f"/{mark}/{'x' * 5_000}")
    [line] = lines_with(edge, mark)
    assert len(line) < 600
