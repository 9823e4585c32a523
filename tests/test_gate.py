"""Common to every path, including BentoML's: the error body, the request id, methods, encodings."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from uuid import uuid4

import httpx
import pytest

from tests import new_connection
from tests.edge import BATCH, PREDICT, error_of, wait_for

if TYPE_CHECKING:
    from commands.local_server import LocalServer
    from tests.edge import Edge

pytestmark = pytest.mark.server

INFO = "/api/v1/model/info"
SERVED = {
    **dict.fromkeys(("/", "/docs.json", "/health", "/livez", "/healthz", "/readyz", "/metrics"), "GET, HEAD"),
    **dict.fromkeys((INFO, "/schema.json", "/static_content/swagger-ui.css"), "GET, HEAD"),
    **dict.fromkeys(("/playground", "/playground/app.js"), "GET, HEAD"),
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
    new_connection.get(f"{edge.server.url}{forged}")
    [line] = lines_with(edge, mark)
    assert f"GET {forged} 401 " in line
    assert line.isascii()
    assert line.isprintable()
