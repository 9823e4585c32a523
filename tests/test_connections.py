"""Limits of connections: endless heads, idle connections, many connections, and other protocols."""

from __future__ import annotations

import json
import resource
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from commands.local_server import LocalServer, local_server
from connections import (
    ANSWER_TIMEOUT_S,
    HEAD_TIMEOUT_S,
    MAX_HEAD_BYTES,
    MAX_HEADERS,
    MAX_URL_BYTES,
    allow_open_files,
)
from tests.drawn import scene
from tests.edge import PREDICT, Edge, png_bytes, wait_for
from tests.server_processes import API_WORKER, children_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future
    from pathlib import Path

pytestmark = pytest.mark.server

HEAD = b"GET /health HTTP/1.1\r\nHost: test\r\n"
SMALL_HEADERS = b"".join(b"x-%d: y\r\n" % number for number in range(50_000))
SLACK_S = 20.0
"""Added to a timeout, for a slow machine."""
FEW = 16
"""MAX_CONNECTIONS of the small server."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """A server with one API worker and a low MAX_CONNECTIONS."""
    few = {"API_WORKERS": "1", "MAX_CONNECTIONS": str(FEW)}
    with local_server(tmp_path_factory.mktemp("small"), few) as running:
        yield running


def connect(server: LocalServer, timeout_s: float = 60.0) -> socket.socket:
    address = urlsplit(server.url)
    return socket.create_connection((address.hostname, address.port), timeout=timeout_s)


def read_to_end(connection: socket.socket) -> bytes:
    """Read until the server closes; the socket's timeout limits it."""
    answer = b""
    try:
        while piece := connection.recv(65536):
            answer += piece
    except ConnectionResetError:
        pass  # closed while we sent
    return answer


def error_in(answer: bytes) -> tuple[int, str]:
    """Status and code of a raw error; checks its body, its request id and `connection: close`."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    document = json.loads(body)
    assert set(document) == {"error", "request_id"}
    assert document["request_id"] == headers["x-request-id"]
    assert headers["content-type"] == "application/json"
    assert headers["connection"] == "close"
    return int(status.split()[1]), document["error"]["code"]


def refusal_of(server: LocalServer, request: bytes) -> tuple[int, str]:
    """Send these bytes; returns status and code of the error, after which the server closes."""
    with connect(server) as connection:
        connection.sendall(request)
        return error_in(read_to_end(connection))


def is_open(connection: socket.socket) -> bool:
    """Whether the server has not closed the connection; discards received bytes."""
    connection.setblocking(False)  # noqa: FBT003 - the library's signature
    try:
        while connection.recv(65536):
            pass
    except BlockingIOError:
        return True
    except ConnectionResetError:
        return False
    return False


def send_until_closed(connection: socket.socket, block: bytes) -> None:
    """Send `block` repeatedly until the server closes."""
    until_s = time.monotonic() + SLACK_S
    try:
        while True:
            connection.sendall(block)
            assert time.monotonic() < until_s
    except (ConnectionResetError, BrokenPipeError):
        pass  # the server has closed


def resident_mb(server: LocalServer) -> float:
    """Total resident memory of the API workers."""
    return sum(worker.memory_info().rss for worker in children_of(server, API_WORKER)) / 2**20


REFUSED = {
    "one header too many": (HEAD + b"x: y\r\n" * MAX_HEADERS + b"\r\n", 431, "HEADERS_TOO_LARGE"),
    "long header": (HEAD + b"x: " + b"y" * MAX_HEAD_BYTES + b"\r\n\r\n", 431, "HEADERS_TOO_LARGE"),
    "header without an end": (HEAD + b"x: " + b"y" * 2 * MAX_HEAD_BYTES, 431, "HEADERS_TOO_LARGE"),
    "name without an end": (HEAD + b"y" * 2 * MAX_HEAD_BYTES, 431, "HEADERS_TOO_LARGE"),
    "line ends without an end": (b"\r\n" * MAX_HEAD_BYTES, 431, "HEADERS_TOO_LARGE"),
    "long URL": (b"GET /" + b"x" * MAX_URL_BYTES + b" HTTP/1.1\r\nHost: test\r\n\r\n", 414, "URL_TOO_LONG"),
    "URL without an end": (b"GET /" + b"x" * MAX_URL_BYTES, 414, "URL_TOO_LONG"),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "INVALID_REQUEST"),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "INVALID_REQUEST"),
    "a proxy's request": (b"CONNECT example.com:443 HTTP/1.1\r\nHost: test\r\n\r\n", 400, "INVALID_REQUEST"),
    "two lengths": (
        HEAD.replace(b"GET", b"POST") + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
        *(400, "INVALID_REQUEST"),
    ),
    "WebSocket": (
        HEAD + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        *(400, "INVALID_REQUEST"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_invalid_or_too_large_head_is_refused(server: LocalServer, case: str) -> None:
    """Anything but HTTP/1.1 within the limits gets a status and our error body, and the connection ends."""
    request, status, code = REFUSED[case]
    assert refusal_of(server, request) == (status, code)


def test_largest_head_is_accepted(server: LocalServer) -> None:
    """A head with the maximum number of headers and bytes, and the longest URL, is accepted."""
    url = "/health?" + "x" * (MAX_URL_BYTES - len("/health?"))
    own = [("Host", "test"), ("Connection", "close")]
    filler = [(f"x-{number:02}", "") for number in range(MAX_HEADERS - len(own))]
    free = MAX_HEAD_BYTES - len(url) - sum(len(name) + len(value) for name, value in [*own, *filler])
    filler[-1] = (filler[-1][0], "y" * free)
    with connect(server) as connection:
        lines = [f"GET {url} HTTP/1.1", *(f"{name}: {value}" for name, value in [*own, *filler]), "", ""]
        connection.sendall("\r\n".join(lines).encode())
        assert read_to_end(connection).startswith(b"HTTP/1.1 200 ")


def test_refusal_has_the_callers_request_id(server: LocalServer) -> None:
    """A refusal has the caller's request id, if that arrived before the limit."""
    with connect(server) as connection:
        connection.sendall(HEAD + b"X-Request-ID: mine-1\r\n" + b"x: " + b"y" * MAX_HEAD_BYTES + b"\r\n\r\n")
        assert b"x-request-id: mine-1\r\n" in read_to_end(connection)


