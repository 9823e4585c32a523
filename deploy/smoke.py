"""Send one real task to a running server, and check the answer, the row and the mask.

    .venv/bin/python deploy/smoke.py https://sam3.example.com --env-file /etc/sam3/smoke.env --user-id UUID

It reads the server's variables from `--env-file` or the environment: API_SECRET_KEY; R2_* and SUPABASE_*, or
DATA_DIR if the server's stores are embedded. SUPABASE_SERVICE_KEY must be a key that may insert and delete
rows, like the Edge's. It prints one line for each step. Exit status 0: success, 1: a step failed, 2: wrong
arguments. After a success the script deletes what it made; after a failure it deletes nothing.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sqlite3
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from uuid import UUID, uuid4

import boto3
import httpx
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from dotenv import dotenv_values
from PIL import Image, ImageChops, ImageDraw

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PICTURE_SIZE_PX = (640, 480)
CIRCLE_PX = (220, 130, 420, 330)
PROMPT = "red circle"
"""Describes the image that this script draws. The demo checkpoint finds it too."""
MIN_IOU = 0.7
POLL_S = 1.0
STORE_TIMEOUT_S = 30.0


class StepFailed(Exception):
    """A check of a step failed; the message says what was found."""


FAILURES = (StepFailed, httpx.HTTPError, BotoCoreError, ClientError, OSError, sqlite3.Error, KeyError)
"""Errors that fail a step. KeyError: the answer lacks a field."""


class Images(Protocol):
    """The server's store of images and masks."""

    def put(self, key: str, data: bytes) -> None: ...
    def get(self, key: str) -> bytes: ...
    def delete(self, key: str) -> None: ...


class Rows(Protocol):
    """The server's store of rows. `insert` returns a note for the report; `get` of a missing row is None."""

    def insert(self, task: Mapping[str, str]) -> str: ...
    def get(self, task_id: str) -> dict[str, Any] | None: ...
    def delete(self, task_id: str) -> None: ...


class R2Images:
    """The bucket. If it has a public URL, masks are read from there, as browsers do."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._bucket = variables.get("R2_BUCKET", "s3-images")
        self._public_base_url = variables.get("R2_PUBLIC_BASE_URL", "").rstrip("/")
        self._client = boto3.client(
            "s3",
            endpoint_url=variables["R2_ENDPOINT"],
            region_name="auto",
            aws_access_key_id=variables["R2_ACCESS_KEY_ID"],
            aws_secret_access_key=variables["R2_SECRET_ACCESS_KEY"],
            config=Config(
                s3={"addressing_style": "path"},
                connect_timeout=STORE_TIMEOUT_S,
                read_timeout=STORE_TIMEOUT_S,
                # R2 refuses boto3's default checksum trailers.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )

    def put(self, key: str, data: bytes) -> None:
        self._client.put_object(Bucket=self._bucket, Key=key, Body=data, ContentType="image/png")

    def get(self, key: str) -> bytes:
        if not self._public_base_url:
            return self._client.get_object(Bucket=self._bucket, Key=key)["Body"].read()
        answer = httpx.get(f"{self._public_base_url}/{key}", timeout=STORE_TIMEOUT_S)
        if answer.status_code != httpx.codes.OK:
            raise StepFailed(f"{answer.status_code} for {key} at R2_PUBLIC_BASE_URL")
        return answer.content

    def delete(self, key: str) -> None:
        self._client.delete_object(Bucket=self._bucket, Key=key)


class FolderImages:
    """The embedded folder. The server's path of it may differ, for example in a container."""

    def __init__(self, data_dir: Path) -> None:
        self._root = data_dir / "storage"

    def put(self, key: str, data: bytes) -> None:
        path = self._root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def get(self, key: str) -> bytes:
        return (self._root / key).read_bytes()

    def delete(self, key: str) -> None:
        (self._root / key).unlink()


