"""The answers to valid requests."""

from __future__ import annotations

import hashlib
import io
import json
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import httpx
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from safetensors import safe_open

from sam3_runner.weights.checkpoint import DEMO_FOLDER
from tests import new_connection
from tests.drawn import iou, scene
from tests.edge import BATCH, PREDICT, SERVER_TIMEOUT_S, USER, Edge, error_of, image_bytes, png_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.drawn import Scene

pytestmark = pytest.mark.server

SEEDS = tuple(range(100, 112))
FACTS = ("model", "timings_ms", "settings")
"""Fields of the outermost part of an answer, beside its results."""
EXIF_ORIENTATION = 0x0112
TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""The stored image's transposition, by the EXIF orientation that reverses it."""


def without_ids_and_times(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer without its ids, URLs and times."""
    excluded = ("task_id", "mask_url", "inference_time_ms", *FACTS)
    return {key: value for key, value in answer.items() if key not in excluded}


def check_mask(edge: Edge, answer: dict[str, Any]) -> None:
    """Check that the mask has the image's size and the area of the instances."""
    mask = edge.mask(answer["mask_url"])
    assert mask.shape == (answer["image_height"], answer["image_width"])
    areas = [instance["area"] for instance in answer["instances"]]
    assert max(areas, default=0) <= mask.sum() <= sum(areas)


def count_hits(edge: Edge, drawn: Scene, prompt: str) -> tuple[int, int, int]:
    """The numbers of things found, things to find, and instances returned, for one prompt in one scene."""
    answer = edge.answer(drawn.image, prompt)
    check_mask(edge, answer)
    mask = edge.mask(answer["mask_url"])
    wanted = [thing for thing in drawn.named(prompt) if thing.counted]
    hits = 0
    for thing in wanted:
        rows, columns = np.flatnonzero(thing.mask.any(axis=1)), np.flatnonzero(thing.mask.any(axis=0))
        box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        near = [found for found in answer["instances"] if np.abs(np.subtract(found["box"], box)).max() < 12]
        covered = (mask & thing.mask).sum() > 0.5 * thing.mask.sum()
        hits += bool(near) and bool(covered)
    return hits, len(wanted), len(answer["instances"])


@pytest.mark.first
def test_objects_of_a_prompt_are_found(edge: Edge) -> None:
    """In drawn scenes recall is at least 0.8 and precision at least 0.7."""
    counts = [count_hits(edge, scene(seed), prompt) for seed in SEEDS for prompt in scene(seed).names[:2]]
    hits, wanted, returned = (sum(column) for column in zip(*counts, strict=True))
    assert wanted > len(SEEDS)
    assert hits >= 0.8 * wanted
    assert hits >= 0.7 * returned


def test_mask_matches_the_drawn_objects(edge: Edge) -> None:
    """The IoU of a mask with the drawn objects is high."""
    overlaps = []
    for seed in SEEDS:
        drawn = scene(seed)
        things = drawn.named(drawn.names[0])
        truth = np.any([thing.mask for thing in things], axis=0)
        overlaps.append(iou(edge.mask(edge.answer(drawn.image, drawn.names[0])["mask_url"]), truth))
    assert np.median(overlaps) >= 0.8
    assert np.mean([overlap >= 0.5 for overlap in overlaps]) >= 0.8


@pytest.mark.parametrize(("width", "height"), [(900, 336), (336, 700), (1280, 960)])
def test_boxes_and_masks_are_in_pixels_of_the_image(edge: Edge, width: int, height: int) -> None:
    """For any size and aspect ratio, boxes and masks are in pixels of the image."""
    drawn = scene(7, width, height)
    answer = edge.answer(drawn.image, drawn.names[0])
    check_mask(edge, answer)
    assert (answer["image_width"], answer["image_height"]) == (width, height)
    assert answer["instances"]
    truth = np.any([thing.mask for thing in drawn.named(drawn.names[0])], axis=0)
    assert iou(edge.mask(answer["mask_url"]), truth) >= 0.5


def test_answer_has_the_fields_of_the_contract(edge: Edge) -> None:
    """The answer has exactly the contract's fields, with consistent labels, scores and boxes."""
    drawn = scene(SEEDS[0])
    answer = edge.answer(drawn.image, drawn.names[0])
    assert set(answer) == {
        *("task_id", "mask_url", "labels", "inference_time_ms", "confidence", "presence"),
        *("instances", "image_width", "image_height", *FACTS),
    }
    info = edge.http.get("/api/v1/model/info").json()
    assert answer["model"] == {
        "checkpoint": info["checkpoint"],
        "sha256": info["weights_sha256"],
        "version": info["model_version"],
    }
    assert answer["settings"] == {"outputs": ["mask"], "score_threshold": 0.5}
    times_ms = answer["timings_ms"]
    of_the_runner_ms = [times_ms[name] for name in ("queue", "encode_image", "decode_prompts", "draw_masks")]
    assert min(of_the_runner_ms) >= 0
    assert 0 < sum(of_the_runner_ms) <= times_ms["segment"] + 1 < 1000 * SERVER_TIMEOUT_S  # each is rounded
    assert 0.0 <= answer["presence"] <= 1.0
    assert answer["labels"] == [drawn.names[0]]
    scores = [instance["score"] for instance in answer["instances"]]
    assert answer["confidence"] == scores[0] == max(scores)
    assert scores == sorted(scores, reverse=True)
    assert all(0.5 < score <= 1.0 for score in scores)
    assert answer["inference_time_ms"] > 0
    for instance in answer["instances"]:
        assert set(instance) == {"label", "score", "box", "area", "number"}
        assert instance["label"] == drawn.names[0]
        x0, y0, x1, y1 = instance["box"]
        assert 0 <= x0 < x1 <= answer["image_width"]
        assert 0 <= y0 < y1 <= answer["image_height"]


def test_task_without_instances_is_done(edge: Edge) -> None:
    """A task whose concept is absent is done: no labels, confidence 0, and a mask of zeros."""
    drawn = scene(SEEDS[1])
    answer = edge.answer(drawn.image, drawn.absent)
    assert (answer["labels"], answer["confidence"], answer["instances"]) == ([], 0.0, [])
    mask = edge.mask(answer["mask_url"])
    assert mask.shape == (drawn.image.height, drawn.image.width)
    assert not mask.any()
    row = edge.settled_row(answer["task_id"])
    assert (row.status, row.labels, row.mask_url) == ("done", [], answer["mask_url"])


def test_row_has_the_result(edge: Edge) -> None:
    """The row of a done task has the mask, the labels and the whole result."""
    drawn = scene(SEEDS[2])
    answer = edge.answer(drawn.image, drawn.names[0])
    row = edge.row(answer["task_id"])
    assert row is not None
    assert (row.status, row.mask_url, row.labels) == ("done", answer["mask_url"], answer["labels"])
    assert {name: row.metadata[name] for name in FACTS} == {name: answer.pop(name) for name in FACTS}
    assert row.metadata["results"] == [answer]
    assert row.metadata["prompts"] == [drawn.names[0]]
    assert row.metadata["confidence"] == answer["confidence"]
    assert row.metadata["inference_time_ms"] == answer["inference_time_ms"]
    assert row.metadata["model_version"]
    assert "error_message" not in row.metadata
    assert row.updated_at >= row.created_at


def test_batch_keeps_the_order_of_the_prompts(edge: Edge) -> None:
    """A batch has one result per prompt, equal to predict's, for duplicates and absent concepts too."""
    drawn = scene(SEEDS[3])
    prompts = [drawn.absent, drawn.names[-1], drawn.names[0], drawn.names[-1]]
    key = edge.upload(png_bytes(drawn.image))
    batch = edge.answer(key, prompts)
    assert set(batch) == {"task_id", "results", "total_inference_time_ms", *FACTS}
    assert {result["task_id"] for result in batch["results"]} == {batch["task_id"]}
    for prompt, result in zip(prompts, batch["results"], strict=True):
        alone = edge.answer(key, prompt)
        assert result["labels"] == alone["labels"]
        assert [found["label"] for found in result["instances"]] == [prompt] * len(alone["instances"])
        for one, other in zip(result["instances"], alone["instances"], strict=True):
            assert one["box"] == pytest.approx(other["box"], abs=0.5)
        check_mask(edge, result)
    first, duplicate = (
        without_ids_and_times(batch["results"][index])
        | {"instances": [found | {"number": 0} for found in batch["results"][index]["instances"]]}
        for index in (1, 3)
    )
    assert first == duplicate


def test_batch_row_has_the_union_of_the_masks(edge: Edge) -> None:
    """A batch's row has the union of all masks, and each found label once."""
    drawn = scene(SEEDS[4])
    prompts = [drawn.names[0], drawn.names[-1], drawn.absent, drawn.names[0]]
    batch = edge.answer(drawn.image, prompts)
    row = edge.settled_row(batch["task_id"])
    assert row.status == "done"
    assert row.mask_url is not None
    union = np.any([edge.mask(result["mask_url"]) for result in batch["results"]], axis=0)
    assert union.any()
    assert np.array_equal(edge.mask(row.mask_url), union)
    assert row.labels == list(dict.fromkeys(name for result in batch["results"] for name in result["labels"]))
    assert row.metadata["results"] == batch["results"]


@pytest.mark.parametrize("orientation", TRANSPOSED)
def test_exif_orientation_is_applied(edge: Edge, orientation: int) -> None:
    """The mask of an image with an EXIF orientation is that of the upright image."""
    upright = scene(SEEDS[5], 480, 336).image
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    transposed = upright.transpose(TRANSPOSED[orientation])
    prompt = scene(SEEDS[5], 480, 336).names[0]
    answer = edge.answer(png_bytes(transposed, exif=exif.tobytes()), prompt)
    assert without_ids_and_times(answer) == without_ids_and_times(edge.answer(upright, prompt))
    check_mask(edge, answer)


def test_exif_orientation_of_a_jpeg_is_applied(edge: Edge) -> None:
    """A portrait JPEG that is stored as landscape gets a portrait mask."""
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    landscape = image_bytes(scene(SEEDS[5], 480, 336).image, "JPEG", exif=exif.tobytes())
    answer = edge.answer(landscape, "circle")
    assert (answer["image_width"], answer["image_height"]) == (336, 480)
    assert edge.mask(answer["mask_url"]).shape == (480, 336)


def rgb() -> Image.Image:
    return scene(SEEDS[6]).image


def grey16() -> Image.Image:
    return Image.fromarray(np.asarray(rgb().convert("L")).astype(np.uint16) * 257)


FORMS: dict[str, tuple[Callable[[], bytes], Callable[[], Image.Image] | None]] = {
    "jpeg": (lambda: image_bytes(rgb(), "JPEG", quality=95), None),
    "jpeg progressive": (lambda: image_bytes(rgb(), "JPEG", progressive=True), None),
    "jpeg grey": (lambda: image_bytes(rgb().convert("L"), "JPEG"), None),
    "jpeg cmyk": (lambda: image_bytes(rgb().convert("CMYK"), "JPEG"), None),
    "webp lossless": (lambda: image_bytes(rgb(), "WEBP", lossless=True), rgb),
    "webp lossy": (lambda: image_bytes(rgb(), "WEBP", quality=90), None),
    "webp rgba": (lambda: image_bytes(rgb().convert("RGBA"), "WEBP", lossless=True), rgb),
    "png grey": (lambda: png_bytes(rgb().convert("L")), lambda: rgb().convert("L").convert("RGB")),
    "png grey alpha": (lambda: png_bytes(rgb().convert("LA")), lambda: rgb().convert("L").convert("RGB")),
    "png palette": (lambda: png_bytes(rgb().quantize(64)), lambda: rgb().quantize(64).convert("RGB")),
    "png rgba": (lambda: png_bytes(rgb().convert("RGBA")), rgb),
    "png 1-bit": (lambda: png_bytes(rgb().convert("1")), lambda: rgb().convert("1").convert("RGB")),
    "png 16-bit grey": (lambda: png_bytes(grey16()), lambda: rgb().convert("L").convert("RGB")),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_format_is_decoded_to_the_same_pixels(edge: Edge, form: str) -> None:
    """PNG, JPEG and WEBP of every kind give the same answer as their decoded pixels."""
    encoded, expected = FORMS[form]
    data = encoded()
    if expected is None:
        with Image.open(io.BytesIO(data)) as image:
            plain = image.convert("RGB")
    else:
        plain = expected()
    found = edge.answer(data, "shape")
    assert without_ids_and_times(found) == without_ids_and_times(edge.answer(plain, "shape"))
    check_mask(edge, found)


@pytest.mark.parametrize("name", ["a1b2", "photo.jpg", "picture.exe", "Ünïcode näme"])
def test_file_name_does_not_matter(edge: Edge, name: str) -> None:
    """The format is detected from the content; the name may have no extension or a wrong one."""
    key = edge.upload(png_bytes(rgb()), name)
    assert edge.answer(key, "circle")["image_width"] == rgb().width


def test_image_url_may_be_a_url(edge: Edge) -> None:
    """The URL of an upload gives the same answer as its key."""
    key = edge.upload(png_bytes(rgb()))
    url = (edge.server.data_dir.resolve() / "storage" / key).as_uri()
    by_url, by_key = edge.answer(url, "circle"), edge.answer(key, "circle")
    assert without_ids_and_times(by_url) == without_ids_and_times(by_key)


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (6000, 3), (2, 2)])
def test_smallest_and_longest_images_are_accepted(edge: Edge, size: tuple[int, int]) -> None:
    """An image of one pixel, or of one row, gets a mask of its size."""
    answer = edge.answer(Image.new("RGB", size, (200, 30, 30)), ["red shape", "circle"])
    for result in answer["results"]:
        assert (result["image_width"], result["image_height"]) == size
        check_mask(edge, result)


