"""The routes of CVAT's server that `cvat-cli task auto-annotate` calls, for one task with one picture.

CVAT's server is no Python package, so it cannot run here. The models of the real SDK read these answers.
"""

from __future__ import annotations

import io
import json
import threading
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator

VERSION = "2.80.0"
"""Of the server that the SDK supports."""
TASK_ID = 7
LABELS = {"disc": 31, "triangles": 32, "zebra": 33}
"""Of the task: id by name."""
DETECTION = Path(__file__).parents[2] / "adapters" / "cvat" / "detection.py"


@dataclass
class CvatStandIn:
    """A running server.

    Attributes:
        url: of the server.
        uploaded: bodies of the annotations that were sent.
    """

    url: str
    uploaded: list[dict[str, Any]] = field(default_factory=list)

    def arguments(self, *options: str) -> list[str]:
        """Those of the command of docs/adapters/cvat.md."""
        host, port = self.url.rsplit(":", 1)
        return [
            *("--server-host", host, "--server-port", port, "task", "auto-annotate", str(TASK_ID)),
            *("--function-file", str(DETECTION), "-p", "labels=str:disc=purple circle,triangles,zebra"),
            *options,
        ]


@contextmanager
def cvat_stand_in(picture: bytes, labels: dict[str, int]) -> Iterator[CvatStandIn]:
    """Serve a task with a picture and labels, whose ids are given by name."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = urlsplit(self.path).path.rstrip("/")
            if path == f"/api/tasks/{TASK_ID}/data":
                self._answer(_chunk(picture), "application/zip")
                return
            answers = {
                "/api/server/about": {
                    "name": "CVAT",
                    "description": "",
                    "version": VERSION,
                    "logo_url": "",
                    "subtitle": "",
                },
                "/api/users/self": {"id": 1, "username": "annotator"},
                f"/api/tasks/{TASK_ID}": _task(server.url),
                f"/api/tasks/{TASK_ID}/data/meta": _meta(),
                "/api/labels": _labels(labels),
            }
            if path in answers:
                self._answer(json.dumps(answers[path]).encode())
            else:
                self.send_error(404)

        def do_PATCH(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.uploaded.append(body)
            self._answer(json.dumps({"version": 1, "tags": [], "shapes": [], "tracks": []}).encode())

        def _answer(self, content: bytes, kind: str = "application/json") -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Nothing: the tests look at what was uploaded."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        server = CvatStandIn(f"http://127.0.0.1:{http.server_address[1]}")
        thread = threading.Thread(target=http.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()


def _chunk(picture: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("000000.jpg", picture)
    return file.getvalue()


def _task(url: str) -> dict[str, Any]:
    return {
        "id": TASK_ID,
        "name": "shapes",
        "organization": None,
        "size": 1,
        "data_chunk_size": 1,
        "data_original_chunk_type": "imageset",
        "updated_date": "2026-11-27T00:00:00Z",
        "labels": {"url": f"{url}/api/labels?task_id={TASK_ID}"},
        "jobs": {"count": 1, "completed": 0, "validation": 0, "url": f"{url}/api/jobs?task_id={TASK_ID}"},
    }


def _meta() -> dict[str, Any]:
    return {
        "chunks_updated_date": "2026-11-27T00:00:00Z",
        "chunk_size": 1,
        "size": 1,
        "image_quality": 70,
        "start_frame": 0,
        "stop_frame": 0,
        "frame_filter": "",
        "deleted_frames": [],
        "frames": [{"width": 1280, "height": 720, "name": "sample.jpg", "related_files": 0}],
    }


def _labels(labels: dict[str, int]) -> dict[str, Any]:
    found = [
        {"id": number, "name": name, "type": "any", "attributes": [], "sublabels": [], "color": "#ff0000"}
        for name, number in labels.items()
    ]
    return {"count": len(found), "next": None, "previous": None, "results": found}
