"""Runs the example Edge in workerd, and acts as its users."""

from __future__ import annotations

import io
import json
import re
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
from PIL import Image

from tests.drawn import scene
from tests.edge import png_bytes, wait_for
from tests.services import node
from tests.services.objects import s3_client
from tests.services.processes import ServerProcess, http_status

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from tests.services.database import Database
    from tests.services.faults import FaultProxy, Seen

EDGE = Path(__file__).parent.parent / "examples" / "edge"
MAX_RETRIES = 4
TIMEOUT_S = 30.0
PICTURE = scene(405)


@dataclass(frozen=True, slots=True)
class Worker:
    """The Edge and its services.

    Attributes:
        url: of the Worker.
        database: of its users and tasks.
        backend: the proxy between the Worker and the real backend.
        bucket: the S3 API's settings of the Worker's bucket.
    """

    url: str
    database: Database
    backend: FaultProxy
    bucket: dict[str, str]

    def calls(self, task_id: str) -> list[Seen]:
        """The Worker's requests to the backend for one task."""
        return [seen for seen in self.backend.requests if json.loads(seen.body)["task_id"] == task_id]

    def keys(self, prefix: str) -> list[str]:
        """The bucket's keys, listed through the S3 API that the backend uses."""
        bucket = self.bucket
        credentials = bucket["R2_ACCESS_KEY_ID"], bucket["R2_SECRET_ACCESS_KEY"]
        with s3_client(bucket["R2_ENDPOINT"], *credentials) as client:
            listing = client.list_objects_v2(Bucket=bucket["R2_BUCKET"], Prefix=prefix)
            return [found["Key"] for found in listing.get("Contents", [])]


class User:
    """A user of `worker`, with a valid token or the given one."""

    def __init__(self, worker: Worker, token: str | None = None) -> None:
        self.id = worker.database.add_user()
        self.token = worker.database.user_jwt(self.id) if token is None else token
        self.http = httpx.Client(
            base_url=worker.url, headers={"Authorization": f"Bearer {self.token}"}, timeout=TIMEOUT_S
        )

    def upload_key(self) -> str:
        """Upload the image; returns its key."""
        response = self.upload()
        assert response.status_code == httpx.codes.CREATED, response.text
        image_key: str = response.json()["image_key"]
        return image_key

    def upload(self, data: bytes | None = None, content_type: str = "image/png") -> httpx.Response:
        """Upload the image, or `data`."""
        content = png_bytes(PICTURE.image) if data is None else data
        return self.http.post("/images", content=content, headers={"Content-Type": content_type})

    def begin(self, via: str, *prompts: str, image_key: str | None = None, **fields: Any) -> str:
        """Create a task, by default for a new upload of the image; returns its id."""
        image_key = image_key or self.upload_key()
        if prompts:
            fields |= {"text_prompt": prompts[0]} if len(prompts) == 1 else {"prompts": prompts}
        response = self.http.post("/tasks", json={"image_key": image_key, "via": via, **fields})
        assert response.status_code == httpx.codes.ACCEPTED, response.text
        task_id: str = response.json()["task_id"]
        return task_id

    def ended(self, task_id: str) -> dict[str, Any]:
        """Wait until the task has ended; returns the Worker's answer."""
        return wait_for(
            lambda: self.http.get(f"/tasks/{task_id}").json(),
            lambda task: task["status"] in {"done", "error"},
        )

    def mask(self, task_id: str) -> npt.NDArray[np.bool_]:
        """The task's mask, (height, width) bool."""
        response = self.http.get(f"/tasks/{task_id}/mask")
        assert response.status_code == httpx.codes.OK, response.text
        assert response.headers["Content-Type"] == "image/png"
        with Image.open(io.BytesIO(response.content)) as image:
            levels: npt.NDArray[np.uint8] = np.asarray(image)
        return levels > 0


def missing() -> str | None:
    """Why the Edge cannot run here; None if it can."""
    if node.missing() is not None:
        return node.missing()
    if not (EDGE / "node_modules" / "wrangler").is_dir():
        return "examples/edge/node_modules is missing (make test installs it with npm)"
    return None


def shipped_config() -> dict[str, Any]:
    """The example's configuration, with fewer and faster retries."""
    text = (EDGE / "wrangler.jsonc").read_text()
    config: dict[str, Any] = json.loads(re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE))
    config["main"] = str(EDGE / config["main"])
    config["queues"]["consumers"][0] |= {"max_retries": MAX_RETRIES, "retry_delay": 1}
    return config


def program() -> str:
    """The path of Node.js."""
    return node.node() or "node"


@contextmanager
def workerd(
    folder: Path, ports: tuple[int, int], config: dict[str, Any], variables: dict[str, str]
) -> Iterator[None]:
    """Run the Worker until the end of the block.

    Args:
        folder: for its objects and messages.
        ports: of 127.0.0.1: the Worker's, and its inspector's.
        config: of wrangler.
        variables: of the Worker.
    """
    port, inspector_port = ports
    (folder / "wrangler.json").write_text(json.dumps(config))
    (folder / ".dev.vars").write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
    command: list[str | Path] = [
        *(program(), EDGE / "node_modules" / "wrangler" / "bin" / "wrangler.js", "dev"),
        *("--config", folder / "wrangler.json", "--persist-to", folder / "state"),
        *("--ip", "127.0.0.1", "--port", str(port), "--inspector-port", str(inspector_port)),
        *("--show-interactive-dev-session=false",),
    ]
    environment = {
        "WRANGLER_SEND_METRICS": "false",
        "WRANGLER_LOG_PATH": str(folder / "wrangler-logs"),
        "XDG_CONFIG_HOME": str(folder),
        "CI": "1",
        # Otherwise it sends a request to Cloudflare.
        "CLOUDFLARE_CF_FETCH_ENABLED": "false",
    }

    def ready() -> bool:
        return http_status(f"http://127.0.0.1:{port}/tasks") == HTTPStatus.UNAUTHORIZED

    process = ServerProcess(command, folder / "edge.log", ready, environment=environment)
    process.start()
    try:
        yield
    finally:
        process.stop()