class SupabaseRows:
    """The table in Supabase, through its REST API."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        key = variables["SUPABASE_SERVICE_KEY"]
        # A secret key (sb_secret_...) is not a JWT, and Supabase refuses it as a bearer token.
        bearer = {} if key.startswith("sb_") else {"Authorization": f"Bearer {key}"}
        apikey = variables.get("SUPABASE_PUBLISHABLE_KEY", key)
        self._http = httpx.Client(
            base_url=f"{variables['SUPABASE_URL'].rstrip('/')}/rest/v1/",
            headers={"apikey": apikey, **bearer},
            timeout=STORE_TIMEOUT_S,
        )

    def insert(self, task: Mapping[str, str]) -> str:
        self._request("POST", json=dict(task))
        return "inserted as pending, as the Edge does"

    def get(self, task_id: str) -> dict[str, Any] | None:
        found: list[dict[str, Any]] = _json_of(self._request("GET", params={"id": f"eq.{task_id}"}))
        return found[0] if found else None

    def delete(self, task_id: str) -> None:
        self._request("DELETE", params={"id": f"eq.{task_id}"})

    def _request(self, method: str, **options: Any) -> httpx.Response:
        answer = self._http.request(method, "segmentation_results", **options)
        if answer.is_error:
            error = _json_of(answer)
            raise StepFailed(
                f"Supabase answered {answer.status_code} {error.get('code')}: {error.get('message')}"
            )
        return answer


class SqliteRows:
    """The embedded results file, read-only: the server inserts and keeps its rows."""

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / "results.sqlite"

    def insert(self, task: Mapping[str, str]) -> str:
        del task
        return "inserted by the server, whose results are embedded"

    def get(self, task_id: str) -> dict[str, Any] | None:
        rows = sqlite3.connect(f"{self._path.absolute().as_uri()}?mode=ro", uri=True, timeout=STORE_TIMEOUT_S)
        rows.row_factory = sqlite3.Row
        try:
            found = rows.execute("SELECT * FROM segmentation_results WHERE id = ?", (task_id,)).fetchone()
        finally:
            rows.close()
        return None if found is None else dict(found) | {"labels": json.loads(found["labels"])}

    def delete(self, task_id: str) -> None:
        del task_id


class Smoke:
    """One task from its upload to its mask. Each public method is a step and returns a note for the report.

    Args:
        http: client of the server.
        images: the server's store of images.
        rows: the server's store of rows.
        user_id: owner of the task.
        image_key: an image that is already stored; None draws one and uploads it.
        prompt: what to find in the image.
    """

    def __init__(
        self,
        http: httpx.Client,
        images: Images,
        rows: Rows,
        *,
        user_id: str,
        image_key: str | None,
        prompt: str,
    ) -> None:
        self.task_id = str(uuid4())
        self._http = http
        self._images = images
        self._rows = rows
        self._user_id = user_id
        self._draws = image_key is None
        self._image_key = image_key or f"uploads/{user_id}/smoke-{self.task_id}"
        self._prompt = prompt
        self._answer: dict[str, Any] = {}

    def health(self, wait_s: float) -> str:
        """Wait until the model is loaded; `wait_s` 0 checks once."""
        until_s = time.monotonic() + wait_s
        while True:
            try:
                return self._loaded_model()
            except (StepFailed, httpx.TransportError):
                if time.monotonic() >= until_s:
                    raise
            time.sleep(POLL_S)

    def model(self) -> str:
        """Check that the key is accepted, and report the model."""
        info = self._ok(self._http.get("/api/v1/model/info"))
        return f"{info['model_name']} {info['model_version']}, {info['dtype']} on {info['device']}"

    def picture(self) -> str:
        """Upload the image, unless --image-key names a stored one."""
        if not self._draws:
            return f"{self._image_key}, which is already stored"
        picture = Image.new("RGB", PICTURE_SIZE_PX, (225, 225, 220))
        ImageDraw.Draw(picture).ellipse(CIRCLE_PX, fill=(210, 30, 30))
        file = io.BytesIO()
        picture.save(file, "PNG")
        self._images.put(self._image_key, file.getvalue())
        return f"uploaded {len(file.getvalue())} bytes as {self._image_key}"

    def insert_row(self) -> str:
        """Insert the row, as the Edge does before its call."""
        return self._rows.insert(
            {
                "id": self.task_id,
                "user_id": self._user_id,
                "source_image_url": self._image_key,
                "text_prompt": self._prompt,
            }
        )

    def predict(self) -> str:
        """Send the task, and check that the prompt was found."""
        body = {
            "task_id": self.task_id,
            "user_id": self._user_id,
            "image_url": self._image_key,
            "text_prompt": self._prompt,
        }
        self._answer = self._ok(self._http.post("/api/v1/predict", json=body))
        if self._answer["labels"] != [self._prompt]:
            raise StepFailed(f"found nothing for {self._prompt!r} in the image")
        return (
            f"found {self._prompt!r} with confidence {self._answer['confidence']:.2f}"
            f" in {self._answer['inference_time_ms']:.0f} ms of inference"
        )

    def settled_row(self) -> str:
        """Check that the row is done and equals the answer."""
        row = self._rows.get(self.task_id)
        if row is None:
            raise StepFailed("the task's row is missing: does the server use the same database?")
        mask_url = row.get("mask_image_url", row.get("mask_url"))
        found = (row["status"], row["labels"], mask_url)
        if found != ("done", self._answer["labels"], self._answer["mask_url"]):
            raise StepFailed(f"the row differs from the answer: status {row['status']}, mask {mask_url}")
        return "done, with the labels and the mask of the answer"

    def mask(self) -> str:
        """Check that the mask is a PNG of the image's size, and shows the object."""
        with Image.open(io.BytesIO(self._images.get(self._mask_key()))) as file:
            kind, mask = file.format, file.convert("L")
        size_px = (self._answer["image_width"], self._answer["image_height"])
        if (kind, mask.size) != ("PNG", size_px):
            raise StepFailed(f"the mask is a {kind} of {mask.size} pixels, not a PNG of {size_px}")
        pixels = mask.histogram()[255]
        if pixels == 0:
            raise StepFailed("the mask is empty")
        if not self._draws:
            return f"PNG, {size_px[0]} x {size_px[1]}, {pixels} pixels"
        overlap = _iou(mask)
        if overlap < MIN_IOU:
            raise StepFailed(f"the mask overlaps the drawn circle with an IoU of {overlap:.2f} only")
        return f"PNG, {size_px[0]} x {size_px[1]}, {pixels} pixels, IoU {overlap:.3f} with the drawn circle"

    def clean_up(self) -> str:
        """Delete row, mask and image."""
        self._rows.delete(self.task_id)
        self._images.delete(self._mask_key())
        if self._draws:
            self._images.delete(self._image_key)
        return "deleted what this run made"

    def _loaded_model(self) -> str:
        health = _json_of(self._http.get("/health"))
        if health.get("status") != "ok" or not health.get("model_loaded"):
            detail = health.get("detail", "no detail")
            raise StepFailed(f"status {health.get('status')}, the model is not loaded: {detail}")
        return f"model loaded on {health.get('gpu_name', 'the CPU')}"

    def _mask_key(self) -> str:
        url, prefix = self._answer["mask_url"], f"masks/{self._user_id}/{self.task_id}/"
        if prefix not in url:
            raise StepFailed(f"the mask's URL does not name the task: {url}")
        return str(url[url.index(prefix) :])

    def _ok(self, answer: httpx.Response) -> dict[str, Any]:
        body: dict[str, Any] = _json_of(answer)
        if answer.status_code != httpx.codes.OK:
            error = body.get("error", {})
            raise StepFailed(f"{answer.status_code} {error.get('code')}: {error.get('message')}")
        return body


