"""Every form of an answer through Cloudflare's local R2 and PostgREST: what is stored, named and replayed."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import httpx
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from commands.local_server import local_server
from task_answer import MAX_METADATA_BYTES
from tests import new_connection
from tests.drawn import scene
from tests.edge import BATCH, PREDICT, error_of, png_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from commands.local_server import LocalServer
    from tests.services.database import Database
    from tests.services.objects import S3Service

pytestmark = [
    pytest.mark.server,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

DRAWN = scene(7, 1280, 960)
PROMPT = DRAWN.names[0]
OUTPUTS = ["mask", "instances", "label_map", "overlay", "coco"]
LONG_PROMPTS = [*DRAWN.names[:4], "circle", "square", "triangle", "star"]


@dataclass(frozen=True)
class Deployment:
    """The server on R2 and Supabase, and one user of it."""

    server: LocalServer
    database: Database
    objects: S3Service
    user_id: str

    def new_task(self, image: Image.Image, prompt: str | list[str], **options: Any) -> dict[str, Any]:
        """Upload the image and insert its pending row; returns the request's body."""
        key, task_id = f"uploads/{self.user_id}/{uuid4()}", str(uuid4())
        self.objects.put(key, png_bytes(image))
        prompts = [prompt] if isinstance(prompt, str) else prompt
        self.database.execute(
            "insert into segmentation_results (id, user_id, source_image_url, text_prompt)"
            " values (%s, %s, %s, %s)",
            *(task_id, self.user_id, key, ", ".join(prompts)),
        )
        field = "text_prompt" if isinstance(prompt, str) else "prompts"
        return {"image_url": key, field: prompt, "user_id": self.user_id, "task_id": task_id, **options}

    def send(self, body: dict[str, Any]) -> httpx.Response:
        path = BATCH if "prompts" in body else PREDICT
        return new_connection.post(
            f"{self.server.url}{path}", json=body, headers=self.server.headers, timeout=90
        )

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        response = self.send(body)
        assert response.status_code == httpx.codes.OK, response.text
        found: dict[str, Any] = response.json()
        return found

    def metadata(self, body: dict[str, Any]) -> dict[str, Any]:
        [[status, metadata]] = self.database.execute(
            "select status, metadata from segmentation_results where id = %s", body["task_id"]
        )
        assert status == "done"
        return dict(metadata)

    def set_metadata(self, body: dict[str, Any], metadata: dict[str, Any]) -> None:
        """Change the row like its user."""
        self.database.execute(
            "update segmentation_results set metadata = %s::jsonb where id = %s",
            *(json.dumps(metadata), body["task_id"]),
        )


@pytest.fixture(scope="module")
def deployed(
    tmp_path_factory: pytest.TempPathFactory, database: Database, r2_emulator: S3Service
) -> Iterator[Deployment]:
    """One server for all tests."""
    settings = {**r2_emulator.settings(), **database.settings(), "API_WORKERS": "1"}
    with local_server(tmp_path_factory.mktemp("outputs"), settings) as server:
        yield Deployment(server, database, r2_emulator, database.add_user())


def file_at(url: str, content_type: str) -> bytes:
    """The file at a public URL, which has this content type."""
    response = new_connection.get(url)
    assert response.status_code == httpx.codes.OK, url
    assert response.headers["Content-Type"] == content_type
    return response.content


def levels_at(url: str) -> Any:
    """The px of the PNG at a URL."""
    with Image.open(io.BytesIO(file_at(url, "image/png"))) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def test_every_output_is_stored_with_its_type_and_content(deployed: Deployment) -> None:
    """Each URL has its file, all files agree on the masks, and the answer is replayed from the row."""
    body = deployed.new_task(DRAWN.image, PROMPT, outputs=OUTPUTS, segmentation="coco_rle")
    answer = deployed.answer(body)
    mask, label_map = levels_at(answer["mask_url"]) > 0, levels_at(answer["outputs"]["label_map"])
    assert mask.shape == label_map.shape == (960, 1280)
    assert ((label_map > 0) == mask).all()
    coco = json.loads(file_at(answer["outputs"]["coco"], "application/json"))
    annotations = {each["id"]: each for each in coco["annotations"]}
    assert answer["instances"]
    for found in answer["instances"]:
        number = found["number"]
        own = coco_mask.decode(found["segmentation"]).astype(bool)
        assert own.sum() == found["area"] == annotations[number]["area"]
        assert own[label_map == number].all()
        crop, (left, top) = levels_at(found["mask_url"]) > 0, found["mask_offset"]
        height, width = crop.shape
        assert (own[top : top + height, left : left + width] == crop).all()
        assert crop.sum() == own.sum()
    with Image.open(io.BytesIO(file_at(answer["outputs"]["overlay"], "image/jpeg"))) as overlay:
        assert (overlay.format, overlay.size) == ("JPEG", (1280, 960))
    metadata = deployed.metadata(body)
    assert metadata["results"][0]["instances"] == answer["instances"]
    for name in ("outputs", "model", "timings_ms", "settings"):
        assert metadata[name] == answer[name]
    assert len(json.dumps(metadata)) <= MAX_METADATA_BYTES
    assert not {"answer_url", "left_out"} & metadata.keys()
    stored = deployed.objects.keys(f"masks/{deployed.user_id}/{body['task_id']}/")
    assert len(stored) == 4 + len(answer["instances"])
    assert deployed.answer(body) == answer
    assert deployed.objects.keys(f"masks/{deployed.user_id}/{body['task_id']}/") == stored


def test_long_answer_is_replayed_from_its_file(deployed: Deployment) -> None:
    """An answer over the row's limit is stored as a file, from which a repeat is answered."""
    image = DRAWN.image.resize((3840, 2880), Image.Resampling.NEAREST)
    body = deployed.new_task(image, LONG_PROMPTS, segmentation="polygons", score_threshold=0.02)
    answer = deployed.answer(body)
    assert "left_out" not in answer
    metadata = deployed.metadata(body)
    assert metadata["left_out"] == ["segmentation"]
    assert len(json.dumps(metadata)) <= MAX_METADATA_BYTES
    assert len(json.dumps(answer["results"])) > MAX_METADATA_BYTES
    assert json.loads(file_at(metadata["answer_url"], "application/json")) == answer
    assert deployed.answer(body) == answer
    # Neither from another user's file nor from a file that is no answer.
    mask_url = answer["results"][0]["mask_url"]
    foreign = metadata["answer_url"].replace(deployed.user_id, deployed.database.add_user())
    for url in (mask_url, foreign):
        deployed.set_metadata(body, {**metadata, "answer_url": url})
        status, code, message = error_of(deployed.send(body))
        assert (status, code) == (400, "INVALID_REQUEST")
        assert "no longer holds the result" in message


def test_changed_row_and_another_user_get_no_replay(deployed: Deployment) -> None:
    """What the row's user has written, other options and other users are refused."""
    body = deployed.new_task(DRAWN.image, PROMPT, outputs=["coco"])
    answer = deployed.answer(body)
    metadata = deployed.metadata(body)
    other = deployed.send(body | {"outputs": ["coco", "overlay"]})
    assert error_of(other)[:2] == (400, "INVALID_REQUEST")
    stranger = deployed.database.add_user()
    assert error_of(deployed.send(body | {"user_id": stranger}))[0] in {403, 404}
    forged = {**metadata, "outputs": {"coco": "https://evil.example/coco.json"}}
    deployed.set_metadata(body, forged)
    assert error_of(deployed.send(body))[:2] == (400, "INVALID_REQUEST")
    deployed.set_metadata(body, metadata)
    assert deployed.answer(body) == answer
