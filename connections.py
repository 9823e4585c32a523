"""Bounds what a connection costs before its request is read: bytes, headers, time, and their number.

Anyone can open a connection and send the head of a request without a key, so it is bounded here, in uvicorn's
own protocol. Bodies, keys and routes come later (gate.py).
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
"""RFC 9110 recommends 8,000 at least; our longest has 20."""
MAX_HEADERS = 100
"""As in Apache and gunicorn. A Worker sends some 20, a browser some 30."""
MAX_HEAD_BYTES = 32 * 1024
"""URL and headers. nginx allows 32 KiB, Node.js 16; a Worker sends about 1."""
FEED_BYTES = 16 * 1024
"""Given to the parser at once. It reports whole headers only, so it may hold so much more."""

HEAD_TIMEOUT_S = 10.0
"""From the connection, or the first byte after an answer, to the end of the head. A body has as long."""
ANSWER_TIMEOUT_S = 30.0
"""The connection of a caller that reads less than 48 KiB (uvloop's buffer) in this time is closed."""
STOP_TIMEOUT_S = 5.0
"""The longest of these waits while the server stops."""
LINGER_S = 2.0
"""The time for a caller that was refused while it sends to read the answer."""

FILES_BESIDE = 128
"""Open files of a worker without requests: libraries, logs, databases, the event loop."""
FILES_A_REQUEST = 2
"""Beside its connection: the call of the runner, and one of a store."""
WARN_INTERVAL_S = 60.0

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
    "the server has as many connections in progress as it can hold",
    retry_after_s=2.0,
)


class Connections:
    """The connections of one process. A new one closes the one that waits longest for its caller.

    There is no limit for each address: behind Cloudflare all callers share a few.

    Args:
        max_connections: held at once.
        max_in_flight: requests in progress at once, which need open files too.
    """

    def __init__(self, max_connections: int, max_in_flight: int) -> None:
        self._max_connections = max_connections
        self._files_beside = FILES_BESIDE + FILES_A_REQUEST * max_in_flight
        self._bounded = False
        self._waiting: dict[BoundedProtocol, None] = {}
        self._warned_s = -WARN_INTERVAL_S

    def apply(self) -> None:
        """From now on this process bounds its connections. The runner does not call it."""
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

    def record_wait(self, connection: BoundedProtocol, *, waits: bool) -> None:
        """Record whether a connection waits for its caller, in the order in which the waits began."""
        if waits:
            self._waiting.setdefault(connection)
        else:
            self._waiting.pop(connection, None)

    def make_room(self, newcomer: BoundedProtocol) -> None:
        """When there are too many, close the one that waits longest, or the newcomer when no other waits."""
        if len(newcomer.connections) <= self._max_connections:
            return
        if time.monotonic() - self._warned_s >= WARN_INTERVAL_S:
            self._warned_s = time.monotonic()
            logger.warning(
                "%d connections are open (MAX_CONNECTIONS): each new one closes the one that waits longest "
                "for its caller",
                self._max_connections,
            )
        longest = next(iter(self._waiting))
        if longest is newcomer:
            newcomer.refuse(FULL)
        else:
            longest.cut()


class _Phase(Enum):
    """What a connection waits for; each has its timeout."""

    HEAD = auto()
    """For the head of a request."""
    IDLE = auto()
    """For the first byte of the next request: uvicorn's keep-alive timeout."""
    BODY = auto()
    """For the body: the gate's timeout."""
    ANSWER = auto()
    """For a caller that does not read its answer."""
    LEAVING = auto()
    """The same, before the connection is closed."""
    REFUSED = auto()
    """For a caller that was refused, to read the answer."""
    IN_PROGRESS = auto()
    """It does not wait for its caller: the request is in progress."""


TIMEOUTS_S = {
    _Phase.HEAD: HEAD_TIMEOUT_S,
    _Phase.ANSWER: ANSWER_TIMEOUT_S,
    _Phase.LEAVING: ANSWER_TIMEOUT_S,
    _Phase.REFUSED: LINGER_S,
}


