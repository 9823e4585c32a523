"""What a stranger may do to the server's connections: endless heads, silence, crowds, and other protocols."""

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
"""On top of a timeout, for a slow machine."""
FEW = 16
"""MAX_CONNECTIONS of the small server."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """A server of one API worker, which holds few connections."""
    few = {"API_WORKERS": "1", "MAX_CONNECTIONS": str(FEW)}
    with local_server(tmp_path_factory.mktemp("small"), few) as running:
        yield running


def connect(server: LocalServer, timeout_s: float = 60.0) -> socket.socket:
    address = urlsplit(server.url)
    return socket.create_connection((address.hostname, address.port), timeout=timeout_s)


def read_to_end(connection: socket.socket) -> bytes:
    """All that comes until the server closes; the socket's timeout bounds it."""
    answer = b""
    try:
        while piece := connection.recv(65536):
            answer += piece
    except ConnectionResetError:
        pass  # closed while we were sending
    return answer


def error_in(answer: bytes) -> tuple[int, str]:
    """Status and code of an error, read off the wire; checks its body, its request id and its close."""
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
    """What the server says to these bytes, after which it closes."""
    with connect(server) as connection:
        connection.sendall(request)
        return error_in(read_to_end(connection))


def is_open(connection: socket.socket) -> bool:
    """Has the server not closed it; what it has sent is read and dropped."""
    connection.setblocking(False)  # noqa: FBT003 - the library's own order
    try:
        while connection.recv(65536):
            pass
    except BlockingIOError:
        return True
    except ConnectionResetError:
        return False
    return False


def send_until_closed(connection: socket.socket, block: bytes) -> None:
    """Send `block` again and again until the server has closed."""
    until_s = time.monotonic() + SLACK_S
    try:
        while True:
            connection.sendall(block)
            assert time.monotonic() < until_s
    except (ConnectionResetError, BrokenPipeError):
        pass  # it has


def resident_mb(server: LocalServer) -> float:
    """The memory of the API workers together."""
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
def test_refused_before_it_is_read(server: LocalServer, case: str) -> None:
    """What is no bounded HTTP/1.1 request gets a status that says so, our error body, and the end."""
    request, status, code = REFUSED[case]
    assert refusal_of(server, request) == (status, code)


def test_largest_head_is_taken(server: LocalServer) -> None:
    """A head of the most headers and bytes is fine, and so is the longest URL."""
    url = "/health?" + "x" * (MAX_URL_BYTES - len("/health?"))
    own = [("Host", "test"), ("Connection", "close")]
    filler = [(f"x-{number:02}", "") for number in range(MAX_HEADERS - len(own))]
    free = MAX_HEAD_BYTES - len(url) - sum(len(name) + len(value) for name, value in [*own, *filler])
    filler[-1] = (filler[-1][0], "y" * free)
    with connect(server) as connection:
        lines = [f"GET {url} HTTP/1.1", *(f"{name}: {value}" for name, value in [*own, *filler]), "", ""]
        connection.sendall("\r\n".join(lines).encode())
        assert read_to_end(connection).startswith(b"HTTP/1.1 200 ")


def test_request_id_of_a_refusal(server: LocalServer) -> None:
    """The caller's own request id is taken where it came before what is too much."""
    with connect(server) as connection:
        connection.sendall(HEAD + b"X-Request-ID: mine-1\r\n" + b"x: " + b"y" * MAX_HEAD_BYTES + b"\r\n\r\n")
        assert b"x-request-id: mine-1\r\n" in read_to_end(connection)


@pytest.mark.parametrize("trailers", [False, True])
def test_endless_headers_cost_nothing(server: LocalServer, *, trailers: bool) -> None:
    """Headers without an end are refused before the worker grows, before a body and after it."""
    start = HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n" if trailers else HEAD
    before_mb = resident_mb(server)
    with connect(server) as connection:
        connection.sendall(start)
        send_until_closed(connection, SMALL_HEADERS)
    assert resident_mb(server) - before_mb < 32


def test_endless_header_gets_its_answer(server: LocalServer) -> None:
    """A caller that is refused while it still sends can read why."""
    with connect(server) as connection:
        connection.sendall(HEAD + SMALL_HEADERS * 4)
        assert error_in(read_to_end(connection)) == (431, "HEADERS_TOO_LARGE")


def test_pipelined_requests(server: LocalServer) -> None:
    """Of requests that are sent before the first one's answer the first is answered, and then it closes."""
    with connect(server) as connection:
        connection.sendall((HEAD + b"\r\n") * 1000)
        answer = read_to_end(connection)
    assert answer.count(b"HTTP/1.1 200 ") == 1
    assert b"connection: close" in answer


def check_head_that_does_not_come(server: LocalServer, *, begun: bytes, status: bytes) -> None:
    """A head that stops coming is a 408 after some seconds; a connection that says nothing is just closed."""
    with connect(server, HEAD_TIMEOUT_S + SLACK_S) as connection:
        connection.sendall(begun)
        answer = read_to_end(connection)
    assert answer.startswith(status)
    assert bool(answer) == bool(status)


def check_head_that_drips(server: LocalServer) -> None:
    """Sending a little now and then, after an answer too, does not keep a connection."""
    until_s = time.monotonic() + HEAD_TIMEOUT_S + SLACK_S
    with connect(server) as fresh, connect(server) as kept:
        kept.sendall(HEAD + b"\r\n")
        assert kept.recv(65536).startswith(b"HTTP/1.1 200 ")
        for connection in (fresh, kept):
            connection.sendall(HEAD)
        while is_open(fresh) or is_open(kept):
            assert time.monotonic() < until_s
            for connection in (fresh, kept):
                with suppress(OSError):  # nothing to read yet, or closed
                    connection.sendall(b"x: y\r\n")
                    connection.recv(65536)
            time.sleep(1.0)