def main() -> int:
    """Run the steps until one fails."""
    arguments, variables = _read()
    key = variables["API_SECRET_KEY"].split(",")[0].strip()
    data_dir = Path(variables.get("DATA_DIR", ""))
    with httpx.Client(
        base_url=arguments.url.rstrip("/"), headers={"X-API-Key": key}, timeout=arguments.timeout_s
    ) as http:
        smoke = Smoke(
            http,
            R2Images(variables) if "R2_ENDPOINT" in variables else FolderImages(data_dir),
            SupabaseRows(variables) if "SUPABASE_URL" in variables else SqliteRows(data_dir),
            user_id=arguments.user_id,
            image_key=arguments.image_key,
            prompt=arguments.prompt,
        )
        steps: list[tuple[str, Callable[[], str]]] = [
            ("health", lambda: smoke.health(arguments.wait_s)),
            ("model", smoke.model),
            ("picture", smoke.picture),
            ("pending row", smoke.insert_row),
            ("predict", smoke.predict),
            ("settled row", smoke.settled_row),
            ("mask", smoke.mask),
        ]
        if not arguments.keep:
            steps.append(("clean up", smoke.clean_up))
        started_s = time.monotonic()
        for name, step in steps:
            step_started_s = time.monotonic()
            try:
                outcome, note = "ok", step()
            except FAILURES as error:
                outcome, note = "FAIL", _describe(error)
            _print(f"{outcome:4}  {name:11}  {time.monotonic() - step_started_s:6.2f} s  {note}")
            if outcome == "FAIL":
                _print(f"FAILED at {name}: task {smoke.task_id}")
                return 1
    _print(f"PASSED in {time.monotonic() - started_s:.1f} s: task {smoke.task_id}")
    return 0


