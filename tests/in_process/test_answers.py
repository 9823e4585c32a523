"""Exemplars, refinement and every form of an answer, through the routes and the pipeline."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import pytest
from PIL import Image

from sam3_runner.instances import Instance, MaskCrop, PredictResult
from storage import mask_key
from task_answer import MAX_METADATA_BYTES
from tests.edge import BATCH, PREDICT, error_of
from tests.in_process.bench import USER, failure_of
from tests.in_process.test_http import body_of

if TYPE_CHECKING:
    from pathlib import Path

    import httpx

    from tests.in_process.bench import Bench

pytestmark = pytest.mark.anyio

BOX = [1.0, 1.0, 7.0, 7.0]


def path_of(bench: Bench, url: str) -> Path:
    """The stored file at a URL."""
    folder = (bench.folder / "objects").resolve()
    assert url.startswith(folder.as_uri() + f"/masks/{USER}/")
    return folder / url.removeprefix(folder.as_uri() + "/")


def find_many(bench: Bench, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let the model find `count` instances of 8 x 8 px a prompt."""
    squares = [
        Instance(
            round(0.9 - number / 1000, 3),
            (0.12, 0.34, 1234.56, 789.01),
            64,
            number,
            MaskCrop(0, 0, 8, 8, b"\xff" * 8),
        )
        for number in range(count)
    ]

    async def segment(image: Any, prompts: Any, *_: Any, **__: Any) -> Any:
        size = image.width, image.height
        return [PredictResult(prompt.model_text, 0.9, *size, squares) for prompt in prompts], 1.0

    monkeypatch.setattr(bench.model, "segment", segment)


async def test_exemplars_reach_the_model(bench: Bench, http: httpx.AsyncClient) -> None:
    """Boxes, labels and thresholds reach the model; boxes alone are named visual."""
    body = body_of(bench, text_prompt=..., boxes=[BOX, [0, 0, 99, 5]], labels=[1, 0], score_threshold=0)
    answer = (await http.post(PREDICT, json=body)).json()
    [prompt] = bench.model.prompts
    assert (prompt.text, prompt.labels, prompt.score_threshold) == (None, (True, False), 0.0)
    assert prompt.boxes == ((1.0, 1.0, 7.0, 7.0), (0.0, 0.0, 99.0, 5.0))
    assert (answer["labels"], answer["settings"]["score_threshold"]) == (["visual"], 0.0)
    row = await bench.rows.get(answer["task_id"])
    assert row is not None
    assert row.metadata["prompts"] == ["visual"]


async def test_items_of_a_batch_have_options_of_their_own(bench: Bench, http: httpx.AsyncClient) -> None:
    """An item is a text, or an object with boxes and a threshold; the request's threshold is the default."""
    items = ["star", {"text": "circle", "score_threshold": 0}, {"boxes": [BOX]}]
    body = body_of(bench, BATCH, prompts=items, score_threshold=0.7)
    answer = (await http.post(BATCH, json=body)).json()
    assert [prompt.text for prompt in bench.model.prompts] == ["star", "circle", None]
    assert [prompt.score_threshold for prompt in bench.model.prompts] == [0.7, 0.0, 0.7]
    assert answer["settings"]["score_thresholds"] == [0.7, 0.0, 0.7]
    assert [result["labels"] for result in answer["results"]] == [["star"], ["circle"], ["visual"]]


@pytest.mark.parametrize(
    ("path", "prompt", "field"),
    [
        (PREDICT, {"boxes": [BOX, [16, 0, 20, 5]]}, "boxes[1]"),
        (BATCH, {"prompts": [{"boxes": [BOX]}, {"boxes": [[-9, -9, 0, 0]]}]}, "prompts.1.boxes[0]"),
    ],
)
async def test_box_outside_the_picture_is_refused(
    bench: Bench,
    http: httpx.AsyncClient,
    path: str,
    prompt: dict[str, Any],
    field: str,
) -> None:
    """A box without a px of the picture is a 400 with the field's name; nothing is decoded."""
    body = body_of(bench, path, **prompt)
    status, code, message = error_of(await http.post(path, json=body))
    assert (status, code) == (400, "INVALID_REQUEST")
    assert message.startswith(field)
    row = await bench.rows.get(body["task_id"])
    assert row is not None
    assert (row.status, row.metadata) == ("error", {"error_message": message})
    assert not bench.stages.entered["decode"]