def test_done_task_is_replayed(edge: Edge) -> None:
    """A repeated request for a done task gets the same answer, and no second mask is stored."""
    drawn = scene(SEEDS[7])
    for prompt in (drawn.names[0], [drawn.names[0], drawn.absent]):
        body = edge.body(edge.upload(png_bytes(drawn.image)), prompt)
        first = edge.send(body)
        masks = edge.masks(body["task_id"])
        row = edge.row(body["task_id"])
        again = edge.send(body)
        assert (first.status_code, again.status_code) == (200, 200)
        assert again.json() == first.json()
        assert edge.masks(body["task_id"]) == masks
        assert edge.row(body["task_id"]) == row


def test_done_task_is_not_reused_for_other_prompts(edge: Edge) -> None:
    """The id of a task that is done for one prompt is refused for another; the row stays done."""
    drawn = scene(SEEDS[7])
    body = edge.body(edge.upload(png_bytes(drawn.image)), drawn.names[0])
    assert edge.send(body).status_code == httpx.codes.OK
    for other in (drawn.absent, [drawn.names[0], drawn.absent]):
        status, code, message = error_of(edge.send(edge.body(body["image_url"], other, body["task_id"])))
        assert (status, code) == (400, "INVALID_REQUEST")
        assert "task" in message
    assert edge.settled_row(body["task_id"]).status == "done"