def _read() -> tuple[argparse.Namespace, dict[str, str]]:
    """Read the arguments and the variables. Exits with status 2 if something is missing."""
    parser = argparse.ArgumentParser(
        description="Send one real task to a running server and check its result."
    )
    parser.add_argument("url", help="the server's URL, such as https://sam3.example.com")
    parser.add_argument("--env-file", type=Path, help="NAME=value lines; the environment overrides them")
    parser.add_argument("--user-id", help="owner of the task; with Supabase the id of an existing user")
    parser.add_argument("--image-key", help="a stored image, below uploads/USER_ID/; default: draw one")
    parser.add_argument("--prompt", help=f"what to find in the image; default: {PROMPT}, as the script draws")
    parser.add_argument("--wait-s", type=float, default=0.0, help="time to load the model; default: 0")
    parser.add_argument("--timeout-s", type=float, default=90.0, help="timeout of each request; default: 90")
    parser.add_argument("--keep", action="store_true", help="do not delete what this run makes")
    arguments = parser.parse_args()
    if arguments.env_file and not arguments.env_file.is_file():
        parser.error(f"--env-file {arguments.env_file} does not exist: correct the path")
    given = {**(dotenv_values(arguments.env_file) if arguments.env_file else {}), **os.environ}
    variables = {name: value.strip() for name, value in given.items() if value and value.strip()}
    needed = ["API_SECRET_KEY"]
    needed += ["R2_ACCESS_KEY_ID", "R2_SECRET_ACCESS_KEY"] if "R2_ENDPOINT" in variables else ["DATA_DIR"]
    needed += ["SUPABASE_SERVICE_KEY"] if "SUPABASE_URL" in variables else ["DATA_DIR"]
    missing = [name for name in dict.fromkeys(needed) if name not in variables]
    if missing:
        parser.error(
            f"{', '.join(missing)} missing: set the server's values in --env-file or the environment"
            " (R2_* and SUPABASE_*, or DATA_DIR if its stores are embedded)"
        )
    if "SUPABASE_URL" in variables and not _is_uuid(arguments.user_id):
        parser.error("--user-id must be the id (a UUID) of an existing Supabase user")
    if bool(arguments.image_key) != bool(arguments.prompt):
        parser.error("--image-key and --prompt must be used together: --prompt names an object in that image")
    arguments.user_id = arguments.user_id or "smoke-test"
    arguments.prompt = arguments.prompt or PROMPT
    return arguments, variables


def _is_uuid(text: str | None) -> bool:
    try:
        return bool(UUID(text or ""))
    except ValueError:
        return False


def _json_of(answer: httpx.Response) -> Any:
    try:
        return answer.json()
    except ValueError:
        raise StepFailed(
            f"{answer.status_code}, and the body is not JSON: is this the server's URL?"
        ) from None


def _iou(mask: Image.Image) -> float:
    """IoU of `mask` and the drawn circle."""
    if mask.size != PICTURE_SIZE_PX:
        return 0.0
    truth = Image.new("L", PICTURE_SIZE_PX)
    ImageDraw.Draw(truth).ellipse(CIRCLE_PX, fill=255)
    return ImageChops.darker(mask, truth).histogram()[255] / ImageChops.lighter(mask, truth).histogram()[255]


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, StepFailed) else f"{type(error).__name__}: {error}"


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