async def test_every_output_is_stored_and_named(bench: Bench, http: httpx.AsyncClient) -> None:
    """Each output has its URL, and its file is what it says; the answer is replayed."""
    outputs = ["mask", "instances", "label_map", "overlay", "coco"]
    body = body_of(bench, outputs=outputs, segmentation="coco_rle")
    answer = (await http.post(PREDICT, json=body)).json()
    [found] = answer["instances"]
    assert found["segmentation"]["size"] == [12, 16]
    assert found["mask_offset"] == [0, 0]
    with Image.open(path_of(bench, found["mask_url"])) as crop:
        assert (crop.size, crop.mode) == ((8, 8), "L")
    with Image.open(path_of(bench, answer["outputs"]["label_map"])) as label_map:
        assert label_map.size == (16, 12)
        assert np.asarray(label_map)[:8, :8].min() == found["number"] == 1
    with Image.open(path_of(bench, answer["outputs"]["overlay"])) as overlay:
        assert overlay.format == "JPEG"
    coco = json.loads(path_of(bench, answer["outputs"]["coco"]).read_text())
    assert coco["images"][0]["file_name"] == "image"
    assert coco["annotations"][0]["area"] == 64
    assert answer["settings"]["outputs"] == outputs
    assert (await http.post(PREDICT, json=body)).json() == answer
    assert bench.stages.finished["segment"] == 1


async def test_polygons_enclose_the_mask(bench: Bench, http: httpx.AsyncClient) -> None:
    """The polygon of the 8 x 8 square runs along the edges of its px."""
    answer = (await http.post(PREDICT, json=body_of(bench, segmentation="polygons"))).json()
    [[[ring]]] = [found["segmentation"] for found in answer["instances"]]
    assert {tuple(point) for point in ring} == {(0, 0), (8, 0), (8, 8), (0, 8)}