def check_body_that_goes_on_after_the_answer(server: LocalServer) -> None:
    """A body that still comes after its refusal does not keep the connection either."""
    with connect(server, HEAD_TIMEOUT_S + SLACK_S) as connection:
        connection.sendall(
            f"POST {PREDICT} HTTP/1.1\r\nHost: test\r\nContent-Length: 1000000\r\n\r\n".encode()
        )
        assert connection.recv(65536).startswith(b"HTTP/1.1 401 ")
        until_s = time.monotonic() + HEAD_TIMEOUT_S + SLACK_S
        while is_open(connection):
            assert time.monotonic() < until_s
            with suppress(BrokenPipeError, ConnectionResetError):  # closed since
                connection.send(b" ")
            time.sleep(0.5)


def reader_of_nothing(server: LocalServer) -> socket.socket:
    """A caller that asks for a megabyte again and again, and reads nothing.

    Between its requests it waits, since a pipelined one would be the last; the kernel holds some four.
    """
    address = urlsplit(server.url)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((address.hostname, address.port))
    for _ in range(6):
        connection.sendall(b"GET /static_content/swagger-ui-bundle.js HTTP/1.1\r\nHost: test\r\n\r\n")
        time.sleep(1.0)
    return connection


def check_answer_that_nobody_takes(server: LocalServer) -> None:
    """A caller that asks for much and reads nothing is cut off."""
    with reader_of_nothing(server) as connection:
        ours = connection.getsockname()[1]

        def is_held() -> bool:
            return any(
                held.raddr[1:] == (ours,) and held.status == psutil.CONN_ESTABLISHED
                for worker in children_of(server, API_WORKER)
                for held in worker.net_connections("tcp")
            )

        wait_for(is_held, bool)
        wait_for(is_held, lambda held: not held, ANSWER_TIMEOUT_S + SLACK_S)


LONG_WAITS: dict[str, Callable[[LocalServer], None]] = {
    "answer that nobody takes": check_answer_that_nobody_takes,
    "head": partial(check_head_that_does_not_come, begun=HEAD, status=b"HTTP/1.1 408 "),
    "silence": partial(check_head_that_does_not_come, begun=b"", status=b""),
    "blank": partial(check_head_that_does_not_come, begun=b"\r\n", status=b""),
    "head that drips": check_head_that_drips,
    "body that goes on after the answer": check_body_that_goes_on_after_the_answer,
}
"""Each takes one of the server's time-outs, of 10 to 30 s."""


@pytest.fixture(scope="module")
def long_waits(server: LocalServer) -> Iterator[dict[str, Future[None]]]:
    """All of `LONG_WAITS`, begun at once."""
    with ThreadPoolExecutor(len(LONG_WAITS)) as callers:
        yield {case: callers.submit(check, server) for case, check in LONG_WAITS.items()}


@pytest.mark.parametrize("case", LONG_WAITS)
def test_wait_for_a_caller_ends(long_waits: dict[str, Future[None]], case: str) -> None:
    """Who sends too little, or takes nothing, keeps no connection."""
    long_waits[case].result()


def test_other_upgrade_is_left_alone(server: LocalServer) -> None:
    """A client that offers HTTP/2 beside its request, as curl does, gets its answer over HTTP/1.1."""
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n"
    with connect(server, SLACK_S) as connection:
        connection.sendall(HEAD + offer)
        answer = read_to_end(connection)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"connection: close" in answer


def test_crowd_makes_room(small: LocalServer) -> None:
    """Where silent connections fill the server, each new one closes the oldest, and callers get in."""
    with Edge(small) as edge, ExitStack() as crowd:
        key = edge.upload(png_bytes(scene(100).image))
        silent = [crowd.enter_context(connect(small)) for _ in range(3 * FEW)]
        assert edge.ask(key, "circle").status_code == httpx.codes.OK
        wait_for(lambda: sum(map(is_open, silent)), lambda still: still < FEW)
        assert is_open(silent[-1])
        assert not is_open(silent[0])


def test_work_is_not_cut_for_a_crowd(small: LocalServer) -> None:
    """A crowd that comes while a request is worked on closes only connections that wait for their caller."""
    with Edge(small) as edge, ExitStack() as crowd:
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
                crowd.enter_context(connect(small))
            assert read_to_end(connection).startswith(b"HTTP/1.1 200 ")


def test_crowd_in_the_thousands(tmp_path: Path) -> None:
    """A caller gets in beside 2,500 silent connections, where a process may open 1,024 files unasked."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        with ExitStack() as crowd:
            running = crowd.enter_context(local_server(tmp_path / "server"))
            resource.setrlimit(resource.RLIMIT_NOFILE, (allow_open_files(4096), hard))
            for _ in range(2500):
                crowd.enter_context(connect(running))
            with Edge(running) as edge:
                assert edge.ask(scene(100).image, "circle").status_code == httpx.codes.OK
            assert "too many open files" not in running.log_path.read_text().lower()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_stop_does_not_wait_for_strangers(tmp_path: Path) -> None:
    """Silent and half-sent connections, and answers that nobody reads, hardly hold up the end."""
    with ExitStack() as crowd:
        with local_server(tmp_path / "server") as running:
            for begun in (b"", HEAD, HEAD + b"Transfer-Encoding: chunked\r\n\r\n"):
                crowd.enter_context(connect(running)).sendall(begun)
            crowd.enter_context(reader_of_nothing(running))
            stopping_s = time.monotonic()
        assert time.monotonic() - stopping_s < ANSWER_TIMEOUT_S
