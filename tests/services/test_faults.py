"""The proxy's faults do what they say, and without one it changes nothing."""

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
    """Answers BODY, or what it was sent, and remembers who asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[tuple[str, str, str]] = []  # method, path, Host


class _Handler(BaseHTTPRequestHandler):
    server: Target

    def _answer(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append((self.command, self.path, self.headers["Host"]))
        body = sent or BODY
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Kept", "yes")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_HEAD = _answer  # noqa: N815 - http.server's names

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's names
        """Say nothing."""


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
    """Method, path, query, Host, bodies and headers go through, over one connection, and are remembered."""
    assert client.get("/a%20b?x=%2F").content == BODY
    assert client.put("/c", content=iter([b"in", b" chunks"])).content == b"in chunks"
    head = client.head("/d")
    assert (head.headers["Content-Length"], head.headers["X-Kept"]) == ("1000", "yes")
    host = proxy.url.split("/")[2]
    paths = [("GET", "/base/a%20b?x=%2F"), ("PUT", "/base/c"), ("HEAD", "/base/d")]
    assert target.asked == [(method, path, host) for method, path in paths]
    assert [(seen.method, seen.path, seen.status) for seen in proxy.requests] == [
        (method, path, 200) for method, path in paths
    ]
    assert proxy.requests[1].body == b"in chunks"
    assert (proxy.connections_made, proxy.connections_open) == (1, 1)


def test_failure_is_answered_in_the_targets_place(
    proxy: FaultProxy, target: Target, client: httpx.Client
) -> None:
    """The asked number of requests fail, those that the predicate means, and the target hears of none."""
    proxy.fail_next(
        2, status=429, body=b"slow down", headers={"Retry-After": "1"}, when=lambda seen: seen.method == "PUT"
    )
    assert client.get("/").status_code == 200
    for _ in range(2):
        answer = client.put("/", content=b"x")
        assert (answer.status_code, answer.content, answer.headers["Retry-After"]) == (429, b"slow down", "1")
    assert client.put("/", content=b"x").status_code == 200
    assert [method for method, _, _ in target.asked] == ["GET", "PUT"]


def test_faults_meet_requests_in_their_order(proxy: FaultProxy, client: httpx.Client) -> None:
    """Faults that were asked for one after another come one after another."""
    proxy.fail_next(status=500)
    proxy.fail_next(status=503)
    assert [client.get("/").status_code for _ in range(3)] == [500, 503, 200]


def test_cut_comes_before_the_target_hears(proxy: FaultProxy, target: Target, client: httpx.Client) -> None:
    """A cut request gets no answer, and did not happen."""
    proxy.cut_next()
    with pytest.raises(httpx.RemoteProtocolError):
        client.put("/", content=b"x")
    assert (target.asked, proxy.requests[0].status) == ([], None)


def test_body_is_cut_in_the_middle(proxy: FaultProxy, client: httpx.Client) -> None:
    """The asked number of bytes comes, and then the connection ends."""
    proxy.cut_next(after_bytes=300)
    with client.stream("GET", "/") as answer:
        got: list[bytes] = []
        with pytest.raises(httpx.RemoteProtocolError):
            got.extend(answer.iter_raw(1))
    assert len(got) == 300


def test_lost_answer_was_done(proxy: FaultProxy, target: Target, client: httpx.Client) -> None:
    """The target did what it was asked, and the client does not hear of it."""
    proxy.lose_answer_next()
    with pytest.raises(httpx.RemoteProtocolError):
        client.put("/", content=b"x")
    assert len(target.asked) == 1


@pytest.mark.parametrize("extra_bytes", [1, 500])
def test_length_may_promise_more(proxy: FaultProxy, client: httpx.Client, extra_bytes: int) -> None:
    """A body that is shorter than promised does not pass for whole."""
    proxy.wrong_length_next(extra_bytes=extra_bytes)
    with pytest.raises(httpx.RemoteProtocolError):
        client.get("/")


def test_length_may_promise_less(proxy: FaultProxy, client: httpx.Client) -> None:
    """A body that is longer than promised is cut there."""
    proxy.wrong_length_next(extra_bytes=-1)
    assert client.get("/").content == BODY[:-1]


def test_slow_body_takes_its_time(proxy: FaultProxy, client: httpx.Client) -> None:
    """1,000 bytes at 4,000 a second take a quarter of a second, and are whole."""
    proxy.slow_next(bytes_per_s=4000)
    started_s = time.monotonic()
    assert client.get("/").content == BODY
    assert time.monotonic() - started_s >= 0.24


def test_hanging_request_ends_with_its_client(proxy: FaultProxy, client: httpx.Client) -> None:
    """A client that gives up is gone, and its connection is not counted as open."""
    proxy.hang_next()
    with pytest.raises(httpx.ReadTimeout):
        client.get("/", timeout=0.05)
    wait_until(lambda: proxy.connections_open == 0, timeout_s=10.0)
    assert client.get("/").status_code == 200


def test_heal_ends_what_hangs(proxy: FaultProxy) -> None:
    """Requests hang together, each on a connection, until all is healed; the faults left over are gone."""
    proxy.hang_next(9)
    ends: list[type[Exception]] = []

    def ask() -> None:
        try:
            httpx.get(proxy.url, timeout=20.0)
        except httpx.TransportError as error:
            ends.append(type(error))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    proxy.wait_for_requests(3)
    assert (proxy.connections_open, proxy.max_connections_open) == (3, 3)
    proxy.heal()
    for thread in threads:
        thread.join()
    assert ends == [httpx.RemoteProtocolError] * 3
    assert httpx.get(proxy.url).status_code == 200


def test_missing_target_cuts(target: Target) -> None:
    """A target that is away shows as a cut connection, not as an answer of the proxy's own."""
    port = target.server_port
    target.server_close()
    with fault_proxy(f"http://127.0.0.1:{port}") as proxy, pytest.raises(httpx.RemoteProtocolError):
        httpx.get(proxy.url)
