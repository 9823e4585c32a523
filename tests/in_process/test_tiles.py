"""Tiles through the routes and the pipeline: what the model gets, what is merged, counted and closed."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar
from uuid import uuid4

import numpy as np
import pytest
from PIL import Image

from admission import cost_of
from contract import PredictRequest
from direct_form import PATH as DIRECT
from sam3_runner import DeadlineExceeded, FeaturesNotHeld
from sam3_runner.images.decoded import DecodedImage
from sam3_runner.instances import Instance, MaskCrop, PredictResult, Window
from sam3_runner.prompts import ConceptPrompt
from segmentation import VIEWS_AT_ONCE, prompts_in
from tests.edge import BATCH, PREDICT, error_of, png_bytes
from tests.in_process.bench import USER, failure_of, opened_bench
from tests.in_process.test_http import body_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    import httpx

    from sam3_runner.images.image_file import ImageFile
    from sam3_runner.prompts import PromptTokenizer
    from tests.in_process.bench import Bench

pytestmark = pytest.mark.anyio

WIDTH, HEIGHT = 400, 300


@pytest.fixture
async def bench(tmp_path: Path, tokenizer: PromptTokenizer) -> AsyncIterator[Bench]:
    """The bench with a larger image."""
    async with opened_bench(tmp_path, tokenizer) as opened:
        opened.upload(png_bytes(Image.new("RGB", (WIDTH, HEIGHT), (200, 30, 30))))
        yield opened


async def test_tiles_are_merged_and_counted(bench: Bench, http: httpx.AsyncClient) -> None:
    """A square in the corner of the whole image and of each tile: four are left, and the cost is said."""
    body = body_of(bench, tiles=2)
    answer = (await http.post(PREDICT, json=body)).json()
    corners = {tuple(found["box"][:2]) for found in answer["instances"]}
    assert len(answer["instances"]) == len(corners) == 4
    assert all(x % 8 == 0 for x, _ in corners)
    assert answer["settings"]["tiles"] == 4
    assert (answer["image_width"], answer["image_height"]) == (WIDTH, HEIGHT)
    assert "merge_tiles" in answer["timings_ms"]
    assert bench.stages.finished["segment"] == 5
    assert bench.stages.finished["decode"] == 1
    assert bench.stages.at_once["segment"] <= VIEWS_AT_ONCE
    with Image.open((bench.folder / "objects") / answer["mask_url"].partition("/objects/")[2]) as mask:
        levels = np.asarray(mask)
    assert levels.shape == (HEIGHT, WIDTH)
    assert (levels > 0).sum() == 4 * 64
    assert (await http.post(PREDICT, json=body)).json() == answer


async def test_auto_follows_the_model(bench: Bench, http: httpx.AsyncClient) -> None:
    """Of a small image `auto` makes no tile; nothing changes but the option."""
    answer = (await http.post(PREDICT, json=body_of(bench, tiles="auto"))).json()
    assert "tiles" not in answer["settings"]
    bench.model.input_side_px = 100
    answer = (await http.post(PREDICT, json=body_of(bench, tiles="auto"))).json()
    assert answer["settings"]["tiles"] == 12


async def test_batch_and_direct(bench: Bench, http: httpx.AsyncClient) -> None:
    """Both other routes take the field; the tiles of each prompt are merged for themselves."""
    answer = (await http.post(BATCH, json=body_of(bench, BATCH, prompts=["a", "b"], tiles=2))).json()
    assert [len(result["instances"]) for result in answer["results"]] == [4, 4]
    assert [{found["label"] for found in result["instances"]} for result in answer["results"]] == [
        {"a"},
        {"b"},
    ]
    picture = png_bytes(Image.new("RGB", (WIDTH, HEIGHT)))
    for tiles, count in (("2", 4), ("auto", 1)):
        form = {"prompt": "red circle", "tiles": tiles, "mask_format": "rle"}
        direct = (await http.post(DIRECT, data=form, files={"image": ("picture", picture)})).json()
        assert len(direct["data"]) == count
        assert direct["settings"].get("tiles") == (4 if count == 4 else None)


@pytest.mark.parametrize("tiles", [0, 5, -1, "2", "all", 1.5, True, None, [2]])
async def test_wrong_tiles_are_refused(bench: Bench, http: httpx.AsyncClient, tiles: Any) -> None:
    """What is neither `auto` nor 1 to 4 is a 400 that says so."""
    status, code, message = error_of(await http.post(PREDICT, json=body_of(bench, tiles=tiles)))
    assert (status, code) == (400, "INVALID_REQUEST")
    assert message == 'tiles: must be "auto" or a whole number from 1 to 4'


async def test_one_tile_is_no_option(bench: Bench, http: httpx.AsyncClient) -> None:
    """`tiles: 1` is the same task as none."""
    body = body_of(bench)
    answer = (await http.post(PREDICT, json=body)).json()
    assert (await http.post(PREDICT, json=body | {"tiles": 1})).json() == answer
    assert error_of(await http.post(PREDICT, json=body | {"tiles": 2}))[0] == 400


async def test_held_features_need_no_pixels(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repeat of tiles whose features are held decodes nothing; those that are not are decoded at once."""
    await bench.send(bench.request(tiles=2))
    keys = {image.key for image, _ in bench.model.calls}
    assert len(keys) == 5
    monkeypatch.setattr(bench.model, "may_hold", keys.__contains__)
    await bench.send(bench.request(tiles=2))
    assert bench.stages.finished["decode"] == 1
    gone = set(sorted(map(str, keys))[:2])
    segment = bench.model.segment

    async def forgetful(image: DecodedImage, *rest: Any, **named: Any) -> Any:
        if image.pixels is None and image.key in gone:
            raise FeaturesNotHeld("gone")
        return await segment(image, *rest, **named)

    monkeypatch.setattr(bench.model, "segment", forgetful)
    answer = await bench.send(bench.request(tiles=2))
    assert bench.stages.finished["decode"] == 2
    assert len(answer.results[0].instances) == 4


