"""Every field of a request together: any valid combination is answered, and one broken field is named."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from results import Task
from sam3_runner.instances import (
    SCORE_THRESHOLD,
    Instance,
    MaskCrop,
    PredictResult,
    UnionResult,
    packed_union,
)
from sam3_runner.prompts import MAX_BOXES
from tests.edge import BATCH, PREDICT, error_of
from tests.in_process.bench import USER, opened_bench
from tests.in_process.conftest import client_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sam3_runner.prompts import ConceptPrompt, PromptTokenizer
    from tests.in_process.bench import Bench

WIDTH_PX, HEIGHT_PX = 16, 12
OUTPUTS = ("mask", "instances", "label_map", "overlay", "coco")
FOUND = tuple((0.95 - 0.1 * number, side) for number, side in enumerate((8, 3, 7, 1, 5, 2, 6, 4, 8)))
"""Score and side in px of the squares in the corner of each image."""
PROPERTY = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

boxes = st.lists(
    st.tuples(st.integers(0, 14), st.integers(0, 10), st.floats(0.5, 99), st.floats(0.5, 99)).map(
        lambda box: [box[0], box[1], box[0] + box[2], box[1] + box[3]]
    ),
    min_size=1,
    max_size=MAX_BOXES,
)
thresholds = st.floats(0, 1)
areas = st.integers(0, 70)
OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "outputs": st.lists(st.sampled_from(OUTPUTS), max_size=5),
    "segmentation": st.sampled_from([None, "coco_rle", "polygons"]),
    "polygon_tolerance": st.floats(0, 1000),
    "score_threshold": thresholds,
    "nms_iou": st.none() | st.floats(0, 1),
    "max_instances": st.integers(1, 200),
    "min_area": areas,
    "fill_holes": areas,
    "remove_islands": areas,
    "tiles": st.sampled_from([1, "auto"]),  # of so small an image one: test_tiles.py has more
}
options = st.fixed_dictionaries({}, optional=OPTIONS)


@st.composite
def exemplars(draw: st.DrawFn) -> dict[str, Any]:
    """Boxes, with or without their labels."""
    found = draw(boxes)
    labels = st.lists(st.integers(0, 1), min_size=len(found), max_size=len(found))
    return {"boxes": found} | ({"labels": draw(labels)} if draw(st.booleans()) else {})


texts = st.sampled_from(["red circle", "star", "Größe 7", "円"])
items = texts | st.builds(
    lambda text, boxed, own: text | boxed | own,
    texts.map(lambda text: {"text": text}),
    st.just({}) | exemplars(),
    st.fixed_dictionaries({}, optional={"score_threshold": thresholds}),
)
predicts = st.builds(
    lambda prompt, fields: prompt | fields,
    texts.map(lambda text: {"text_prompt": text})
    | exemplars()
    | st.builds(lambda text, boxed: {"text_prompt": text} | boxed, texts, exemplars()),
    options,
)
batches = st.builds(
    lambda prompts, fields: {"prompts": prompts} | fields,
    st.lists(items | exemplars(), min_size=1, max_size=10),
    options,
)

BROKEN: dict[str, list[Any]] = {
    "outputs": [["masks"], "mask", None, [7], ["mask"] * 99],
    "segmentation": ["rle", "", 3, ["polygons"]],
    "polygon_tolerance": [-0.1, 1000.1, "x", None],
    "score_threshold": [-0.01, 1.01, None, "high", [0.5]],
    "nms_iou": [-0.01, 1.01, "off", []],
    "max_instances": [0, 201, -1, 1.5, None, "all"],
    "min_area": [-1, 2**26 + 1, 1.5, None, "x"],
    "fill_holes": [-1, 2**26 + 1, 1.5, None],
    "remove_islands": [-1, 2**26 + 1, 1.5, None],
    "boxes": [[], None, [[0, 0, 1]], [[5, 0, 5, 9]], [[0, 9, 5, 1]], [[0, 0, 5, "x"]], [[0, 0, 1, 1]] * 33],
    "labels": [[2], [True, 0, 1] * 20, None, [], ["1"], [0.5]],
    "tiles": [0, 5, "all", None, 1.5, True],
    "unknown": [1, None],
}


def find_squares(bench: Bench) -> None:
    """Let the model find the squares whose score is above each prompt's threshold."""

    async def segment(
        image: Any, prompts: list[ConceptPrompt], _: float, *, with_masks: bool = False, **__: Any
    ) -> Any:
        found = []
        for prompt in prompts:
            threshold = SCORE_THRESHOLD if prompt.score_threshold is None else prompt.score_threshold
            squares = [
                Instance(score, (0.0, 0.0, side, side), side**2, number, _square(side))
                for number, (score, side) in enumerate(FOUND)
                if score > threshold
            ]
            found.append(PredictResult(prompt.model_text, 0.9, image.width, image.height, squares))
        if with_masks:
            return found, 1.0
        size = WIDTH_PX, HEIGHT_PX
        united = [
            UnionResult(each.prompt, 0.9, *size, each.instances, packed_union([each])) for each in found
        ]
        return united, 1.0

    bench.model.segment = segment  # type: ignore[assignment, method-assign]