async def test_refinement_changes_answer_and_mask(
    bench: Bench,
    http: httpx.AsyncClient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An instance below min_area is neither in the answer nor in the union's mask."""
    answer = (await http.post(PREDICT, json=body_of(bench, min_area=65))).json()
    assert (answer["labels"], answer["instances"], answer["settings"]["min_area"]) == ([], [], 65)
    with Image.open(path_of(bench, answer["mask_url"])) as mask:
        assert not np.asarray(mask).any()
    find_many(bench, monkeypatch, 5)
    body = body_of(bench, BATCH, prompts=["star", "circle"], max_instances=2)
    batch = (await http.post(BATCH, json=body)).json()
    assert [len(result["instances"]) for result in batch["results"]] == [2, 2]
    one = (await http.post(BATCH, json=body | {"task_id": str(uuid4()), "nms_iou": 0.5})).json()
    assert sum(len(result["instances"]) for result in one["results"]) == 1
    answer = (await http.post(PREDICT, json=body_of(bench, nms_iou=0))).json()
    assert (len(answer["instances"]), answer["settings"]["nms_iou"]) == (1, 0.0)


async def test_other_options_are_another_task(bench: Bench, http: httpx.AsyncClient) -> None:
    """A done task is refused with other options, and answered with equal ones in another spelling."""
    body = body_of(bench, outputs=["coco", "mask"], score_threshold=0.25)
    answer = (await http.post(PREDICT, json=body)).json()
    status, code, message = error_of(await http.post(PREDICT, json=body | {"score_threshold": 0.3}))
    assert (status, code) == (400, "INVALID_REQUEST")
    assert "other options" in message
    same = body | {"outputs": ["coco", "coco"], "min_area": 0, "nms_iou": None}
    assert (await http.post(PREDICT, json=same)).json() == answer


async def test_kept_task_keeps_its_options(bench: Bench) -> None:
    """A task that is begun again after an outage of the store stores what was asked for."""
    from storage import StorageUnavailable  # noqa: PLC0415

    bench.stages.fail("upload", StorageUnavailable("away"))
    request = bench.request(outputs=["label_map"], boxes=[BOX], score_threshold=0.25)
    assert (await failure_of(bench.call(request))).code == "STORAGE_UNAVAILABLE"
    bench.stages.mend("upload")
    row = await bench.recover()
    assert row.status == "done"
    assert row.metadata["settings"] == {"outputs": ["mask", "label_map"], "score_threshold": 0.25}
    assert path_of(bench, row.metadata["outputs"]["label_map"]).exists()  # type: ignore[index]
    replayed = await bench.send(request)
    assert replayed.outputs is not None


# The bound of the row.


async def test_long_answer_is_stored_beside_the_masks(
    bench: Bench,
    http: httpx.AsyncClient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The row of ten prompts with 200 instances each stays under the bound; the answer is replayed whole."""
    find_many(bench, monkeypatch, 200)
    prompts = [f"{number} " + "x" * 100 for number in range(10)]
    body = body_of(bench, BATCH, prompts=prompts, segmentation="coco_rle")
    monkeypatch.setattr(bench.pipeline._tokenizer, "check_length", lambda *_, **__: None)
    answer = (await http.post(BATCH, json=body)).json()
    assert sum(len(result["instances"]) for result in answer["results"]) == 2000
    row = await bench.rows.get(body["task_id"])
    assert row is not None
    assert row.metadata["left_out"] == ["segmentation", "instances"]
    assert len(json.dumps(row.metadata)) <= MAX_METADATA_BYTES
    assert json.loads(path_of(bench, str(row.metadata["answer_url"])).read_text()) == answer
    assert (await http.post(BATCH, json=body)).json() == answer


async def test_segmentation_is_left_out_first(
    bench: Bench,
    http: httpx.AsyncClient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the row has room for the instances without their masks, they stay in it."""
    find_many(bench, monkeypatch, 200)
    body = body_of(bench, BATCH, prompts=[*"abcdefgh"], segmentation="polygons")
    answer = (await http.post(BATCH, json=body)).json()
    row = await bench.rows.get(body["task_id"])
    assert row is not None
    assert row.metadata["left_out"] == ["segmentation"]
    results: Any = row.metadata["results"]
    assert [len(result["instances"]) for result in results] == [200] * 8
    assert (await http.post(BATCH, json=body)).json() == answer


async def test_answer_over_its_bound_says_so(
    bench: Bench,
    http: httpx.AsyncClient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Masks of more than the bound are left out of the answer, which names them."""
    monkeypatch.setattr("rendering.MAX_INLINE_BYTES", 100)
    find_many(bench, monkeypatch, 20)
    body = body_of(bench, segmentation="coco_rle")
    answer = (await http.post(PREDICT, json=body)).json()
    assert answer["left_out"] == ["segmentation"]
    assert len(answer["instances"]) == 20
    assert not any("segmentation" in found for found in answer["instances"])
    assert (await http.post(PREDICT, json=body)).json() == answer


FORGED: dict[str, Any] = {
    "another server's": "https://evil.example/masks/user-1/x/answer-0123456789abcdef.json",
    "an upload": "uploads",
    "another task's": "other task",
    "no text": 7,
}


@pytest.mark.parametrize("case", FORGED)
async def test_forged_answer_is_not_returned(bench: Bench, case: str) -> None:
    """A row whose answer_url is no file of this task's result is refused."""
    answer = await bench.send()
    document = answer.model_dump_json().encode()
    folder = (bench.folder / "objects").resolve().as_uri()
    if case == "an upload":
        url: Any = f"{folder}/{bench.upload(document, 'answer-0123456789abcdef.json')}"
    elif case == "another task's":
        key = mask_key(USER, str(uuid4()), "answer", document, attempt_id="a", suffix="json")
        url = await bench.objects.upload_mask(document, key)
    else:
        url = FORGED[case]
    row = await bench.row()
    metadata = json.dumps({**row.metadata, "answer_url": url}).replace("'", "''")
    bench.execute(f"UPDATE segmentation_results SET metadata = '{metadata}'")  # noqa: S608 - ours
    failure = await bench.failure(bench.sent[0])
    assert (failure.code, failure.status) == ("INVALID_REQUEST", 400)
    assert "no longer holds the result" in failure.message


async def test_forged_facts_are_not_returned(bench: Bench) -> None:
    """Text in a user's own row does not become a part of our answer."""
    await bench.send()
    row = await bench.row()
    for forged in (
        {"model": {"checkpoint": "visit evil.example", "sha256": "0" * 64, "version": "1"}},
        {"timings_ms": {"visit evil.example": 1.0}},
        {"outputs": {"coco": "https://evil.example/masks/user-1/x/coco-0123456789abcdef.json"}},
        {"left_out": ["visit evil.example"]},
    ):
        metadata = json.dumps({**row.metadata, **forged}).replace("'", "''")
        bench.execute(f"UPDATE segmentation_results SET metadata = '{metadata}'")  # noqa: S608 - ours
        assert (await bench.failure(bench.sent[0])).code == "INVALID_REQUEST"


async def test_row_of_an_earlier_server_is_replayed(bench: Bench) -> None:
    """A row without the newer facts is answered without them."""
    answer = await bench.send()
    row = await bench.row()
    kept = ("model_version", "inference_time_ms", "confidence", "prompts", "results")
    metadata: dict[str, Any] = {name: row.metadata[name] for name in kept}
    for result in metadata["results"]:
        del result["presence"]
        for found in result["instances"]:
            del found["number"]
    text = json.dumps(metadata).replace("'", "''")
    bench.execute(f"UPDATE segmentation_results SET metadata = '{text}'")  # noqa: S608 - ours
    replayed = (await bench.send(bench.sent[0])).of_only_prompt().model_dump(exclude_none=True)
    assert set(replayed) == {
        *("task_id", "mask_url", "labels", "inference_time_ms", "confidence"),
        *("instances", "image_width", "image_height"),
    }
    assert replayed["mask_url"] == answer.results[0].mask_url


async def test_task_without_options_is_stored_as_before(bench: Bench) -> None:
    """Nothing asked for: the attempt and the row have no options, as earlier servers wrote them."""
    bench.stages.hold("segment")
    caller = bench.call()
    await bench.stages.entry_of("segment")
    assert bench.count("attempts", "json_extract(task, '$.options') IS NULL") == 1
    bench.stages.release("segment")
    await caller
    assert "options" not in (await bench.row()).metadata