class _Refused(Exception):
    """Stops the parser, which raises its own error with this one as the context."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with bounds. Without them its parser reads any size for any time.

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
        self._ignores_input = False
        self._head_bytes = 0
        self._held_bytes = 0
        self._head_begun = False
        self._next_begun = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn
        super().connection_made(transport)
        self._update_phase()
        self._all.make_room(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._all.record_wait(self, waits=False)
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._ignores_input:
            return
        view = memoryview(data)
        for start in range(0, len(data), FEED_BYTES):
            if not self._feed(view[start : start + FEED_BYTES]):
                return
        self._next_begun = not self._in_progress
        self._update_phase()

    def _feed(self, data: memoryview) -> bool:
        """Parse a part of the input; False when it was refused."""
        # The parser holds a header that is not whole yet; each of its callbacks sets this to 0.
        self._held_bytes += len(data)
        refusal = None
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # the request is answered without the upgrade
        except httptools.HttpParserError as error:
            cause = error.__context__
            refusal = cause.failure if isinstance(cause, _Refused) else NOT_HTTP
        if refusal is None and self._held_bytes > MAX_HEAD_BYTES:
            refusal = TOO_MANY_HEADERS
        if refusal is not None:
            self.refuse(refusal)
        return refusal is None

    def on_message_begin(self) -> None:
        if self._in_progress:
            raise _Refused(NOT_HTTP)  # pipelined: not answered, since the request in progress is the last
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
            self.cycle.keep_alive = False  # the parser stops after it

    def on_body(self, body: bytes) -> None:
        self._held_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._held_bytes = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._next_begun = self.cycle.more_body  # answered before the body was complete: the rest still comes
        self._update_phase()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._update_phase()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._update_phase()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._update_phase()

    def shutdown(self) -> None:
        super().shutdown()
        self._longest_wait_s = STOP_TIMEOUT_S
        self._phase = None  # so that a wait in progress gets a new timer
        self._update_phase()

    def refuse(self, failure: Failure) -> None:
        """Answer, and read nothing more. A request in progress is finished, and its answer is the last."""
        self._ignores_input = True
        if not self._in_progress:
            self._send(failure)
        elif self.cycle.more_body:
            self.cut()
            return
        else:
            self.cycle.keep_alive = False
        self._update_phase()

    def cut(self) -> None:
        """Close at once, without an answer."""
        self._all.record_wait(self, waits=False)
        self.transport.abort()

    def _send(self, failure: Failure) -> None:
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
            "refused before it was read: %d request %s",
            failure.status,
            request_id,
            extra={"request_id": request_id},
        )
        # Closed while the caller sends, the connection would be reset and the answer lost.
        if self.transport.can_write_eof():
            self.transport.write_eof()
        else:
            self.transport.close()

    @property
    def _in_progress(self) -> bool:
        return self._has_request and not self.cycle.response_complete

    @property
    def _has_request(self) -> bool:
        return self.cycle is not None  # uvicorn's type omits the None

    def _update_phase(self) -> None:
        """Record what the connection waits for; a wait that continues keeps its timer."""
        phase = self._find_phase()
        self._all.record_wait(self, waits=phase is not _Phase.IN_PROGRESS)
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
        if self._in_progress:
            if self.flow.write_paused:
                return _Phase.ANSWER
            return _Phase.BODY if self.cycle.more_body else _Phase.IN_PROGRESS
        if self._ignores_input:
            return _Phase.REFUSED
        return _Phase.HEAD if not self._has_request or self._next_begun else _Phase.IDLE

    def _end_wait(self) -> None:
        self._timer = None
        if self._phase is not _Phase.HEAD:
            self.cut()
        elif self._head_begun:
            self.refuse(TOO_LATE)
        else:  # no request: browsers open connections in advance, and do not expect an answer
            self.transport.close()
            self._update_phase()


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
    except (OSError, ValueError):  # the real limit of macOS is below the one that it reports
        return soft
    return allowed
