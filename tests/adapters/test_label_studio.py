"""The backend of Label Studio, called as Label Studio 1.23.2 calls it, with the SAM 3 server behind it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from tests.adapters.label_studio_files import (
    CIRCLES,
    CIRCLES_PATH,
    LARGE_PATH,
    PERSONAL_TOKEN,
    RADIUS_PX,
    SAMPLE,
    SAMPLE_PATH,
    TEXT_PATH,
    TOKEN,
    label_studio_files,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sam3_client import Instance
    from sam3_runner.instances import Mask

pytest.importorskip("label_studio_sdk", reason="needs .venv/annotation (make test)")
if "SAM3_URL" not in os.environ:
    pytest.skip("needs a server: python -m tests.adapters.with_server", allow_module_level=True)

from label_studio_sdk.converter import Converter
from label_studio_sdk.converter.brush import decode_from_annotation

from adapters.label_studio.errors import ImageUnavailable, UnsupportedInterface
from adapters.label_studio.images import ImageSource
from adapters.label_studio.interface import Label, read_interface
from adapters.label_studio.predictor import Options, Predictor
from sam3_client import Client

ROOT = Path(__file__).parents[2]
CONFIG = """
<View>
  <Image name="image" value="$image"/>
  <BrushLabels name="brush" toName="image">
    <Label value="Violet disc" alias="purple circle"/>
  </BrushLabels>
  <PolygonLabels name="polygon" toName="image">
    <Label value="Triangle" prompt="triangles"/>
    <Label value="zebra"/>
    <Label value="Example" prompt=""/>
    <Label value="purple circle"/>
  </PolygonLabels>
  <RectangleLabels name="example" toName="image" smart="true">
    <Label value="Example"/>
  </RectangleLabels>
</View>
"""


@contextmanager
def backend_process(log: Path, environment: dict[str, str]) -> Iterator[httpx.Client]:
    """The backend as its users start it; a client of it with Label Studio's timeouts for predictions."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "adapters.label_studio", "--port", str(port)]
    with log.open("wb") as output, httpx.Client(base_url=url, timeout=100.0) as client:
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stderr=output)
        try:
            until_s = time.monotonic() + 60
            while time.monotonic() < until_s:
                assert process.poll() is None, log.read_text()
                try:
                    client.get("/health")
                    break
                except httpx.TransportError:
                    time.sleep(0.05)  # not listening yet
            yield client
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture(scope="module")
def label_studio() -> Iterator[str]:
    """The URL of what serves the tasks' files."""
    with label_studio_files() as url:
        yield url


@pytest.fixture(scope="module")
def backend(label_studio: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """The backend that the tests share."""
    log = tmp_path_factory.mktemp("backend") / "log"
    environment = {"LABEL_STUDIO_URL": label_studio, "LABEL_STUDIO_API_KEY": TOKEN}
    with backend_process(log, environment) as client:
        yield client


def prediction_request(*images: str, config: str = CONFIG, drawn: list[Any] | None = None) -> dict[str, Any]:
    """What Label Studio posts to /predict."""
    tasks = [{"id": number, "data": {"image": image}, "project": 1} for number, image in enumerate(images, 1)]
    context = None if drawn is None else {"result": drawn}
    return {
        "tasks": tasks,
        "project": "1.1764204542",
        "label_config": config,
        "params": {"login": None, "password": None, "context": context},
    }


def rectangle(label: str, x0: float, y0: float, x1: float, y1: float) -> dict[str, Any]:
    """A region that a person drew on a picture of 600 x 400 px."""
    return {
        "type": "rectanglelabels",
        "from_name": "example",
        "to_name": "image",
        "original_width": 600,
        "original_height": 400,
        "value": {
            "x": x0 / 6,
            "y": y0 / 4,
            "width": (x1 - x0) / 6,
            "height": (y1 - y0) / 4,
            "rotation": 0,
            "rectanglelabels": [label],
        },
    }


def iou(one: Mask, other: Mask) -> float:
    return float((one & other).sum() / (one | other).sum())


def found(prompt: str) -> list[Instance]:
    """What the server finds without an adapter."""
    with Client() as client:
        return client.segment(SAMPLE, prompt).instances


def polygon_masks(regions: list[dict[str, Any]], folder: Path) -> list[Mask]:
    """The masks that Label Studio's own export to COCO gives for polygons."""
    exported = folder / "tasks.json"
    annotation = {"id": 1, "completed_by": 1, "result": [region | {"id": "r"} for region in regions]}
    exported.write_text(json.dumps([{"id": 1, "data": {"image": str(SAMPLE)}, "annotations": [annotation]}]))
    Converter(CONFIG, str(folder)).convert_to_coco(str(exported), str(folder / "coco"), is_dir=False)
    document = json.loads((folder / "coco" / "result.json").read_text())
    return [
        coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(each["segmentation"], 720, 1280))).astype(bool)
        for each in document["annotations"]
    ]


