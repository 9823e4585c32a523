"""A local HTTP server that replaces Vast.ai, and records the requests of the real `vastai`."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

LOG_TEXT = "a line of the container's log"
OFFER = {"id": 4242, "gpu_name": "H100 SXM", "num_gpus": 1, "dph_total": 2.5}


@dataclass(frozen=True, slots=True)
class RecordedRequest:
    """One request: its method, its path without the query, its JSON body, and its credentials."""

    method: str
    path: str
    body: Any
    authorization: str | None


@dataclass
class VastApi:
    """The requests so far, and the account's variables."""

    url: str
    variables: dict[str, str] = field(default_factory=dict)
    requests: list[RecordedRequest] = field(default_factory=list)

    @property
    def changes(self) -> list[RecordedRequest]:
        """The requests other than GET."""
        return [request for request in self.requests if request.method != "GET"]


@contextmanager
def vast_api() -> Iterator[VastApi]:
    """Run the server until the end of the block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    api = VastApi(f"http://127.0.0.1:{server.server_port}")
    server.api = api  # type: ignore[attr-defined]
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield api
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    """Records each request; answers what `vastai` needs to continue."""

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815 - http.server's names

    def _serve(self) -> None:
        api: VastApi = self.server.api  # type: ignore[attr-defined]
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        body = json.loads(sent) if sent else None
        api.requests.append(RecordedRequest(self.command, path, body, self.headers.get("Authorization")))
        text = LOG_TEXT if path == "/log.txt" else json.dumps(_answer(api, self.command, path))
        self.send_response(200)
        self.send_header("Content-Type", "text/plain" if path == "/log.txt" else "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
        """Log nothing."""


def _answer(api: VastApi, method: str, path: str) -> dict[str, Any]:
    answers: dict[str, dict[str, Any]] = {
        "POST /api/v0/bundles/": {"offers": [OFFER]},
        "POST /api/v0/template/": {"success": True, "template": {"hash_id": "0123abcd"}},
        f"PUT /api/v0/asks/{OFFER['id']}/": {"success": True, "new_contract": 77},
        "PUT /api/v0/instances/request_logs/77/": {"success": True, "result_url": f"{api.url}/log.txt"},
        "GET /api/v0/secrets/": {"secrets": api.variables},
        "GET /api/v0/instances/77/": {"instances": {"id": 77, "start_date": 0.0, "extra_env": []}},
        "GET /api/v1/instances/": {"instances": [], "total_instances": 0, "label_counts": {}},
    }
    return answers.get(f"{method} {path}", {"success": True})