def test_failed_task_may_be_retried(edge: Edge) -> None:
    """A task that ended as error can be sent again; its row becomes done, without the error message."""
    body = edge.body(f"uploads/{USER}/{uuid4()}", "circle")
    assert edge.send(body).status_code == httpx.codes.NOT_FOUND
    assert edge.settled_row(body["task_id"]).status == "error"
    edge.upload(png_bytes(rgb()), body["image_url"].rpartition("/")[2])
    assert edge.send(body).status_code == httpx.codes.OK
    row = edge.settled_row(body["task_id"])
    assert row.status == "done"
    assert "error_message" not in row.metadata


def test_task_in_progress_is_refused(edge: Edge) -> None:
    """A task that another attempt has claimed gives 409 with Retry-After; the row does not change."""
    body = edge.body(edge.upload(png_bytes(rgb())), "circle")
    edge.claim(body)
    claimed = edge.row(body["task_id"])
    response = edge.send(body)
    assert error_of(response)[:2] == (409, "TASK_IN_PROGRESS")
    assert 1 <= int(response.headers["Retry-After"]) <= 3 * SERVER_TIMEOUT_S
    assert edge.row(body["task_id"]) == claimed


def test_task_id_may_be_in_upper_case(edge: Edge) -> None:
    """The answer and the row have the task id in lower case."""
    task_id = "ABCDEFAB-CDEF-4ABC-8DEF-" + uuid4().hex[:12].upper()
    response = edge.send(edge.body(edge.upload(png_bytes(rgb())), "circle", task_id))
    assert response.json()["task_id"] == task_id.lower()
    assert edge.settled_row(task_id.lower()).status == "done"


