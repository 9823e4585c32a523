"""As much of HTTP/1.1 as a proxy needs that changes nothing on its way."""

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
    """The connection is to be cut."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request, its body read whole.

    Attributes:
        lines: its headers as they came, without Connection, Expect and what frames the body.
        headers: all of them, by names in lower case.
    """

    method: str
    path: str
    lines: tuple[bytes, ...]
    headers: Mapping[str, str]
    body: bytes

    def encoded(self) -> bytes:
        """As it goes on to the target, which closes its connection after the answer."""
        framing = [b"Connection: close"]
        if self.body or {"content-length", "transfer-encoding"} & self.headers.keys():
            framing.append(b"Content-Length: %d" % len(self.body))
        first = f"{self.method} {self.path} HTTP/1.1".encode("latin-1")
        return b"\r\n".join([first, *self.lines, *framing, b"", self.body])


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, its body read whole. `length` stands in for the body's, in an answer to HEAD."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    length: int | None = None

    def head(self, *, extra_bytes: int = 0) -> bytes:
        """The status line and the headers; Content-Length says `extra_bytes` more than there are."""
        phrase = HTTPStatus(self.status).phrase if self.status in list(HTTPStatus) else ""
        lines = [f"HTTP/1.1 {self.status} {phrase}", *(f"{k}: {v}" for k, v in self.headers.items())]
        if self.status not in _BODILESS:
            length = len(self.body) if self.length is None else self.length
            lines.append(f"Content-Length: {length + extra_bytes}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


async def read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Request | None:
    """The client's next request; None when it has closed the connection."""
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
    """The target's answer, over a connection of its own. Raises Cut when it does not answer."""
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
            if status >= HTTPStatus.OK:  # else 100 Continue and its like
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
    """A message's body; without a length it is `default`, or for None all until the connection's end."""
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
    """Headers by name in lower case; of a repeated one, the last."""
    return {_name(line): line.partition(b":")[2].decode("latin-1").strip() for line in lines}
