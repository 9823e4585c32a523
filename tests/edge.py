"""The tests' Edge: stores the image, inserts the pending row, sends the request, and reads the row."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar
from urllib.parse import unquote, urlsplit
from uuid import uuid4

import httpx
import numpy as np
from PIL import Image

from results import SqliteResults, Task
from storage import LocalFolder

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    import numpy.typing as npt

    from commands.local_server import LocalServer
    from results import Row

USER = "user-1"
PREDICT = "/api/v1/predict"
BATCH = "/api/v1/predict/batch"
WAIT_S = 120.0
SERVER_TIMEOUT_S = 150
"""REQUEST_TIMEOUT_S of the server that the tests share."""

MIN_PAUSE_S, MAX_PAUSE_S = 0.02, 0.1
"""Between two readings of what a test waits for."""

T = TypeVar("T")


class Edge:
    """Calls one server like the Cloudflare Worker.

    Args:
        server: the server.
        user_id: owner of the images and tasks.
    """

    def __init__(self, server: LocalServer, user_id: str = USER) -> None:
        self.server = server
        self.user_id = user_id
        self.http = httpx.Client(base_url=server.url, headers=server.headers, timeout=WAIT_S)
        self._objects = LocalFolder(server.data_dir / "storage")
        self._rows = SqliteResults(server.data_dir / "results.sqlite", lease_s=180.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.http.close()
        asyncio.run(self._rows.close())

    def upload(self, data: bytes, name: str | None = None) -> str:
        """Store an image of the user; returns its key, which has no extension."""
        key = f"uploads/{self.user_id}/{name or uuid4()}"
        self._objects.put_upload(key, data)
        return key

    def body(self, image_url: str, prompt: str | list[str], task_id: str | None = None) -> dict[str, Any]:
        """The request body for `prompt`: of predict for a string, of predict/batch for a list."""
        field = "text_prompt" if isinstance(prompt, str) else "prompts"
        return {
            "image_url": image_url,
            field: prompt,
            "user_id": self.user_id,
            "task_id": task_id or str(uuid4()),
        }

    def insert_row(self, body: dict[str, Any]) -> None:
        """Insert the pending row of a request."""
        asyncio.run(self._rows.insert_pending(self._task(body)))

    def claim(self, body: dict[str, Any]) -> None:
        """Claim a task like another server with the same rows."""
        asyncio.run(self._rows.claim(self._task(body), str(uuid4())))

    def _task(self, body: dict[str, Any]) -> Task:
        prompts = body.get("prompts") or [body["text_prompt"]]
        return Task(body["task_id"], self.user_id, body["image_url"], tuple(prompts))

    def send(self, body: dict[str, Any]) -> httpx.Response:
        """POST a request to the route of its fields."""
        return self.http.post(BATCH if "prompts" in body else PREDICT, json=body)

    def begin(self, body: dict[str, Any]) -> socket.socket:
        """Send a request of predict on a new connection; closing it without reading is a disconnect."""
        address, text = urlsplit(self.server.url), json.dumps(body)
        head = (
            f"POST {PREDICT} HTTP/1.1\r\nHost: test\r\nX-API-Key: {self.server.api_key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
        )
        connection = socket.create_connection((address.hostname, address.port), timeout=WAIT_S)
        connection.sendall((head + text).encode())
        return connection

    def ask(
        self,
        image: str | bytes | Image.Image,
        prompt: str | list[str],
        task_id: str | None = None,
        **fields: Any,
    ) -> httpx.Response:
        """Upload the image (or use its key), insert the row, and send the request with further fields."""
        if isinstance(image, Image.Image):
            image = png_bytes(image)
        key = self.upload(image) if isinstance(image, bytes) else image
        body = self.body(key, prompt, task_id) | fields
        self.insert_row(body)
        return self.send(body)

    def answer(
        self, image: str | bytes | Image.Image, prompt: str | list[str], **fields: Any
    ) -> dict[str, Any]:
        """Like `ask`, for a request that must succeed; returns the body."""
        response = self.ask(image, prompt, **fields)
        assert response.status_code == httpx.codes.OK, response.text
        found: dict[str, Any] = response.json()
        return found

    def row(self, task_id: str) -> Row | None:
        """The task's current row."""
        return asyncio.run(self._rows.get(task_id))

    def settled_row(self, task_id: str, timeout_s: float = WAIT_S) -> Row:
        """Wait until the task's row is `done` or `error`; returns it."""
        row = wait_for(
            lambda: self.row(task_id), lambda row: row and row.status in {"done", "error"}, timeout_s
        )
        assert row is not None
        return row

    def masks(self, task_id: str) -> list[Path]:
        """The stored masks of a task."""
        folder = self.server.data_dir / "storage" / "masks" / self.user_id / task_id
        return sorted(folder.glob("*"))

    def path(self, url: str) -> Path:
        """The stored file at `url`, which is one of a result."""
        path = unquote(urlsplit(url).path)
        assert path.startswith(str(self.server.data_dir / "storage" / "masks"))
        return Path(path)

    def mask(self, url: str) -> npt.NDArray[np.bool_]:
        """Read the mask at `url`, (height, width) bool; checks that it is an 8-bit grey PNG of 0 and 255."""
        with Image.open(self.path(url)) as image:
            assert (image.format, image.mode) == ("PNG", "L")
            levels = np.asarray(image)
        assert set(np.unique(levels)) <= {0, 255}
        return levels > 0


def wait_for(read: Callable[[], T], condition: Callable[[T], object], timeout_s: float = WAIT_S) -> T:
    """Call `read` until `condition` is true of its result, and return that; fails after `timeout_s`."""
    began_s = time.monotonic()
    while not condition(value := read()):
        waited_s = time.monotonic() - began_s
        assert waited_s < timeout_s, f"still {value!r} after {timeout_s:.0f} s"
        # Less often the longer it takes: reading competes with what is waited for.
        time.sleep(min(MAX_PAUSE_S, max(MIN_PAUSE_S, waited_s / 20)))
    return value


def png_bytes(image: Image.Image, **options: Any) -> bytes:
    """`image` as a PNG."""
    return image_bytes(image, "PNG", **options)


def image_bytes(image: Image.Image, kind: str, **options: Any) -> bytes:
    """`image` in the format `kind`."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def error_of(response: httpx.Response) -> tuple[int, str, str]:
    """Status, code and message of an error; checks the format of its body."""
    body = response.json()
    assert set(body) == {"error", "request_id"}
    assert set(body["error"]) == {"code", "message"}
    assert body["request_id"] == response.headers["X-Request-ID"]
    assert "Traceback" not in response.text
    return response.status_code, body["error"]["code"], body["error"]["message"]