def test_a_task_gets_each_label_in_the_form_of_its_tag(backend: httpx.Client, tmp_path: Path) -> None:
    """Brush and polygons are the server's masks, under the labels' names; what is not there has no region."""
    setup = {"project": "1.1764204542", "schema": CONFIG, "hostname": "http://elsewhere", "access_token": "x"}
    version = backend.post("/setup", json=setup).raise_for_status().json()["model_version"]
    answer = backend.post("/predict", json=prediction_request(SAMPLE_PATH)).raise_for_status()
    [prediction] = answer.json()["results"]
    assert prediction["model_version"] == version
    assert version.startswith("SAM 3 demo ")

    discs, triangles = found("purple circle"), found("triangles")
    brushes = [region for region in prediction["result"] if region["from_name"] == "brush"]
    shapes = [region for region in prediction["result"] if region["from_name"] == "polygon"]
    assert [region["value"]["brushlabels"] for region in brushes] == [["purple circle"]] * len(discs)
    assert [region["value"]["polygonlabels"] for region in shapes] == [["Triangle"]] * len(triangles)
    assert [region["score"] for region in brushes + shapes] == [each.score for each in discs + triangles]
    assert prediction["score"] == max(each.score for each in discs + triangles)

    described = [
        region["value"] | {key: region[key] for key in ("type", "original_width", "original_height")}
        for region in brushes
    ]
    layers = decode_from_annotation("brush", described).values()
    for layer, instance in zip(layers, discs, strict=True):
        assert np.array_equal(layer > 0, instance.mask)
    for mask, instance in zip(polygon_masks(shapes, tmp_path), triangles, strict=True):
        assert iou(mask, instance.mask) > 0.97


def test_a_rectangle_finds_what_is_like_it(backend: httpx.Client) -> None:
    """A rectangle round one red circle, under a label without a text, gives every red circle this label."""
    (x, y), *_ = CIRCLES["red"]
    drawn = [rectangle("Example", x - RADIUS_PX, y - RADIUS_PX, x + RADIUS_PX, y + RADIUS_PX)]
    answer = backend.post("/predict", json=prediction_request(CIRCLES_PATH, drawn=drawn)).raise_for_status()
    [prediction] = answer.json()["results"]
    regions = prediction["result"]
    assert {tuple(region["value"]["polygonlabels"]) for region in regions} == {("Example",)}
    assert len({region["id"] for region in regions}) == len(regions)
    middles = [np.mean(region["value"]["points"], axis=0) * (6.0, 4.0) for region in regions]
    assert len(middles) == len(CIRCLES["red"])
    for centre in CIRCLES["red"]:
        assert min(float(np.abs(middle - centre).max()) for middle in middles) < 6


