"""What a connection may cost before its request is read: bytes, headers, time, and a place among others.

A stranger needs no key to open a connection and to send the head of a request, so that all of it is bounded
here, in uvicorn's own protocol. Bodies, keys and routes come later (gate.py).
"""

from __future__ import annotations

import json
import logging
import sys
import time
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from contract import Failure
from gate import request_id_of

if TYPE_CHECKING:
    import asyncio

logger = logging.getLogger(__name__)

MAX_URL_BYTES = 8 * 1024
"""RFC 9110 asks for 8,000 at least; our longest has 20."""
MAX_HEADERS = 100
"""As Apache and gunicorn have it. A Worker sends some 20, a browser some 30."""
MAX_HEAD_BYTES = 32 * 1024
"""URL and headers. nginx takes 32 KiB, Node.js 16; a Worker sends about 1."""
FEED_BYTES = 16 * 1024
"""Handed to the parser at once, which tells of whole headers only: so much more it may hold."""

HEAD_TIMEOUT_S = 10.0
"""From the connection, or the first byte after an answer, to the end of the head. As long as a body has."""
ANSWER_TIMEOUT_S = 30.0
"""A caller that takes less than 48 KiB of its answer (uvloop's buffer) in this time does not want it."""
STOP_TIMEOUT_S = 5.0
"""The longest of these waits once the server stops."""
LINGER_S = 2.0
"""A caller that is refused while it sends gets so long to read why."""

FILES_BESIDE = 128
"""Open files of a worker without any request: libraries, logs, databases, the event loop."""
FILES_A_REQUEST = 2
"""Beside its connection: the call to the runner, and one to a store."""
TELL_AGAIN_S = 60.0

TOO_MANY_HEADERS = Failure(
    "HEADERS_TOO_LARGE",
    f"the request has more than {MAX_HEADERS} headers, or {MAX_HEAD_BYTES} bytes of them",
)
TOO_LONG_URL = Failure("URL_TOO_LONG", f"the URL has more than {MAX_URL_BYTES} bytes")
TOO_LATE = Failure(
    "REQUEST_TIMEOUT",
    f"the request's headers did not arrive within {HEAD_TIMEOUT_S:.0f} s",
)
NOT_HTTP = Failure("INVALID_REQUEST", "what was sent is not an HTTP/1.1 request")
NO_WEBSOCKET = Failure("INVALID_REQUEST", "this server does not speak WebSocket")
FULL = Failure(
    "OVERLOADED",
    "the server works on as many connections as it can hold",
    retry_after_s=2.0,
)


