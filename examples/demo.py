"""Does the Edge's steps for one image: upload, row, POST; then copies the overlay that the server drew.

Starts the real server with the embedded demo checkpoint, sends the request, copies the overlay and stops the
server. The last line of the output is the server's JSON answer.

    python -m examples.demo
    python -m examples.demo --image my.jpg --prompt "red circle" --prompt "stars"
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import httpx

from commands.local_server import ROOT, LocalServer, ServerFailedError, local_server
from results import SqliteResults, Task
from storage import LocalFolder

if TYPE_CHECKING:
    from collections.abc import Sequence

USER_ID = "demo-user"
PROMPTS = ("triangles", "purple circle", "red shape", "blue star")
REQUEST_TIMEOUT_S = 60.0


def main() -> int:
    """Run the demo; returns 0 if the task was done."""
    arguments = _parse()
    folder: Path = arguments.out.resolve()
    report(f"starting the server on the embedded demo checkpoint (its log: {folder / 'server.log'})")
    try:
        with local_server(folder) as server:
            report(f"ready after {server.ready_s:.1f} s at {server.url}")
            answer, mask_path = asyncio.run(run_task(server, arguments.image.read_bytes(), arguments.prompt))
    except ServerFailedError as error:
        report(str(error))
        return 1
    if "error" in answer:
        report(f"the server refused: {answer['error']['message']}")
        return 1
    overlay_path = folder / "overlay.jpg"
    shutil.copyfile(_path_of(answer["outputs"]["overlay"]), overlay_path)
    report(f"mask:    {mask_path}")
    report(f"overlay: {overlay_path}")
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0


async def run_task(server: LocalServer, image: bytes, prompts: Sequence[str]) -> tuple[dict[str, Any], Path]:
    """Upload, insert the row, POST, read the row; returns the answer, and the path of the task's mask."""
    task_id, key = str(uuid.uuid4()), f"uploads/{USER_ID}/{uuid.uuid4()}"
    LocalFolder(server.data_dir / "storage").put_upload(key, image)
    report(f"uploaded the image as {key}")
    # The lease only matters for claims; here the rows are inserted and read.
    rows = SqliteResults(server.data_dir / "results.sqlite", lease_s=0)
    task = Task(task_id=task_id, user_id=USER_ID, source_image_url=key, prompts=tuple(prompts))
    await rows.insert_pending(task)
    body: dict[str, Any] = {"image_url": key, "user_id": USER_ID, "task_id": task_id}
    body["outputs"] = ["mask", "overlay"]
    if len(prompts) == 1:
        path, body["text_prompt"] = "/api/v1/predict", prompts[0]
    else:
        path, body["prompts"] = "/api/v1/predict/batch", list(prompts)
    report(f"POST {path} {', '.join(prompts)}")
    async with httpx.AsyncClient(timeout=REQUEST_TIMEOUT_S) as client:
        response = await client.post(server.url + path, json=body, headers=server.headers)
    row = await rows.get(task_id)
    await rows.close()
    assert row is not None
    report(f"answer {response.status_code}; the row is {row.status}, labels {row.labels}")
    return response.json(), _path_of(row.mask_url or "file:///")


def report(line: str) -> None:
    """Print progress to stderr; stdout is for the answer."""
    sys.stderr.write(f"demo: {line}\n")


def _path_of(file_url: str) -> Path:
    return Path(url2pathname(urlparse(file_url).path))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--image", type=Path, default=ROOT / "examples" / "sample.jpg", help="PNG, JPEG or WEBP"
    )
    parser.add_argument("--prompt", action="append", help="a text prompt; repeat it for a batch of up to 10")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "demo", help="folder for what is written")
    arguments = parser.parse_args()
    arguments.prompt = arguments.prompt or list(PROMPTS)
    if not arguments.image.is_file():
        parser.error(f"no such image: {arguments.image}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
