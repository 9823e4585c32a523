"""The part of Label Studio that serves the files of tasks, for the tests of its backend."""

from __future__ import annotations

import io
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SAMPLE = Path(__file__).parents[2] / "examples" / "sample.jpg"
PERSONAL_TOKEN = "header.personal.signature"
SHORT_LIVED_TOKEN = "header.short-lived.signature"
CLOUD_PATH = "/tasks/1/presign/?fileuri=czM6Ly9idWNrZXQvc2FtcGxlLmpwZw%3D%3D"
"""For s3://bucket/sample.jpg; leads to another host."""
ELSEWHERE_PATH = "/signed/sample.jpg"
TOKEN = "0123456789abcdef0123456789abcdef01234567"
CIRCLES = {"red": [(100, 90), (330, 90), (210, 300)], "blue": [(480, 250)]}
"""Centres of the circles on `circles()`, in px, by their colour."""
RADIUS_PX = 36
CIRCLES_PATH = "/data/upload/1/circles.png"
SAMPLE_PATH = "/data/upload/1/sample.jpg"
LARGE_PATH = "/data/upload/1/large.jpg"
TEXT_PATH = "/data/upload/1/notes.txt"


def circles() -> bytes:
    """A PNG of 600 x 400 px: three red circles and a blue one on grey."""
    image = Image.new("RGB", (600, 400), (128, 128, 128))
    draw = ImageDraw.Draw(image)
    for colour, centres in CIRCLES.items():
        for x, y in centres:
            draw.ellipse((x - RADIUS_PX, y - RADIUS_PX, x + RADIUS_PX, y + RADIUS_PX), fill=colour)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


FILES: dict[str, Callable[[], bytes]] = {
    SAMPLE_PATH: SAMPLE.read_bytes,
    CIRCLES_PATH: circles,
    LARGE_PATH: lambda: bytes(11_000_000),
    TEXT_PATH: lambda: b"no picture",
}


class _Files(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        authorization = self.headers.get("Authorization")
        if self.path == ELSEWHERE_PATH:  # must not learn the token
            self._answer(SAMPLE.read_bytes()) if authorization is None else self.send_error(400)
        elif authorization not in {f"Token {TOKEN}", f"Bearer {SHORT_LIVED_TOKEN}"}:
            self.send_error(401)
        elif self.path == CLOUD_PATH:
            self.send_response(302)
            port = self.headers["Host"].rpartition(":")[2]
            self.send_header("Location", f"http://localhost:{port}{ELSEWHERE_PATH}")
            self.end_headers()
        elif self.path in FILES:
            self._answer(FILES[self.path]())
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if (self.path, body) == ("/api/token/refresh/", {"refresh": PERSONAL_TOKEN}):
            self._answer(json.dumps({"access": SHORT_LIVED_TOKEN}).encode())
        else:
            self.send_error(401)

    def _answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing: the tests look at answers."""


@contextmanager
def label_studio_files() -> Iterator[str]:
    """Serve the files to whoever has the token; the URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Files) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