@pytest.mark.parametrize("path", ["/health", PREDICT, BATCH, "/api/v1/model/info", "/"])
def test_request_id_is_echoed(edge: Edge, path: str) -> None:
    """X-Request-ID is returned unchanged, in successful answers and in errors."""
    response = edge.http.get(path, headers={"X-Request-ID": "edge-1:a.b_c"})
    assert response.headers.get_list("X-Request-ID") == ["edge-1:a.b_c"]


@pytest.mark.parametrize("given", [None, "", "has space", "x" * 129, "a\tb", "<script>"])
def test_request_id_is_generated(edge: Edge, given: str | None) -> None:
    """A missing or invalid X-Request-ID is replaced by a new one."""
    headers = {} if given is None else {"X-Request-ID": given}
    first, second = (
        edge.http.get("/health", headers=headers).headers.get_list("X-Request-ID") for _ in range(2)
    )
    assert len(first) == len(second) == 1
    assert UUID(first[0]) != UUID(second[0])


def test_health_needs_no_key(edge: Edge) -> None:
    """Without a key /health reports the state of the model and the GPU."""
    response = new_connection.get(f"{edge.server.url}/health")
    assert response.status_code == httpx.codes.OK
    health = response.json()
    assert (health["status"], health["model_loaded"]) == ("ok", True)
    assert set(health) >= {"status", "model_loaded", "gpu_available"}
    assert health["gpu_available"] == ("gpu_name" in health) == ("vram_total_mb" in health)