def test_one_bad_task_does_not_cost_the_others(backend: httpx.Client) -> None:
    """Label Studio stores the predictions that there are, and logs the sentence of the other task."""
    answer = backend.post("/predict", json=prediction_request("/data/upload/1/gone.jpg", SAMPLE_PATH))
    gone, sample = answer.raise_for_status().json()["results"]
    assert "answered 404 for the image" in gone["error"]
    assert "result" not in gone
    assert sample["result"]


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        (prediction_request(LARGE_PATH), 422, "more than 10 MB"),
        (prediction_request(TEXT_PATH), 422, "no picture"),
        (prediction_request("http://169.254.169.254/latest"), 422, "--image-host 169.254.169.254"),
        (prediction_request("file:///etc/passwd"), 422, "use http or https"),
        (prediction_request(""), 422, 'has no image in "image"'),
        (prediction_request(SAMPLE_PATH, drawn=[rectangle("Other", 1, 1, 9, 9)]), 400, 'label "Other"'),
        (prediction_request(SAMPLE_PATH, drawn=[{"type": "keypointlabels"}]), 400, "Draw a rectangle"),
        (prediction_request(SAMPLE_PATH, config="<View/>"), 400, "no PolygonLabels or BrushLabels"),
        (prediction_request(SAMPLE_PATH, config="<View"), 400, "could not be read"),
        ({"tasks": 1}, 400, "no list of tasks"),
    ],
)
def test_a_refusal_is_a_sentence(
    backend: httpx.Client, body: dict[str, Any], status: int, sentence: str
) -> None:
    """Of the body and of the status line: Label Studio shows annotators the latter alone."""
    answer = backend.post("/predict", json=body)
    assert answer.status_code == status
    assert sentence in answer.json()["error"]
    assert sentence in answer.reason_phrase


def test_a_server_that_is_away_and_a_wrong_password(label_studio: str, tmp_path: Path) -> None:
    """Label Studio learns at the setup that nothing answers; without the password it learns nothing."""
    environment = {
        "SAM3_URL": "http://127.0.0.1:9",
        "LABEL_STUDIO_URL": label_studio,
        "LABEL_STUDIO_API_KEY": TOKEN,
        "BASIC_AUTH_USER": "studio",
        "BASIC_AUTH_PASS": "secret",
    }
    with backend_process(tmp_path / "log", environment) as client:
        assert client.get("/health").status_code == 401
        assert client.get("/health", auth=("studio", "wrong")).status_code == 401
        client.auth = httpx.BasicAuth("studio", "secret")
        assert client.get("/health").json()["status"] == "UP"
        answer = client.post("/setup", json={"project": "1.1", "schema": CONFIG})
        assert answer.status_code == 503
        assert "nothing answers at http://127.0.0.1:9" in answer.json()["error"]
        assert "nothing answers at http://127.0.0.1:9" in answer.reason_phrase


def test_a_personal_token_and_an_image_in_cloud_storage(label_studio: str) -> None:
    """The token is exchanged for one that Label Studio accepts; the storage that it leads to gets neither."""
    images = ImageSource(label_studio, PERSONAL_TOKEN, max_bytes=1_000_000)
    assert images.fetch("s3://bucket/sample.jpg", 1) == SAMPLE.read_bytes()
    with pytest.raises(ImageUnavailable, match="refused LABEL_STUDIO_API_KEY"):
        ImageSource(label_studio, "header.other.signature", max_bytes=1).fetch(SAMPLE_PATH, 1)


def test_no_task_is_begun_after_the_time_limit(label_studio: str) -> None:
    """The first has its prediction; the others are to be retrieved again."""
    images = ImageSource(label_studio, TOKEN, max_bytes=1_000_000)
    with Client() as client:
        predictor = Predictor(client, client, images, Options(time_limit_s=0.0))
        tasks = prediction_request(SAMPLE_PATH, SAMPLE_PATH)["tasks"]
        first, second = predictor.predict(tasks, read_interface(CONFIG))
    assert first["result"]
    assert "No time was left for this task" in second["error"]


def test_labels_and_their_texts() -> None:
    """The attribute `prompt`, else the alias, else the value; a label of two tags belongs to the first."""
    brush, polygon = read_interface(CONFIG).tags
    assert (brush.name, brush.form, brush.image_key) == ("brush", "brush", "image")
    assert brush.labels == (Label("purple circle", "purple circle"),)
    assert polygon.labels == (Label("Triangle", "triangles"), Label("zebra", "zebra"), Label("Example", ""))
    with pytest.raises(UnsupportedInterface, match="several pages"):
        read_interface(CONFIG.replace('value="$image"', 'valueList="$pages"'))