class ClosingImage(DecodedImage):
    """Counts what is closed."""

    closed: ClassVar[list[str | None]] = []

    def close(self, *, is_read: bool) -> None:
        assert not is_read
        self.closed.append(self.key)


async def test_images_are_closed_after_an_error(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline of a tile ends the request: all its images are closed, and no call is left."""
    ClosingImage.closed = []

    async def decode_windows(_: ImageFile, windows: Sequence[Window]) -> list[DecodedImage]:
        pixels = np.zeros((2, 2, 3), np.uint8)
        return [ClosingImage(pixels, window.width, window.height) for window in windows]

    monkeypatch.setattr(bench.decoders, "decode_windows", decode_windows)
    calls = []

    async def segment(image: DecodedImage, *_: Any, **__: Any) -> Any:
        calls.append(image)
        if len(calls) == VIEWS_AT_ONCE:
            raise DeadlineExceeded("too late")
        await asyncio.Event().wait()

    monkeypatch.setattr(bench.model, "segment", segment)
    failure = await failure_of(bench.call(bench.request(tiles=4)))
    assert (failure.status, failure.code) == (504, "DEADLINE_EXCEEDED")
    assert len(set(ClosingImage.closed)) == 17
    assert len(calls) <= VIEWS_AT_ONCE + 1  # one may begin between the error and the end of the others


async def test_tiles_cost_as_much_as_images(bench: Bench) -> None:
    """A request counts with its most tiles until its image is known, then with those that it has."""
    assert cost_of(1, 4) == pytest.approx(5.0)
    assert cost_of(3, 4) == pytest.approx(6.0)
    gate = bench.pipeline.admission.gate
    bench.stages.hold("fetch", "segment")
    caller = bench.call(bench.request(tiles="auto"))
    await bench.stages.entry_of("fetch")
    assert gate._held_cost == pytest.approx(17.0)
    bench.model.input_side_px = 200  # 2 x 2 tiles (400 / 200, 300 / 200 rounded)
    bench.stages.release("fetch")
    await bench.stages.entry_of("segment")
    assert gate._held_cost == pytest.approx(5.0)
    bench.stages.release("segment")
    await caller
    assert gate._held_cost == 0.0


def test_boxes_count_where_they_are_whole() -> None:
    """A box is moved to the windows that contain it; a prompt without text needs a positive one."""
    inside, across = (110.0, 20.0, 130.0, 40.0), (90.0, 20.0, 130.0, 40.0)
    beyond = (140.0, 20.0, 160.0, 40.0)
    window = Window(104, 0, 48, 96)
    text = ConceptPrompt("cat", (inside, across, beyond), (True, False, True))
    boxes = ConceptPrompt(None, (inside, across), (True, True), 0.3)
    negative = ConceptPrompt(None, (inside, across), (False, True))
    both = ConceptPrompt("dog", (across, inside, inside), (True, False, True))
    found = prompts_in(window, (200, 96), [text, boxes, negative, both])
    moved = (6.0, 20.0, 26.0, 40.0)
    assert found == {
        0: ConceptPrompt("cat", (moved,), (True,)),
        1: ConceptPrompt(None, (moved,), (True,), 0.3),
        3: ConceptPrompt("dog", (moved, moved), (False, True)),
    }
    out = ConceptPrompt("cat", ((-5.0, -5.0, 9.0, 9.0),), (True,))
    whole = prompts_in(Window(0, 0, 200, 96), (200, 96), [out])
    assert whole == {0: replace(out, boxes=((0.0, 0.0, 9.0, 9.0),))}


async def test_boxes_alone_skip_other_tiles(bench: Bench) -> None:
    """Boxes without a text: only tiles with a box are segmented."""
    boxes = [[20, 20, 60, 60]]
    request = PredictRequest(image_url=bench.image, user_id=USER, task_id=uuid4(), boxes=boxes, tiles=2)
    answer = await bench.send(request)
    assert [image.width == WIDTH for image, _ in bench.model.calls] == [True, False]
    assert answer.settings is not None
    assert answer.settings.tiles == 1


async def test_masks_of_tiles_are_stored_where_they_are(
    bench: Bench, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask inside of a tile lies at the tile's place: in the answer, and in the label map."""

    async def segment(image: DecodedImage, prompts: Any, *_: Any, **__: Any) -> Any:
        found = []
        if (image.width, image.height) != (WIDTH, HEIGHT):
            mask = MaskCrop(42, 50, 3, 2, bytes([0b00111000] * 2))
            found = [Instance(0.8, (42.0, 50.0, 45.0, 52.0), 6, 0, mask)]
        return [
            PredictResult(each.model_text, 0.9, image.width, image.height, found) for each in prompts
        ], 1.0

    monkeypatch.setattr(bench.model, "segment", segment)
    body = body_of(bench, tiles=2, outputs=["label_map"], segmentation="polygons")
    answer = (await http.post(PREDICT, json=body)).json()
    assert len(answer["instances"]) == 4
    path = (bench.folder / "objects") / answer["outputs"]["label_map"].partition("/objects/")[2]
    with Image.open(path) as label_map:
        numbers = np.asarray(label_map)
    for found in answer["instances"]:
        x0, y0, x1, y1 = map(int, found["box"])
        assert (numbers[y0:y1, x0:x1] == found["number"]).all()
        assert (numbers == found["number"]).sum() == 6
        [[ring]] = found["segmentation"]
        assert {tuple(point) for point in ring} == {(x0, y0), (x1, y0), (x1, y1), (x0, y1)}