@pytest.mark.parametrize("trailers", [False, True])
def test_endless_headers_take_no_memory(server: LocalServer, *, trailers: bool) -> None:
    """Endless headers, or endless trailers after a body, are refused before the worker's memory grows."""
    start = HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n" if trailers else HEAD
    before_mb = resident_mb(server)
    with connect(server) as connection:
        connection.sendall(start)
        send_until_closed(connection, SMALL_HEADERS)
    assert resident_mb(server) - before_mb < 32


def test_caller_can_read_the_refusal_while_it_sends(server: LocalServer) -> None:
    """A caller that is refused while it still sends can read the error."""
    with connect(server) as connection:
        connection.sendall(HEAD + SMALL_HEADERS * 4)
        assert error_in(read_to_end(connection)) == (431, "HEADERS_TOO_LARGE")


def test_pipelined_requests_end_the_connection(server: LocalServer) -> None:
    """The first of several pipelined requests is answered; then the server closes the connection."""
    with connect(server) as connection:
        connection.sendall((HEAD + b"\r\n") * 1000)
        answer = read_to_end(connection)
    assert answer.count(b"HTTP/1.1 200 ") == 1
    assert b"connection: close" in answer


def check_incomplete_head(server: LocalServer, *, sent: bytes, status: bytes) -> None:
    """An incomplete head gets 408 after a timeout; an idle connection is closed without an answer."""
    with connect(server, HEAD_TIMEOUT_S + SLACK_S) as connection:
        connection.sendall(sent)
        answer = read_to_end(connection)
    assert answer.startswith(status)
    assert bool(answer) == bool(status)


def check_slow_head(server: LocalServer) -> None:
    """Sending a few bytes now and then does not keep a new connection open, nor one after an answer."""
    until_s = time.monotonic() + HEAD_TIMEOUT_S + SLACK_S
    with connect(server) as new, connect(server) as used:
        used.sendall(HEAD + b"\r\n")
        assert used.recv(65536).startswith(b"HTTP/1.1 200 ")
        for connection in (new, used):
            connection.sendall(HEAD)
        while is_open(new) or is_open(used):
            assert time.monotonic() < until_s
            for connection in (new, used):
                with suppress(OSError):  # nothing to read yet, or closed
                    connection.sendall(b"x: y\r\n")
                    connection.recv(65536)
            time.sleep(1.0)


def check_body_after_the_answer(server: LocalServer) -> None:
    """A body that is still sent after its refusal does not keep the connection open."""
    with connect(server, HEAD_TIMEOUT_S + SLACK_S) as connection:
        connection.sendall(
            f"POST {PREDICT} HTTP/1.1\r\nHost: test\r\nContent-Length: 1000000\r\n\r\n".encode()
        )
        assert connection.recv(65536).startswith(b"HTTP/1.1 401 ")
        until_s = time.monotonic() + HEAD_TIMEOUT_S + SLACK_S
        while is_open(connection):
            assert time.monotonic() < until_s
            with suppress(BrokenPipeError, ConnectionResetError):  # closed meanwhile
                connection.send(b" ")
            time.sleep(0.5)


def connect_without_reading(server: LocalServer) -> socket.socket:
    """A connection that requests a megabyte several times, and reads nothing.

    It waits between its requests, because a pipelined one would be the last. The kernel buffers about four.
    """
    address = urlsplit(server.url)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((address.hostname, address.port))
    for _ in range(6):
        connection.sendall(b"GET /static_content/swagger-ui-bundle.js HTTP/1.1\r\nHost: test\r\n\r\n")
        time.sleep(1.0)
    return connection


