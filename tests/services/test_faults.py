"""Each fault of the proxy works, and without a fault the proxy changes nothing."""

from __future__ import annotations

import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.services.faults import FaultProxy, fault_proxy
from tests.services.processes import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

BODY = b"0123456789" * 100


class Target(ThreadingHTTPServer):
    """Answers BODY, or the request's body, and records the requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[tuple[str, str, str]] = []  # method, path, Host


class _Handler(BaseHTTPRequestHandler):
    server: Target

    def _answer(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.command, self.path, self.headers["Host"]))
        body = sent or BODY
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Kept", "yes")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_HEAD = _answer  # noqa: N815 - http.server's names

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
        """Log nothing."""


@pytest.fixture
def target() -> Iterator[Target]:
    server = Target()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def proxy(target: Target) -> Iterator[FaultProxy]:
    with fault_proxy(f"http://127.0.0.1:{target.server_port}/base") as proxy:
        yield proxy


@pytest.fixture
def client(proxy: FaultProxy) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=proxy.url, timeout=10.0) as client:
        yield client


def test_everything_passes_unchanged(proxy: FaultProxy, target: Target, client: httpx.Client) -> None:
    """Method, path, query, Host, bodies and headers pass, over one connection, and are recorded."""
    assert client.get("/a%20b?x=%2F").content == BODY
    assert client.put("/c", content=iter([b"in", b" chunks"])).content == b"in chunks"
    head = client.head("/d")
    assert (head.headers["Content-Length"], head.headers["X-Kept"]) == ("1000", "yes")
    host = proxy.url.split("/")[2]
    paths = [("GET", "/base/a%20b?x=%2F"), ("PUT", "/base/c"), ("HEAD", "/base/d")]
    assert target.requests == [(method, path, host) for method, path in paths]
    assert [(seen.method, seen.path, seen.status) for seen in proxy.requests] == [
        (method, path, 200) for method, path in paths
    ]
    assert proxy.requests[1].body == b"in chunks"
    assert (proxy.connections_made, proxy.connections_open) == (1, 1)


def test_failure_is_answered_instead_of_the_target(
    proxy: FaultProxy, target: Target, client: httpx.Client
) -> None:
    """The given number of requests that match the predicate fail, and the target gets none of them."""
    proxy.fail_next(
        2, status=429, body=b"slow down", headers={"Retry-After": "1"}, when=lambda seen: seen.method == "PUT"
    )
    assert client.get("/").status_code == 200
    for _ in range(2):
        answer = client.put("/", content=b"x")
        assert (answer.status_code, answer.content, answer.headers["Retry-After"]) == (429, b"slow down", "1")
    assert client.put("/", content=b"x").status_code == 200
    assert [method for method, _, _ in target.requests] == ["GET", "PUT"]


def test_faults_apply_in_the_order_of_their_addition(proxy: FaultProxy, client: httpx.Client) -> None:
    """The fault that was added first affects the first request."""
    proxy.fail_next(status=500)
    proxy.fail_next(status=503)
    assert [client.get("/").status_code for _ in range(3)] == [500, 503, 200]


def test_cut_request_does_not_reach_the_target(
    proxy: FaultProxy, target: Target, client: httpx.Client
) -> None:
    """A cut request gets no answer, and the target does not get it."""
    proxy.cut_next()
    with pytest.raises(httpx.RemoteProtocolError):
        client.put("/", content=b"x")
    assert (target.requests, proxy.requests[0].status) == ([], None)


def test_body_is_cut_after_the_given_bytes(proxy: FaultProxy, client: httpx.Client) -> None:
    """The given number of bytes arrives, and then the connection ends."""
    proxy.cut_next(after_bytes=300)
    with client.stream("GET", "/") as answer:
        got: list[bytes] = []
        with pytest.raises(httpx.RemoteProtocolError):
            got.extend(answer.iter_raw(1))
    assert len(got) == 300


def test_request_with_lost_answer_reaches_the_target(
    proxy: FaultProxy, target: Target, client: httpx.Client
) -> None:
    """The target does the request, but the client gets no answer."""
    proxy.lose_answer_next()
    with pytest.raises(httpx.RemoteProtocolError):
        client.put("/", content=b"x")
    assert len(target.requests) == 1


@pytest.mark.parametrize("extra_bytes", [1, 500])
def test_too_large_content_length_fails(proxy: FaultProxy, client: httpx.Client, extra_bytes: int) -> None:
    """A body that is shorter than Content-Length is an error for the client."""
    proxy.wrong_length_next(extra_bytes=extra_bytes)
    with pytest.raises(httpx.RemoteProtocolError):
        client.get("/")


def test_too_small_content_length_truncates(proxy: FaultProxy, client: httpx.Client) -> None:
    """A body that is longer than Content-Length is truncated."""
    proxy.wrong_length_next(extra_bytes=-1)
    assert client.get("/").content == BODY[:-1]


def test_slow_body_is_limited_to_its_rate(proxy: FaultProxy, client: httpx.Client) -> None:
    """1,000 bytes at 4,000 bytes/s take at least 0.24 s, and arrive completely."""
    proxy.slow_next(bytes_per_s=4000)
    started_s = time.monotonic()
    assert client.get("/").content == BODY
    assert time.monotonic() - started_s >= 0.24


def test_hanging_request_ends_with_its_client(proxy: FaultProxy, client: httpx.Client) -> None:
    """When the client times out, its connection no longer counts as open."""
    proxy.hang_next()
    with pytest.raises(httpx.ReadTimeout):
        client.get("/", timeout=0.05)
    wait_until(lambda: proxy.connections_open == 0, timeout_s=10.0)
    assert client.get("/").status_code == 200


def test_heal_ends_hanging_requests(proxy: FaultProxy) -> None:
    """`heal` closes the connections of hanging requests, and removes the remaining faults."""
    proxy.hang_next(9)
    ends: list[type[Exception]] = []

    def request() -> None:
        try:
            httpx.get(proxy.url, timeout=20.0)
        except httpx.TransportError as error:
            ends.append(type(error))

    threads = [threading.Thread(target=request) for _ in range(3)]
    for thread in threads:
        thread.start()
    proxy.wait_for_requests(3)
    assert (proxy.connections_open, proxy.max_connections_open) == (3, 3)
    proxy.heal()
    for thread in threads:
        thread.join()
    assert ends == [httpx.RemoteProtocolError] * 3
    assert httpx.get(proxy.url).status_code == 200


def test_missing_target_closes_the_connection(target: Target) -> None:
    """If the target is down, the proxy closes the connection without an answer."""
    port = target.server_port
    target.server_close()
    with fault_proxy(f"http://127.0.0.1:{port}") as proxy, pytest.raises(httpx.RemoteProtocolError):
        httpx.get(proxy.url)