class Connections:
    """The connections of one process; new ones push out those that wait longest for their caller.

    There is no limit per address: behind Cloudflare all callers share a few.

    Args:
        max_connections: held at once.
        max_in_flight: requests that are worked on at once, which need open files too.
    """

    def __init__(self, max_connections: int, max_in_flight: int) -> None:
        self._max_connections = max_connections
        self._files_beside = FILES_BESIDE + FILES_A_REQUEST * max_in_flight
        self._bounded = False
        self._waiting: dict[BoundedProtocol, None] = {}
        self._told_s = -TELL_AGAIN_S

    def apply(self) -> None:
        """From now on this process bounds its connections; others, such as the runner's, never call this."""
        self._bounded = True
        files = allow_open_files(self._max_connections + self._files_beside)
        room = max(files - self._files_beside, files // 2)
        if room < self._max_connections:
            logger.warning(
                "this process may open %d files: it holds %d connections, not MAX_CONNECTIONS=%d; "
                "raise the limit (ulimit -Hn)",
                files,
                room,
                self._max_connections,
            )
            self._max_connections = room

    def protocol(self, **arguments: Any) -> HttpToolsProtocol:
        """The protocol of one connection, from what uvicorn gives it."""
        return BoundedProtocol(self, **arguments) if self._bounded else HttpToolsProtocol(**arguments)

    def note(self, connection: BoundedProtocol, *, waits: bool) -> None:
        """Keep those that wait in the order in which they began to."""
        if waits:
            self._waiting.setdefault(connection)
        else:
            self._waiting.pop(connection, None)

    def make_room(self, newcomer: BoundedProtocol) -> None:
        """Close one that waits when there are too many; the newcomer itself when all others are at work."""
        if len(newcomer.connections) <= self._max_connections:
            return
        if time.monotonic() - self._told_s >= TELL_AGAIN_S:
            self._told_s = time.monotonic()
            logger.warning(
                "%d connections are open (MAX_CONNECTIONS): for each new one that which waits longest for "
                "its caller is closed",
                self._max_connections,
            )
        longest = next(iter(self._waiting))
        if longest is newcomer:
            newcomer.refuse(FULL)
        else:
            longest.cut()


class _Phase(Enum):
    """What a connection waits for, if it waits; each has its timeout."""

    HEAD = auto()
    """For the head of a request."""
    IDLE = auto()
    """For the next request, of which nothing came yet: uvicorn's keep-alive timeout."""
    BODY = auto()
    """For the body: the gate's timeout."""
    ANSWER = auto()
    """For a caller that does not take its answer."""
    LEAVING = auto()
    """The same, and nothing comes after it."""
    REFUSED = auto()
    """For a caller that was refused, to read why."""
    WORK = auto()
    """It does not wait: the server works."""


TIMEOUTS_S = {
    _Phase.HEAD: HEAD_TIMEOUT_S,
    _Phase.ANSWER: ANSWER_TIMEOUT_S,
    _Phase.LEAVING: ANSWER_TIMEOUT_S,
    _Phase.REFUSED: LINGER_S,
}


class _Refused(Exception):
    """Stops the parser; it comes back as the context of the parser's own error."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, whose parser takes whatever comes for as long as it comes, with bounds.

    Args:
        all_connections: of the process.
        arguments: what uvicorn gives every protocol.
    """

    def __init__(self, all_connections: Connections, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.ws_protocol_class = None
        self._all = all_connections
        self._phase: _Phase | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._longest_wait_s = ANSWER_TIMEOUT_S
        self._deaf = False
        self._head_bytes = 0
        self._held_bytes = 0
        self._head_begun = False
        self._next_begun = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn
        super().connection_made(transport)
        self._review()
        self._all.make_room(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._all.note(self, waits=False)
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._deaf:
            return
        view = memoryview(data)
        for start in range(0, len(data), FEED_BYTES):
            if not self._feed(view[start : start + FEED_BYTES]):
                return
        self._next_begun = not self._in_work
        self._review()

    def _feed(self, data: memoryview) -> bool:
        """Parse a piece; False when it was refused."""
        # The parser keeps what is no whole header yet; whatever it hands over sets this back.
        self._held_bytes += len(data)
        refusal = None
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # the request is answered as if it had not asked
        except httptools.HttpParserError as error:
            cause = error.__context__
            refusal = cause.failure if isinstance(cause, _Refused) else NOT_HTTP
        if refusal is None and self._held_bytes > MAX_HEAD_BYTES:
            refusal = TOO_MANY_HEADERS
        if refusal is not None:
            self.refuse(refusal)
        return refusal is None

    def on_message_begin(self) -> None:
        if self._in_work:
            raise _Refused(NOT_HTTP)  # pipelined: never said, since the one in work has the last answer
        super().on_message_begin()
        self._head_begun = True
        self._head_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._head_bytes += len(url)
        if self._head_bytes > MAX_URL_BYTES:
            raise _Refused(TOO_LONG_URL)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:  # trailers come here too
        self._held_bytes = 0
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > MAX_HEAD_BYTES or len(self.headers) >= MAX_HEADERS:
            raise _Refused(TOO_MANY_HEADERS)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._held_bytes = 0
        self._head_begun = False
        if self.parser.should_upgrade() and self._get_upgrade() == b"websocket":
            raise _Refused(NO_WEBSOCKET)
        super().on_headers_complete()
        if self.parser.should_upgrade():
            self.cycle.keep_alive = False  # the parser reads nothing after it

    def on_body(self, body: bytes) -> None:
        self._held_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._held_bytes = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._next_begun = self.cycle.more_body  # answered before it was whole: the rest still comes
        self._review()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._review()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._review()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._review()

    def shutdown(self) -> None:
        super().shutdown()
        self._longest_wait_s = STOP_TIMEOUT_S
        self._phase = None  # a wait that goes on gets its new timer
        self._review()

    def refuse(self, failure: Failure) -> None:
        """Answer, and read nothing more. A request in work is finished, and its answer is the last."""
        self._deaf = True
        if not self._in_work:
            self._say(failure)
        elif self.cycle.more_body:
            self.cut()
            return
        else:
            self.cycle.keep_alive = False
        self._review()

    def cut(self) -> None:
        """Close at once, without a word."""
        self._all.note(self, waits=False)
        self.transport.abort()

    def _say(self, failure: Failure) -> None:
        request_id = request_id_of(dict(self.headers or ()))
        body = json.dumps(failure.body(request_id).model_dump()).encode()
        headers = [
            *self.server_state.default_headers,
            *((name.lower().encode(), value.encode()) for name, value in failure.headers.items()),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"x-request-id", request_id.encode()),
            (b"connection", b"close"),
        ]
        lines = [f"HTTP/1.1 {failure.status.value} {failure.status.phrase}".encode()]
        lines += [name + b": " + value for name, value in headers]
        self.transport.write(b"\r\n".join([*lines, b"", body]))
        logger.info(
            "refused unread: %d request %s", failure.status, request_id, extra={"request_id": request_id}
        )
        # A close while the caller sends would reach it as a reset, and the answer be lost.
        if self.transport.can_write_eof():
            self.transport.write_eof()
        else:
            self.transport.close()

    @property
    def _in_work(self) -> bool:
        return self._has_asked and not self.cycle.response_complete

    @property
    def _has_asked(self) -> bool:
        return self.cycle is not None  # uvicorn's type leaves the None out

    def _review(self) -> None:
        """Take note of what the connection waits for; a wait that goes on keeps its timer."""
        phase = self._find_phase()
        self._all.note(self, waits=phase is not _Phase.WORK)
        if phase is self._phase:
            return
        self._phase = phase
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if phase in TIMEOUTS_S:
            timeout_s = min(TIMEOUTS_S[phase], self._longest_wait_s)
            self._timer = self.loop.call_later(timeout_s, self._end_wait)

    def _find_phase(self) -> _Phase:
        if self.transport.is_closing():
            return _Phase.LEAVING
        if self._in_work:
            if self.flow.write_paused:
                return _Phase.ANSWER
            return _Phase.BODY if self.cycle.more_body else _Phase.WORK
        if self._deaf:
            return _Phase.REFUSED
        return _Phase.HEAD if not self._has_asked or self._next_begun else _Phase.IDLE

    def _end_wait(self) -> None:
        self._timer = None
        if self._phase is not _Phase.HEAD:
            self.cut()
        elif self._head_begun:
            self.refuse(TOO_LATE)
        else:  # nothing was asked: browsers open connections in advance, and would take an answer amiss
            self.transport.close()
            self._review()


def allow_open_files(wanted: int) -> int:
    """Let this process open `wanted` files, if its hard limit allows; returns how many it may open."""
    if sys.platform == "win32":
        return wanted
    import resource  # noqa: PLC0415 - not on Windows

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    except (OSError, ValueError):  # macOS knows a lower limit than it tells
        return soft
    return allowed
