"""What storage/r2.py changes in botocore: each change is still needed, and still has its effect."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest
from botocore.exceptions import ClientError, ConnectionClosedError
from botocore.exceptions import IncompleteReadError as CutError

from storage import r2

if TYPE_CHECKING:
    from collections.abc import Iterator

ERROR = b"<Error><Code>%s</Code><Message>no</Message><Region>other</Region></Error>"


class _Handler(BaseHTTPRequestHandler):
    """Answers every request alike, and records it."""

    protocol_version = "HTTP/1.1"
    status, body, missing_bytes = 200, b"", 0
    seen: list[tuple[str, dict[str, str]]]

    def answer(self) -> None:
        self.seen.append((self.command, {name.lower(): value for name, value in self.headers.items()}))
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body) + self.missing_bytes))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(self.body)
        self.close_connection = True

    do_GET = do_PUT = do_HEAD = answer  # noqa: N815 - names of http.server

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def server(**behaviour: object) -> Iterator[tuple[str, list[tuple[str, dict[str, str]]]]]:
    """An S3 API that answers everything in one way: its URL, and the requests that it got."""
    seen: list[tuple[str, dict[str, str]]] = []
    handler = type("Handler", (_Handler,), {**behaviour, "seen": seen})
    listening = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}", seen
    finally:
        listening.shutdown()
        listening.server_close()


def client_of(url: str, *, without: tuple[str, Any] | None = None) -> Any:
    """The client of the server, or the same without one of its changes."""
    client: Any = r2._client(url, "key", "secret", 1, 5.0)
    if without:
        client.meta.events.unregister(*without)
    return client


def test_redirects_are_not_followed() -> None:
    """At a redirect botocore asks for the bucket's region; with the change it asks nothing more."""
    redirect = {"status": 301, "body": ERROR % b"PermanentRedirect"}
    with server(**redirect) as (url, seen):
        # It asks again and again, until the recursion or, on a busy machine, the connection ends.
        with pytest.raises((ClientError, ConnectionClosedError, RecursionError)):
            client_of(url, without=("before-call.s3", r2._disable_region_redirect)).get_object(
                Bucket="b", Key="k"
            )
        assert len(seen) > 1
    with server(**redirect) as (url, seen):
        with pytest.raises(ClientError):
            client_of(url).get_object(Bucket="b", Key="k")
        assert [method for method, _ in seen] == ["GET"]


def test_no_100_continue_is_expected() -> None:
    """Without the change each upload has the header Expect."""
    with server() as (url, seen):
        client_of(url, without=("before-send.s3", r2._remove_expect_header)).put_object(
            Bucket="b", Key="k", Body=b"x"
        )
        client_of(url).put_object(Bucket="b", Key="k", Body=b"x")
        assert ["expect" in headers for _, headers in seen] == [True, False]


def test_errors_that_are_cut_off_are_no_answers() -> None:
    """Without the change the part of an error that arrived counts as an answer."""
    cut = {"status": 403, "body": ERROR[:20], "missing_bytes": 60}
    with server(**cut) as (url, _):
        with pytest.raises(ClientError):
            client_of(url, without=("before-parse.s3", r2._reject_truncated_errors)).get_object(
                Bucket="b", Key="k"
            )
        with pytest.raises(CutError):
            client_of(url).get_object(Bucket="b", Key="k")
