"""An HTTP/1.1 proxy that injects faults between the server and a store."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from tests.services import wire
from tests.services.processes import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    _Kind = Literal["none", "answer", "hang", "cut", "slow", "length", "lose", "delay"]
    Predicate = Callable[["Seen"], bool]

_SLOW_PARTS_A_SECOND = 20
_STOP_TIMEOUT_S = 10.0


@dataclass(slots=True)
class Seen:
    """A request that reached the proxy.

    Attributes:
        path: with its query.
        headers: by lower-case names.
        status: of the answer that was sent; None if there was none.
        done: the proxy has finished the request.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    status: int | None = None
    done: bool = False


@dataclass(slots=True)
class _Fault:
    kind: _Kind
    left: int
    when: Predicate
    answer: wire.Answer | None = None
    amount: float = 0


class FaultProxy:
    """A proxy before one server. Without faults it passes everything, the header Host included.

    Each fault affects the next `n` requests for which `when` is true (by default all). Faults apply in the
    order in which they were added; afterwards requests pass again.

    Attributes:
        url: replaces the target's URL; it has the target's path.
        requests: all requests, in order.
        connections_made: number of client connections so far.
        max_connections_open: the maximum number of concurrent client connections.
    """

    def __init__(self, target_url: str) -> None:
        target = urlsplit(target_url)
        self._target = (target.hostname or "127.0.0.1", target.port or 80)
        self._path = target.path
        self.url = ""
        self.requests: list[Seen] = []
        self.connections_made = 0
        self.max_connections_open = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._faults: list[_Fault] = []
        self._healed = asyncio.Event()
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault proxy")

    @property
    def connections_open(self) -> int:
        """Number of open client connections."""
        return len(self._writers)

    def fail_next(
        self,
        n: int = 1,
        *,
        status: int = 503,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        when: Predicate | None = None,
    ) -> None:
        """Answer instead of the target, which does not get the request."""
        self._add("answer", n, when, answer=wire.Answer(status, dict(headers or {}), body))

    def hang_next(self, n: int = 1, *, when: Predicate | None = None) -> None:
        """Read the request and do not answer until `heal`, which closes the connection."""
        self._add("hang", n, when)

    def cut_next(self, n: int = 1, *, after_bytes: int | None = None, when: Predicate | None = None) -> None:
        """Close the connection: before the target gets the request, or after so many bytes of the body."""
        self._add("cut", n, when, amount=-1 if after_bytes is None else after_bytes)

    def slow_next(self, n: int = 1, *, bytes_per_s: int, when: Predicate | None = None) -> None:
        """Send the answer's body at this rate."""
        self._add("slow", n, when, amount=bytes_per_s)

    def wrong_length_next(self, n: int = 1, *, extra_bytes: int = 1, when: Predicate | None = None) -> None:
        """Send a Content-Length that is too large, or too small if negative; then close."""
        self._add("length", n, when, amount=extra_bytes)

    def lose_answer_next(self, n: int = 1, *, when: Predicate | None = None) -> None:
        """Let the target do the request, then close the connection without the answer."""
        self._add("lose", n, when)

    def delay_next(self, n: int = 1, *, seconds: float, when: Predicate | None = None) -> None:
        """Let the target do the request, and delay its answer."""
        self._add("delay", n, when, amount=seconds)

    def heal(self) -> None:
        """Remove all faults; closes the connections of hanging requests."""
        with self._lock:
            self._faults.clear()
        self._loop.call_soon_threadsafe(self._release)

    def wait_for_requests(self, n: int, timeout_s: float = 20.0) -> None:
        """Wait until `n` requests have arrived. Raises TimeoutError."""
        wait_until(lambda: len(self.requests) >= n, timeout_s)

    def _add(
        self,
        kind: _Kind,
        n: int,
        when: Predicate | None,
        *,
        answer: wire.Answer | None = None,
        amount: float = 0,
    ) -> None:
        with self._lock:
            self._faults.append(_Fault(kind, n, when or (lambda _: True), answer, amount))

    def _take(self, seen: Seen) -> _Fault:
        with self._lock:
            for fault in self._faults:
                if fault.left > 0 and fault.when(seen):
                    fault.left -= 1
                    return fault
        return _Fault("none", 0, lambda _: True)

    def _release(self) -> None:
        self._healed.set()
        self._healed = asyncio.Event()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve the requests of one client connection."""
        self._writers.add(writer)
        self.connections_made += 1
        self.max_connections_open = max(self.max_connections_open, len(self._writers))
        try:
            # The connection ends if the client disconnects, by wire.Cut, or when the proxy stops.
            with contextlib.suppress(wire.Cut, OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                while request := await wire.read_request(reader, writer):
                    seen = Seen(request.method, request.path, request.headers, request.body)
                    self.requests.append(seen)
                    try:
                        await self._answer(request, seen, reader, writer)
                    finally:
                        seen.done = True
        finally:
            writer.close()
            self._writers.discard(writer)

    async def _answer(
        self, request: wire.Request, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        fault = self._take(seen)
        if fault.kind == "hang":
            await self._hang(reader)
        if fault.kind == "cut" and fault.amount < 0:
            raise wire.Cut
        answer = fault.answer or await wire.ask(self._target, request)
        if fault.kind == "lose":
            raise wire.Cut
        if fault.kind == "delay":
            await asyncio.sleep(fault.amount)
        seen.status = answer.status
        await _send(answer, fault, writer, head_only=request.method == "HEAD")
        if fault.kind in ("cut", "length"):
            raise wire.Cut

    async def _hang(self, reader: asyncio.StreamReader) -> None:
        """Wait until `heal`, or until the client disconnects. Raises Cut."""
        ends = [asyncio.ensure_future(self._healed.wait()), asyncio.ensure_future(reader.read(1))]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.cancel()
        raise wire.Cut

    def _start(self) -> None:
        self._thread.start()
        serving = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20), self._loop
        )
        self._server = serving.result(_STOP_TIMEOUT_S)
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}{self._path}"

    def _stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(_STOP_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_STOP_TIMEOUT_S)
        self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        serving = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
        await asyncio.sleep(0)  # the sockets close in the next iteration of the loop


@contextmanager
def fault_proxy(target_url: str) -> Iterator[FaultProxy]:
    """Run a proxy before the server at `target_url` until the end of the block."""
    proxy = FaultProxy(target_url)
    proxy._start()
    try:
        yield proxy
    finally:
        proxy._stop()


async def _send(answer: wire.Answer, fault: _Fault, writer: asyncio.StreamWriter, *, head_only: bool) -> None:
    body = b"" if head_only else answer.body
    writer.write(answer.head(extra_bytes=int(fault.amount) if fault.kind == "length" else 0))
    if fault.kind == "cut":
        body = body[: int(fault.amount)]
    if fault.kind == "slow":
        await _send_slowly(body, int(fault.amount), writer)
    else:
        writer.write(body)
    await writer.drain()


async def _send_slowly(body: bytes, bytes_per_s: int, writer: asyncio.StreamWriter) -> None:
    part = max(1, bytes_per_s // _SLOW_PARTS_A_SECOND)
    for start in range(0, len(body), part):
        await asyncio.sleep(len(body[start : start + part]) / bytes_per_s)
        writer.write(body[start : start + part])
        await writer.drain()