def check_unread_answer(server: LocalServer) -> None:
    """The connection of a caller that does not read its answers is closed."""
    with connect_without_reading(server) as connection:
        own_port = connection.getsockname()[1]

        def is_held() -> bool:
            return any(
                held.raddr[1:] == (own_port,) and held.status == psutil.CONN_ESTABLISHED
                for worker in children_of(server, API_WORKER)
                for held in worker.net_connections("tcp")
            )

        wait_for(is_held, bool)
        wait_for(is_held, lambda held: not held, ANSWER_TIMEOUT_S + SLACK_S)


TIMEOUTS: dict[str, Callable[[LocalServer], None]] = {
    "unread answer": check_unread_answer,
    "incomplete head": partial(check_incomplete_head, sent=HEAD, status=b"HTTP/1.1 408 "),
    "idle connection": partial(check_incomplete_head, sent=b"", status=b""),
    "blank line": partial(check_incomplete_head, sent=b"\r\n", status=b""),
    "slow head": check_slow_head,
    "body after the answer": check_body_after_the_answer,
}
"""Each takes one of the server's timeouts, of 10 to 30 s."""


@pytest.fixture(scope="module")
def timeouts(server: LocalServer) -> Iterator[dict[str, Future[None]]]:
    """All checks of `TIMEOUTS`, started at the same time."""
    with ThreadPoolExecutor(len(TIMEOUTS)) as callers:
        yield {case: callers.submit(check, server) for case, check in TIMEOUTS.items()}


@pytest.mark.parametrize("case", TIMEOUTS)
def test_slow_caller_times_out(timeouts: dict[str, Future[None]], case: str) -> None:
    """The server closes the connection of a caller that sends too slowly or does not read."""
    timeouts[case].result()


def test_offer_of_http2_is_ignored(server: LocalServer) -> None:
    """A client that offers HTTP/2 with its request, such as curl, gets its answer over HTTP/1.1."""
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n"
    with connect(server, SLACK_S) as connection:
        connection.sendall(HEAD + offer)
        answer = read_to_end(connection)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"connection: close" in answer


def test_new_connection_closes_the_oldest_idle_one(small: LocalServer) -> None:
    """If idle connections reach MAX_CONNECTIONS, each new one closes the oldest, and callers are served."""
    with Edge(small) as edge, ExitStack() as connections:
        key = edge.upload(png_bytes(scene(100).image))
        idle = [connections.enter_context(connect(small)) for _ in range(3 * FEW)]
        assert edge.ask(key, "circle").status_code == httpx.codes.OK
        wait_for(lambda: sum(map(is_open, idle)), lambda count: count < FEW)
        assert is_open(idle[-1])
        assert not is_open(idle[0])


def test_request_in_progress_is_not_closed_for_new_connections(small: LocalServer) -> None:
    """Many new connections during a request close only idle connections."""
    with Edge(small) as edge, ExitStack() as connections:
        body = edge.body(edge.upload(png_bytes(scene(100).image)), ["circle", "square", "star"] * 3)
        edge.insert_row(body)
        with connect(small) as connection:
            content = json.dumps(body).encode()
            lines = [
                "POST /api/v1/predict/batch HTTP/1.1",
                *("Host: test", f"X-API-Key: {small.api_key}", "Connection: close"),
                *("Content-Type: application/json", f"Content-Length: {len(content)}", "", ""),
            ]
            connection.sendall("\r\n".join(lines).encode() + content)
            wait_for(lambda: edge.row(body["task_id"]), lambda row: row and row.status != "pending")
            for _ in range(3 * FEW):
                connections.enter_context(connect(small))
            assert read_to_end(connection).startswith(b"HTTP/1.1 200 ")


def test_caller_is_served_beside_thousands_of_idle_connections(tmp_path: Path) -> None:
    """One worker serves a caller beside 2,500 idle connections, with a soft limit of 1,024 open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        with ExitStack() as connections:
            running = connections.enter_context(local_server(tmp_path / "server", {"API_WORKERS": "1"}))
            resource.setrlimit(resource.RLIMIT_NOFILE, (allow_open_files(4096), hard))
            for _ in range(2500):
                connections.enter_context(connect(running))
            with Edge(running) as edge:
                assert edge.ask(scene(100).image, "circle").status_code == httpx.codes.OK
            assert "too many open files" not in running.log_path.read_text().lower()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_stop_does_not_wait_for_slow_callers(tmp_path: Path) -> None:
    """Idle connections, incomplete requests and unread answers do not delay the stop."""
    with ExitStack() as connections:
        with local_server(tmp_path / "server", {"API_WORKERS": "1"}) as running:
            for sent in (b"", HEAD, HEAD + b"Transfer-Encoding: chunked\r\n\r\n"):
                connections.enter_context(connect(running)).sendall(sent)
            connections.enter_context(connect_without_reading(running))
            stopping_s = time.monotonic()
        assert time.monotonic() - stopping_s < ANSWER_TIMEOUT_S
