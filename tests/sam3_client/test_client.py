"""The Python client against the real server: what is found, and every way in which a call fails."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from sam3_client import (
    AsyncClient,
    BadImage,
    Client,
    InvalidRequest,
    Sam3Error,
    ServerUnreachable,
    Unauthorized,
    UnsupportedImage,
)
from tests.drawn import Scene, iou, scene
from tests.edge import image_bytes, png_bytes

if TYPE_CHECKING:
    from commands.local_server import LocalServer
    from tests.sam3_client.conftest import Segment

pytestmark = pytest.mark.server

SEED = 200
ROOT = Path(__file__).parents[2]
NOBODY = {"url": "http://127.0.0.1:9", "max_wait_s": 0.3}


@pytest.fixture(scope="module")
def drawn() -> Scene:
    """A picture whose objects are known."""
    return scene(SEED)


def test_masks_of_several_prompts(segment: Segment, drawn: Scene) -> None:
    """Each prompt has its objects in its place in the order, with masks that fit the drawn ones."""
    prompts = [drawn.names[1], drawn.absent, drawn.names[0]]
    result = segment(drawn.image, prompts)
    assert result.prompts == prompts
    assert (result.width, result.height) == drawn.image.size == result.image.size
    assert set(result.labels) == {prompts[0], prompts[2]}
    assert result.labels == sorted(result.labels, key=prompts.index)
    assert result.masks.shape == (len(result.labels), *drawn.image.size[::-1])
    for instance, mask in zip(result.instances, result.masks, strict=True):
        assert instance.area == mask.sum()
        assert max(iou(mask, thing.mask) for thing in drawn.named(instance.label)) > 0.7
    assert result.presence[drawn.absent] < 0.5 < min(result.presence[name] for name in result.labels)
    assert result.model is not None
    assert result.model["checkpoint"] == "demo"
    assert result.timings_ms["segment"] > 0


def test_every_kind_of_image(segment: Segment, drawn: Scene, tmp_path: Path) -> None:
    """A path, its text, bytes, an image and an array are the same picture."""
    path = tmp_path / "picture.png"
    drawn.image.save(path)
    boxes = [
        segment(image, drawn.names[0]).boxes.tolist()
        for image in (path, str(path), path.read_bytes(), drawn.image, np.asarray(drawn.image))
    ]
    assert boxes[0]
    assert boxes.count(boxes[0]) == len(boxes)


def test_options_reach_the_server(segment: Segment, drawn: Scene) -> None:
    """Boxes do without a prompt, 0 is a threshold, and a limit on instances holds."""
    [box, *_] = segment(drawn.image, drawn.names[0]).boxes
    by_box = segment(drawn.image, boxes=[box], box_labels=[1])
    assert by_box.prompts == ["visual"]
    assert by_box.labels
    everything = segment(drawn.image, drawn.names[0], score_threshold=0)
    assert everything.scores.min() < 0.5
    assert len(segment(drawn.image, drawn.names[0], score_threshold=0, max_instances=2).instances) == 2
    least = everything.instances[0].area
    assert all(each.area >= least for each in segment(drawn.image, drawn.names[0], min_area=least).instances)


def refused_file(fault: str, picture: Image.Image) -> bytes:
    """A file that the server refuses."""
    if fault == "cut":
        return png_bytes(picture)[:2000]
    if fault == "bmp":
        return image_bytes(picture, "BMP")
    noise = np.random.default_rng(0).integers(0, 256, (2000, 2000, 3), np.uint8)
    return png_bytes(Image.fromarray(noise), compress_level=0)


@pytest.mark.parametrize(
    ("kind", "sentence", "changed"),
    [
        (Unauthorized, "SAM3_API_KEY", {"client": {"key": "k" * 32}}),
        (Unauthorized, "the key holds a space, a line end", {"client": {"key": f"{'k' * 32}\n"}}),
        (ServerUnreachable, "nothing answers at http://127.0.0.1:9; start", {"client": NOBODY}),
        (ServerUnreachable, "must be as in https://", {"client": {"url": "127.0.0.1:3000"}}),
        (BadImage, "README.md is no picture", {"image": ROOT / "README.md"}),
        (BadImage, "no-such.jpg cannot be read: No such file", {"image": Path("no-such.jpg")}),
        (BadImage, r"\(4, 4\) of float64", {"image": np.zeros((4, 4))}),
        (UnsupportedImage, "ends early", {"image": "cut"}),
        (UnsupportedImage, "not a PNG, JPEG or WEBP", {"image": "bmp"}),
        (UnsupportedImage, r"more than 10\d{6} bytes; pass a smaller picture", {"image": "large"}),
        (InvalidRequest, "a prompt is empty", {"prompts": ["circle", " "]}),
        (InvalidRequest, "give a prompt, or boxes", {"prompts": []}),
        (InvalidRequest, "half of a surrogate pair", {"prompts": "caf\udce9"}),
        (InvalidRequest, "each .x0, y0, x1, y1. in px", {"boxes": [10, 20, 30, 40]}),
        (InvalidRequest, "box_labels", {"boxes": [[10, 20, 30, 40]], "box_labels": [0.5]}),
        (InvalidRequest, "score_threshold: ", {"score_threshold": 2}),
        (InvalidRequest, "prompt: has 62 tokens; the model reads 32", {"prompts": "a " * 60}),
    ],
)
def test_errors_say_what_to_do(
    segment: Segment, drawn: Scene, kind: type[Sam3Error], sentence: str, changed: dict[str, Any]
) -> None:
    """Each fault of the caller is an error of its own kind, whose sentence says what is wrong."""
    call: dict[str, Any] = {"image": drawn.image, "prompts": "circle"} | changed
    if isinstance(call["image"], str):
        call["image"] = refused_file(call["image"], drawn.image)
    with pytest.raises(kind, match=sentence) as failed:
        segment(call.pop("image"), call.pop("prompts"), **call)
    assert failed.value.code
    assert "k" * 32 not in str(failed.value)


def test_state_and_model(server: LocalServer) -> None:
    """Both clients answer with the server's state and its model; the state needs no key."""
    with Client(server.url) as client:
        assert client.health()["status"] == "ok"
        with pytest.raises(Unauthorized, match="is missing; pass key"):
            client.model_info()

    async def ask() -> tuple[dict[str, Any], dict[str, Any]]:
        async with AsyncClient(server.url, server.api_key) as client:
            return await client.health(), await client.model_info()

    health, info = asyncio.run(ask())
    assert (health["status"], info["checkpoint"]) == ("ok", "demo")


def test_url_and_key_of_the_environment(
    server: LocalServer, drawn: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without arguments the client takes SAM3_URL and SAM3_API_KEY."""
    monkeypatch.setenv("SAM3_URL", f"{server.url}/")
    monkeypatch.setenv("SAM3_API_KEY", server.api_key)
    with Client() as client:
        assert client.segment(drawn.image, drawn.names[0]).labels


def test_example_of_the_documentation(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first example of docs/client.md prints what the page shows, and draws a picture."""
    page = (ROOT / "docs" / "client.md").read_text()
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    code = next(text for language, text in blocks if language == "python")
    printed = blocks[blocks.index(("python", code)) + 1][1]
    monkeypatch.setenv("SAM3_URL", server.url)
    monkeypatch.setenv("SAM3_API_KEY", server.api_key)
    monkeypatch.chdir(tmp_path)
    exec(code.replace("examples/", f"{ROOT}/examples/"), {})  # noqa: S102 - of our own page
    assert capsys.readouterr().out == printed
    with Image.open("found.jpg") as drawn:
        assert drawn.size == (1280, 720)