def _square(side_px: int) -> MaskCrop:
    return MaskCrop(0, 0, side_px, side_px, bytes([0xFF << (8 - side_px) & 0xFF]) * side_px)


def on_a_bench(
    bench_of: tuple[Any, PromptTokenizer], work: Callable[[Bench, httpx.AsyncClient], Awaitable[None]]
) -> None:
    """Run `work` with a bench of its own, in a loop of its own."""
    factory, tokenizer = bench_of

    async def run() -> None:
        async with opened_bench(factory.mktemp("fields"), tokenizer) as bench, client_of(bench) as http:
            find_squares(bench)
            await work(bench, http)

    asyncio.run(run())


@pytest.fixture
def bench_of(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PromptTokenizer
) -> tuple[pytest.TempPathFactory, PromptTokenizer]:
    return tmp_path_factory, tokenizer


def with_owner(bench: Bench, fields: dict[str, Any]) -> dict[str, Any]:
    """A whole body."""
    return {"image_url": bench.image, "user_id": USER, "task_id": str(uuid4())} | fields


@given(fields=predicts | batches)
@PROPERTY
def test_valid_fields_are_answered_consistently(bench_of: Any, fields: dict[str, Any]) -> None:
    """Numbers, thresholds, bounds, files and masks of the answer agree, and a repeat gets the same answer."""

    async def check(bench: Bench, http: httpx.AsyncClient) -> None:
        path = BATCH if "prompts" in fields else PREDICT
        body = with_owner(bench, fields)
        response = await http.post(path, json=body)
        assert response.status_code == httpx.codes.OK, response.text
        answer = response.json()
        results = answer["results"] if path == BATCH else [answer]
        found = [instance for result in results for instance in result["instances"]]
        assert [instance["number"] for instance in found] == [*range(1, len(found) + 1)]
        for index, result in enumerate(results):
            check_result(result, fields, threshold_of(fields, index))
        named = {*fields.get("outputs", ())} - {"mask"}
        assert {*answer.get("outputs", ())} == named - {"instances"}
        for instance in found:
            assert ("mask_url" in instance) == ("mask_offset" in instance) == ("instances" in named)
            check_mask(instance, fields)
        for url in [*answer.get("outputs", {}).values(), *(each["mask_url"] for each in results)]:
            assert stored(bench, url)
        if "label_map" in named:
            with Image.open(bench.folder / "objects" / key_of(bench, answer["outputs"]["label_map"])) as file:
                assert {*np.unique(np.asarray(file)).tolist()} <= {*range(len(found) + 1)}
        row = await bench.rows.get(body["task_id"])
        assert row is not None
        assert row.status == "done"
        assert (await http.post(path, json=body)).json() == answer

    on_a_bench(bench_of, check)


