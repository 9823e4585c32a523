"""The parts of the Hugging Face hub that a download uses: gated files on one port, their store on another."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import struct
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

from huggingface_hub.utils.sha import git_hash

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

REPO = "facebook/sam3"
COMMIT = "1f" * 20
TOKEN = "hf_abcdefghijklmnopqrstuvwxyz01234567"

_LARGE = (".pt", ".safetensors")
_SENT_AT_ONCE = 1 << 16


@dataclass(frozen=True, slots=True)
class Seen:
    """A request to the hub or to its store."""

    method: str
    path: str
    headers: Mapping[str, str]
    at_store: bool


@dataclass(slots=True)
class Hub:
    """A hub with one gated repository.

    Attributes:
        files: of the repository, by name.
        url: the value of HF_ENDPOINT.
        granted: the account of `TOKEN` has access to the repository.
        large_size_bytes: the size that the hub reports for large files; None: the real one.
        tampered: the store sends changed bytes.
        failures: the store answers its next requests with these statuses.
        cuts: the store's next answers end after so many bytes of a body, with a "close" or a "reset".
        hold_after_bytes: the store sends this part of a body, and then nothing until the hub is closed.
        requests: all requests of files, in order.
    """

    files: dict[str, bytes]
    url: str = ""
    granted: bool = True
    large_size_bytes: int | None = None
    tampered: bool = False
    failures: list[int] = field(default_factory=list)
    cuts: list[tuple[int, str]] = field(default_factory=list)
    hold_after_bytes: int | None = None
    requests: list[Seen] = field(default_factory=list)
    store_url: str = ""
    closing: threading.Event = field(default_factory=threading.Event)

    def gets(self, *, at_store: bool = True) -> list[Seen]:
        """The GET requests, to the store or to the hub."""
        return [seen for seen in self.requests if seen.method == "GET" and seen.at_store is at_store]


@contextmanager
def hub(files: dict[str, bytes]) -> Iterator[Hub]:
    """Serve `files` on 127.0.0.1 until the block ends."""
    served = Hub(files)
    with _listening(_HubHandler, served) as served.url, _listening(_StoreHandler, served) as served.store_url:
        try:
            yield served
        finally:
            served.closing.set()


@contextmanager
def _listening(handler: type[_Handler], served: Hub) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, served)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    at_store = False

    def __init__(self, served: Hub, *connection: object) -> None:
        self.hub = served
        super().__init__(*connection)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
        """Log nothing."""

    def answer(self) -> None:
        raise NotImplementedError

    def send(self, status: int, headers: Mapping[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _serve(self) -> None:
        if self.path.startswith("/api/"):  # additional requests of the library
            self.send(404, {})
            return
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.hub.requests.append(Seen(self.command, self.path, headers, self.at_store))
        # A killed client has closed its connection.
        with contextlib.suppress(OSError):
            self.answer()


class _HubHandler(_Handler):
    """The hub: checks access, and redirects to the store."""

    def answer(self) -> None:
        owner, name, _, revision, file = self.path.strip("/").split("/")
        refusal = self._refusal(f"{owner}/{name}", revision, file)
        if refusal is not None:
            status, code, message = refusal
            self.send(status, {"X-Error-Code": code, "X-Error-Message": message} if code else {}, b"{}")
            return
        content = self.hub.files[file]
        headers = {"X-Repo-Commit": COMMIT}
        if not file.endswith(_LARGE):
            self.send(200, headers | {"ETag": f'"{git_hash(content)}"'}, content)
            return
        size_bytes = len(content) if self.hub.large_size_bytes is None else self.hub.large_size_bytes
        headers["X-Linked-Size"] = str(size_bytes)
        headers["X-Linked-ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        headers["Location"] = f"{self.hub.store_url}/{file}?signature=s"
        self.send(302, headers)

    def _refusal(self, repo: str, revision: str, file: str) -> tuple[int, str, str] | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in ("", TOKEN):
            return 401, "", "Invalid credentials in Authorization header"
        if repo != REPO:
            return (404 if token else 401), "RepoNotFound", "Repository not found"
        if not token or not self.hub.granted:
            return (403 if token else 401), "GatedRepo", f"Access to model {REPO} is restricted."
        if revision not in ("main", COMMIT):
            return 404, "RevisionNotFound", f"Invalid rev id: {revision}"
        if file not in self.hub.files:
            return 404, "EntryNotFound", "Entry not found"
        return None


class _StoreHandler(_Handler):
    """The store of large files: another host, with signed URLs and ranges."""

    at_store = True

    def answer(self) -> None:
        if self.hub.failures:
            self.send(self.hub.failures.pop(0), {})
            return
        content = self.hub.files[self.path.partition("?")[0].strip("/")]
        if self.hub.tampered:
            content = bytes(1) + content[1:]
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        body = memoryview(content)[first:]
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body)))
        if "Range" in self.headers:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        self._send_slowly(body)

    def _send_slowly(self, body: memoryview) -> None:
        """Send the body in parts, and apply the faults."""
        end, how = self.hub.cuts.pop(0) if self.hub.cuts else (len(body), "")
        hold_at = len(body) if self.hub.hold_after_bytes is None else self.hub.hold_after_bytes
        for start in range(0, min(end, hold_at), _SENT_AT_ONCE):
            self.wfile.write(body[start : min(start + _SENT_AT_ONCE, end, hold_at)])
        if hold_at < end:
            self.hub.closing.wait()
        if how == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())  # the server would shut the connection down properly first
        if how or hold_at < end:
            self.close_connection = True