def test_model_info_describes_the_checkpoint(edge: Edge) -> None:
    """The route model/info reports the demo checkpoint as a demo, with the numbers of its file."""
    info = edge.http.get("/api/v1/model/info").json()
    weights = DEMO_FOLDER / "model.safetensors"
    with safe_open(weights, "np") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 - not a dict
    config = json.loads((DEMO_FOLDER / "config.json").read_text())
    assert (info["model_name"], info["checkpoint"], info["demo"]) == ("SAM3", "demo", True)
    assert info["parameters"] == sum(int(np.prod(shape)) for shape in shapes)
    assert info["weights_size_gb"] == round(weights.stat().st_size / 1e9, 4)
    assert info["checkpoint_layout"] == "transformers"
    assert info["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert info["input_size"] == config["vision_config"]["backbone_config"]["image_size"]
    assert info["score_threshold"] == 0.5
    assert info["model_version"]
    assert info["limits"] == {
        "max_image_bytes": 10 * 2**20,
        "max_image_pixels": 2**26,
        "max_prompts": 10,
        "max_prompt_characters": 200,
        "max_prompt_tokens": 32,
        "image_formats": ["image/png", "image/jpeg", "image/webp"],
    }


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics"])
def test_probes_need_no_key(edge: Edge, path: str) -> None:
    """In development the probes and the metrics need no key."""
    assert new_connection.get(f"{edge.server.url}{path}").status_code == httpx.codes.OK


def test_keys_are_never_logged(edge: Edge) -> None:
    """The server's log contains no API key."""
    edge.http.get("/api/v1/model/info")
    assert edge.server.api_key not in edge.server.log_path.read_text()


def test_every_form_of_an_answer(edge: Edge) -> None:
    """Every output is stored under its URL, of the image's size, and the masks in the answer agree."""
    drawn = scene(SEEDS[3])
    body = edge.body(edge.upload(png_bytes(drawn.image)), [drawn.names[0], drawn.names[-1]])
    body |= {"outputs": ["instances", "label_map", "overlay", "coco"], "segmentation": "coco_rle"}
    response = edge.send(body)
    assert response.status_code == httpx.codes.OK, response.text
    answer = response.json()
    found = [instance for result in answer["results"] for instance in result["instances"]]
    assert [instance["number"] for instance in found] == [*range(1, len(found) + 1)]
    with Image.open(edge.path(answer["outputs"]["label_map"])) as image:
        labels = np.asarray(image)
    assert labels.shape == (drawn.image.height, drawn.image.width)
    for instance in found:
        crop = edge.mask(instance["mask_url"])
        left, top = instance["mask_offset"]
        whole = np.zeros(labels.shape, dtype=bool)
        whole[top : top + crop.shape[0], left : left + crop.shape[1]] = crop
        assert whole.sum() == instance["area"]
        assert whole[labels == instance["number"]].all()
        rle = instance["segmentation"] | {"counts": instance["segmentation"]["counts"].encode()}
        expected = coco_mask.encode(np.asfortranarray(whole, np.uint8))
        assert coco_mask.iou([rle], [expected], [0]).item() == 1.0
    with Image.open(edge.path(answer["outputs"]["overlay"])) as overlay:
        assert (overlay.format, overlay.size) == ("JPEG", drawn.image.size)
    coco = json.loads(edge.path(answer["outputs"]["coco"]).read_text())
    assert [each["id"] for each in coco["annotations"]] == [instance["number"] for instance in found]
    assert edge.send(body).json() == answer


def test_score_threshold_of_a_request(edge: Edge) -> None:
    """A higher threshold leaves fewer instances, and those score above it; 0 keeps more."""
    drawn = scene(SEEDS[3])
    key = edge.upload(png_bytes(drawn.image))
    counts = []
    for threshold in (0, 0.5, 0.99):
        response = edge.send(edge.body(key, drawn.names[0]) | {"score_threshold": threshold})
        assert response.status_code == httpx.codes.OK, response.text
        scores = [found["score"] for found in response.json()["instances"]]
        assert all(score >= threshold for score in scores)
        counts.append(len(scores))
    assert counts[0] > counts[1] >= counts[2]


def test_every_documented_example_is_answered(edge: Edge) -> None:
    """Each body that the documentation offers is answered with 200, and again when it is sent again."""
    sent = 0
    for path, operations in edge.http.get("/docs.json").json()["paths"].items():
        content = operations.get("post", {}).get("requestBody", {}).get("content", {})
        for example in content.get("application/json", {}).get("examples", {}).values():
            first, again = (edge.http.post(path, json=example["value"]) for _ in range(2))
            assert first.status_code == httpx.codes.OK, first.text
            assert again.json() == first.json()
            sent += 1
    assert sent >= 6


def test_direct_request(edge: Edge) -> None:
    """An image in a form is answered with masks of its size; no row is made."""
    drawn = scene(SEEDS[0])
    response = edge.http.post(
        "/v1/images/segmentations",
        data={"prompt": drawn.names[0], "mask_format": "rle", "model": "sam3"},
        files={"image": png_bytes(drawn.image)},
    )
    assert response.status_code == httpx.codes.OK, response.text
    answer = response.json()
    assert answer["data"]
    assert answer["data"][0]["mask"]["size"] == [drawn.image.height, drawn.image.width]
