"""The parts of HTTP/1.1 that a transparent proxy needs."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_BODILESS = (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED)
_HOP = ("connection", "keep-alive", "transfer-encoding", "content-length")


class Cut(Exception):
    """The proxy must close the client's connection."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request with its complete body.

    Attributes:
        lines: its headers unchanged, without Connection, Expect and those that frame the body.
        headers: all headers, by lower-case names.
    """

    method: str
    path: str
    lines: tuple[bytes, ...]
    headers: Mapping[str, str]
    body: bytes

    def encoded(self) -> bytes:
        """The request for the target, which closes its connection after the answer."""
        framing = [b"Connection: close"]
        if self.body or {"content-length", "transfer-encoding"} & self.headers.keys():
            framing.append(b"Content-Length: %d" % len(self.body))
        first = f"{self.method} {self.path} HTTP/1.1".encode("latin-1")
        return b"\r\n".join([first, *self.lines, *framing, b"", self.body])


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer with its complete body. `length` is the Content-Length of an answer to HEAD."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    length: int | None = None

    def head(self, *, extra_bytes: int = 0) -> bytes:
        """The status line and the headers; Content-Length is `extra_bytes` too large."""
        phrase = HTTPStatus(self.status).phrase if self.status in list(HTTPStatus) else ""
        lines = [f"HTTP/1.1 {self.status} {phrase}", *(f"{k}: {v}" for k, v in self.headers.items())]
        if self.status not in _BODILESS:
            length = len(self.body) if self.length is None else self.length
            lines.append(f"Content-Length: {length + extra_bytes}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


async def read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Request | None:
    """Read the client's next request; None if it has closed the connection."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head[:-4].split(b"\r\n")
    method, path, _ = first.decode("latin-1").split(" ")
    headers = _by_name(lines)
    if headers.get("expect", "").lower() == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    body = await _read_body(reader, headers, default=b"")
    kept = tuple(line for line in lines if _name(line) not in (*_HOP, "expect"))
    return Request(method, path, kept, headers, body)


async def ask(target: tuple[str, int], request: Request) -> Answer:
    """Send the request to the target over a new connection. Raises Cut if there is no answer."""
    try:
        reader, writer = await asyncio.open_connection(*target, limit=1 << 20)
    except OSError:
        raise Cut from None
    try:
        writer.write(request.encoded())
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            first, *lines = head[:-4].split(b"\r\n")
            status = int(first.split(b" ")[1])
            if status >= HTTPStatus.OK:  # not 100 Continue or another interim answer
                break
        headers = _by_name(lines)
        bodiless = request.method == "HEAD" or status in _BODILESS
        body = b"" if bodiless else await _read_body(reader, headers, default=None)
        kept = {line.partition(b":")[0].decode("latin-1"): headers[_name(line)] for line in lines}
        kept = {name: value for name, value in kept.items() if name.lower() not in _HOP}
        length = int(headers.get("content-length", 0)) if request.method == "HEAD" else None
        return Answer(status, kept, body, length)
    except (OSError, asyncio.IncompleteReadError):
        raise Cut from None
    finally:
        writer.transport.abort()


async def _read_body(
    reader: asyncio.StreamReader, headers: Mapping[str, str], *, default: bytes | None
) -> bytes:
    """Read a body; without a length it is `default`, or for None everything until the connection ends."""
    if "chunked" in headers.get("transfer-encoding", "").lower():
        return await _read_chunks(reader)
    if "content-length" in headers:
        return await reader.readexactly(int(headers["content-length"]))
    return await reader.read() if default is None else default


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    body = bytearray()
    while size := int((await reader.readline()).split(b";")[0], 16):
        body += await reader.readexactly(size)
        await reader.readline()
    while await reader.readline() not in (b"\r\n", b""):
        pass  # trailers
    return bytes(body)


def _name(line: bytes) -> str:
    return line.partition(b":")[0].decode("latin-1").strip().lower()


def _by_name(lines: list[bytes]) -> dict[str, str]:
    """Headers by lower-case name; the last value of a repeated one."""
    return {_name(line): line.partition(b":")[2].decode("latin-1").strip() for line in lines}