def threshold_of(fields: dict[str, Any], index: int) -> float:
    """The threshold of one prompt: its own, else the request's, else the model's."""
    item = fields["prompts"][index] if "prompts" in fields else {}
    own = item.get("score_threshold") if isinstance(item, dict) else None
    threshold: float = own if own is not None else fields.get("score_threshold", SCORE_THRESHOLD)
    return threshold


def check_result(result: dict[str, Any], fields: dict[str, Any], threshold: float) -> None:
    """Scores, areas and number of one prompt's instances are as the request bounds them."""
    scores = [instance["score"] for instance in result["instances"]]
    assert scores == sorted(scores, reverse=True)
    assert all(score > threshold - 1e-4 for score in scores)  # scores are rounded
    assert all(instance["area"] >= fields.get("min_area", 0) for instance in result["instances"])
    assert len(scores) <= fields.get("max_instances", len(FOUND))
    assert result["confidence"] == max(scores, default=0.0)
    assert len(result["labels"]) == bool(scores)
    if not {"min_area", "nms_iou", "max_instances"} & {*fields}:
        assert len(scores) == sum(score > threshold for score, _ in FOUND)


def check_mask(instance: dict[str, Any], fields: dict[str, Any]) -> None:
    """The mask in the answer is the one that was asked for, of the instance's area where it is exact."""
    kind = fields.get("segmentation")
    assert ("segmentation" in instance) == (kind is not None)
    if kind == "coco_rle":
        assert instance["segmentation"]["size"] == [HEIGHT_PX, WIDTH_PX]
    elif kind == "polygons" and not fields.get("polygon_tolerance"):
        [[ring]] = instance["segmentation"]
        xs, ys = np.array(ring).T
        area = abs(np.dot(xs, np.roll(ys, 1)) - np.dot(ys, np.roll(xs, 1))) / 2
        assert area == instance["area"]


def key_of(bench: Bench, url: str) -> str:
    """The key of a stored file."""
    return url.removeprefix((bench.folder / "objects").resolve().as_uri() + "/")


def stored(bench: Bench, url: str) -> bool:
    """Whether a file is stored at a URL, and has content."""
    return (bench.folder / "objects" / key_of(bench, url)).stat().st_size > 0


@st.composite
def broken(draw: st.DrawFn) -> tuple[str, dict[str, Any], str]:
    """A route, fields of which one is broken, and the name of that one."""
    path, fields = draw(st.tuples(st.just(PREDICT), predicts) | st.tuples(st.just(BATCH), batches))
    name = draw(st.sampled_from(sorted(BROKEN)))
    value = draw(st.sampled_from(BROKEN[name]))
    if path == PREDICT or name not in {"boxes", "labels"}:
        return path, fields | {name: value}, name
    # Of a batch, exemplars belong to a prompt.
    index = draw(st.integers(0, len(fields["prompts"]) - 1))
    item = fields["prompts"][index]
    prompts = [*fields["prompts"]]
    prompts[index] = (item if isinstance(item, dict) else {"text": item}) | {name: value}
    return path, fields | {"prompts": prompts}, f"prompts.{index}.{name}"


@given(case=broken())
@PROPERTY
def test_one_broken_field_is_named(bench_of: Any, case: tuple[str, dict[str, Any], str]) -> None:
    """Among valid fields, a broken one is a 400 with its name, and nothing is claimed or fetched."""
    path, fields, name = case

    async def check(bench: Bench, http: httpx.AsyncClient) -> None:
        body = with_owner(bench, fields)
        await bench.rows.insert_pending(Task(body["task_id"], USER, bench.image, ("star",)))
        content = json.dumps(body)
        response = await http.post(path, content=content, headers={"Content-Type": "application/json"})
        status, code, message = error_of(response)
        assert (status, code) == (400, "INVALID_REQUEST")
        assert message.startswith((f"{name}:", f"{name}.")), message
        row = await bench.rows.get(body["task_id"])
        assert row is not None
        assert (row.status, row.metadata) == ("pending", {})
        assert bench.count() == 0
        assert not bench.stages.entered

    on_a_bench(bench_of, check)
