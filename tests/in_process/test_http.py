"""The HTTP routes with the gate and a real pipeline: validation, errors and their messages."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from observability.metrics import OVERLOAD_REFUSALS, TASKS
from results import Task
from tests.edge import BATCH, PREDICT, error_of
from tests.in_process.bench import PROMPT, USER, in_time, opened_bench
from tests.in_process.conftest import MAX_BODY_BYTES, client_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from admission import Place, Refusal
    from sam3_runner.prompts import PromptTokenizer
    from tests.in_process.bench import Bench

pytestmark = pytest.mark.anyio

JSON = {"Content-Type": "application/json"}
LONG_ID = "1" * 65
TOO_MANY_TOKENS = "zq " * 60
"""180 characters, far more than 32 tokens."""
FACTS = ("model", "timings_ms", "settings")
"""Fields of the outermost part of an answer."""


def body_of(bench: Bench, path: str = PREDICT, **changes: Any) -> dict[str, Any]:
    """A valid request with changes; `...` removes a field."""
    prompt = {"text_prompt": PROMPT} if path == PREDICT else {"prompts": [PROMPT]}
    body = {"image_url": bench.image, "user_id": USER, "task_id": str(uuid4()), **prompt} | changes
    return {name: value for name, value in body.items() if value is not ...}


async def post(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> httpx.Response:
    """Send JSON that httpx would not encode, such as a lone surrogate."""
    return await http.post(path, content=json.dumps(body), headers=JSON)


async def check_untouched(bench: Bench, task_id: str) -> None:
    """The row of a request that was refused before the claim is still as the Edge inserted it."""
    row = await bench.rows.get(task_id)
    assert row is not None
    assert (row.status, row.metadata) == ("pending", {})
    assert bench.count() == 0
    assert bench.masks() == []


# Valid requests.


async def test_predict(bench: Bench, http: httpx.AsyncClient) -> None:
    """The answer has exactly the fields of the contract, and the row is done."""
    body = body_of(bench)
    answer = (await http.post(PREDICT, json=body)).json()
    assert set(answer) == {
        *("task_id", "mask_url", "labels", "inference_time_ms", "confidence", "presence"),
        *("instances", "image_width", "image_height", *FACTS),
    }
    assert (answer["task_id"], answer["labels"]) == (body["task_id"], [PROMPT])
    assert (answer["image_width"], answer["image_height"]) == (16, 12)
    [found] = answer["instances"]
    assert found == {"label": PROMPT, "score": 0.9, "box": [0.0, 0.0, 8.0, 8.0], "area": 64, "number": 1}
    row = await bench.rows.get(body["task_id"])
    assert row is not None
    facts = {name: answer.pop(name) for name in FACTS}
    assert facts["model"] == {"checkpoint": "demo", "sha256": "0" * 64, "version": "1"}
    assert facts["settings"] == {"outputs": ["mask"], "score_threshold": 0.5}
    assert {"claim", "fetch", "decode", "segment", "encode_masks", "store"} <= set(facts["timings_ms"])
    assert (row.status, row.mask_url, row.metadata["results"]) == ("done", answer["mask_url"], [answer])
    assert {name: row.metadata[name] for name in FACTS} == facts


async def test_batch(bench: Bench, http: httpx.AsyncClient) -> None:
    """A batch has one result a prompt in their order; the row has the union mask and each label once."""
    prompts = ["star", "circle", "star"]
    answer = (await http.post(BATCH, json=body_of(bench, BATCH, prompts=prompts))).json()
    assert set(answer) == {"task_id", "results", "total_inference_time_ms", *FACTS}
    assert [found["number"] for result in answer["results"] for found in result["instances"]] == [1, 2, 3]
    assert [result["labels"] for result in answer["results"]] == [["star"], ["circle"], ["star"]]
    row = await bench.rows.get(answer["task_id"])
    assert row is not None
    assert row.labels == ["star", "circle"]
    assert row.mask_url not in {result["mask_url"] for result in answer["results"]}


async def test_task_id_in_capitals(bench: Bench, http: httpx.AsyncClient) -> None:
    """A task id in upper case is the same task; the answer and the row use lower case."""
    body = body_of(bench, task_id=str(uuid4()).upper())
    answer = (await http.post(PREDICT, json=body)).json()
    assert answer["task_id"] == body["task_id"].lower()
    assert (await http.post(PREDICT, json=body)).json() == answer


async def test_request_id_reaches_the_task(bench: Bench, http: httpx.AsyncClient) -> None:
    """The caller's request id is in the answer of a task that fails by a bug."""
    bench.stages.fail("segment", ZeroDivisionError("a bug"))
    given = str(uuid4())
    response = await http.post(PREDICT, json=body_of(bench), headers={"X-Request-ID": given})
    assert error_of(response) == (500, "INTERNAL_ERROR", "something went wrong on our side")
    assert response.headers["X-Request-ID"] == given


@pytest.mark.parametrize("path", [PREDICT, BATCH])
async def test_deadline_reaches_the_task(bench: Bench, http: httpx.AsyncClient, path: str) -> None:
    """X-Deadline-Ms is the time until which the model may begin."""
    before_s = time.monotonic()
    response = await http.post(path, json=body_of(bench, path), headers={"X-Deadline-Ms": "7000"})
    assert response.status_code == httpx.codes.OK
    [deadline_s] = bench.model.deadlines_s
    assert before_s + 7 <= deadline_s < before_s + 12


@pytest.mark.parametrize("value", ["0", "-1", "5.0", "+5", "1_000", "soon", "", "600001", "²", "9" * 5000])
async def test_invalid_deadline(bench: Bench, http: httpx.AsyncClient, value: str) -> None:
    """A deadline that is no whole number from 1 to 600,000 gives 400, names the header, not its value."""
    headers = {b"X-Deadline-Ms": value.encode()}
    response = await http.post(PREDICT, json=body_of(bench), headers=headers)
    status, code, message = error_of(response)
    assert (status, code) == (400, "INVALID_REQUEST")
    assert message.startswith("X-Deadline-Ms: ")
    assert not value or value not in message.removeprefix("X-Deadline-Ms: ").replace("1 or more", "")
    assert not bench.stages.entered["claim"]


@pytest.mark.parametrize(
    ("stage", "path"), [("check", "/health"), ("check", "/api/v1/model/info"), ("check", PREDICT)]
)
async def test_bug_in_a_route(
    bench: Bench, http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture, stage: str, path: str
) -> None:
    """An unknown exception in any route gives 500 with our error body, and is logged once."""
    bench.stages.fail(stage, ZeroDivisionError("private"))
    response = await (http.post(path, json=body_of(bench)) if path == PREDICT else http.get(path))
    assert error_of(response) == (500, "INTERNAL_ERROR", "something went wrong on our side")
    assert len([record for record in caplog.records if record.exc_info]) == 1


@pytest.mark.parametrize("state", ["ok", "loading", "error"])
async def test_health(bench: Bench, http: httpx.AsyncClient, state: str) -> None:
    """/health is always 200; the other routes give 503 until the model is loaded."""
    bench.model.state = state
    health = await http.get("/health")
    assert health.status_code == httpx.codes.OK
    assert health.json() == {
        "status": state,
        "model_loaded": state == "ok",
        "gpu_available": False,
        "runners": [{"state": state}],
    }
    if state != "ok":
        for response in (await http.get("/api/v1/model/info"), await http.post(PREDICT, json=body_of(bench))):
            assert error_of(response)[:2] == (503, "MODEL_NOT_LOADED")
            assert response.headers["Retry-After"] == "2"


async def test_health_shows_the_progress(bench: Bench, http: httpx.AsyncClient) -> None:
    """While the model loads, /health has the step that it is at, and so have errors of other routes."""
    bench.model.state, bench.model.detail = "loading", "the model's passes are being recorded"
    assert (await http.get("/health")).json()["detail"] == bench.model.detail
    assert error_of(await http.get("/api/v1/model/info")) == (503, "MODEL_NOT_LOADED", bench.model.detail)


# Invalid requests.

WRONG_BODIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "unknown field": (PREDICT, {"threshold": 0.5}, "threshold"),
    "batch's field": (PREDICT, {"prompts": ["cat"]}, "prompts"),
    "prompt missing": (PREDICT, {"text_prompt": ...}, "text_prompt"),
    "prompt null": (PREDICT, {"text_prompt": None}, "text_prompt"),
    "prompt a number": (PREDICT, {"text_prompt": 5}, "text_prompt"),
    "prompt a list": (PREDICT, {"text_prompt": ["cat"]}, "text_prompt"),
    "prompt empty": (PREDICT, {"text_prompt": ""}, "text_prompt"),
    "prompt white": (PREDICT, {"text_prompt": " \u3000 "}, "text_prompt"),
    "prompt of 201 characters": (PREDICT, {"text_prompt": "a" * 201}, "text_prompt"),
    "prompt of too many tokens": (PREDICT, {"text_prompt": TOO_MANY_TOKENS}, "text_prompt"),
    "prompt with NUL": (PREDICT, {"text_prompt": "a\0b"}, "text_prompt"),
    "prompt with a line end": (PREDICT, {"text_prompt": "a\nb"}, "text_prompt"),
    "prompt with a lone surrogate": (PREDICT, {"text_prompt": "\ud800"}, "text_prompt"),
    "url missing": (PREDICT, {"image_url": ...}, "image_url"),
    "url empty": (PREDICT, {"image_url": ""}, "image_url"),
    "url too long": (PREDICT, {"image_url": "u" * 2049}, "image_url"),
    "url a number": (PREDICT, {"image_url": 1}, "image_url"),
    "user missing": (PREDICT, {"user_id": ...}, "user_id"),
    "user empty": (PREDICT, {"user_id": ""}, "user_id"),
    "user too long": (PREDICT, {"user_id": LONG_ID}, "user_id"),
    "user a path": (PREDICT, {"user_id": "../user-1"}, "user_id"),
    "user with a line end": (PREDICT, {"user_id": "user-1\n"}, "user_id"),
    "user not ASCII": (PREDICT, {"user_id": "usér"}, "user_id"),
    "user with NUL": (PREDICT, {"user_id": "user\0"}, "user_id"),
    "task missing": (PREDICT, {"task_id": ...}, "task_id"),
    "task empty": (PREDICT, {"task_id": ""}, "task_id"),
    "task no UUID": (PREDICT, {"task_id": "1234"}, "task_id"),
    "task a path": (PREDICT, {"task_id": "../../etc/passwd"}, "task_id"),
    "task a number": (PREDICT, {"task_id": 7}, "task_id"),
    "task null": (PREDICT, {"task_id": None}, "task_id"),
    "no prompts": (BATCH, {"prompts": []}, "prompts"),
    "eleven prompts": (BATCH, {"prompts": ["cat"] * 11}, "prompts"),
    "prompts a text": (BATCH, {"prompts": "cat"}, "prompts"),
    "prompts missing": (BATCH, {"prompts": ...}, "prompts"),
    "one prompt empty": (BATCH, {"prompts": ["cat", ""]}, "prompts.1"),
    "one prompt null": (BATCH, {"prompts": ["cat", None]}, "prompts.1"),
    "one prompt too long": (BATCH, {"prompts": ["cat", "dog", "a" * 201]}, "prompts.2"),
    "one prompt of too many tokens": (BATCH, {"prompts": ["cat", TOO_MANY_TOKENS]}, "prompts.1"),
    "predict's field": (BATCH, {"text_prompt": "cat"}, "text_prompt"),
    "batch with boxes": (BATCH, {"boxes": [[1, 1, 2, 2]]}, "boxes"),
    "neither text nor boxes": (BATCH, {"prompts": ["cat", {}]}, "prompts.1.text"),
    "unknown field of a prompt": (BATCH, {"prompts": [{"text": "cat", "size": 1}]}, "prompts.0.size"),
    "box without area": (PREDICT, {"boxes": [[5, 5, 5, 9]]}, "boxes.0"),
    "box upside down": (BATCH, {"prompts": [{"boxes": [[1, 1, 2, 2], [1, 9, 2, 3]]}]}, "prompts.0.boxes.1"),
    "box of three numbers": (PREDICT, {"boxes": [[1, 2, 3]]}, "boxes.0.3"),
    "box not finite": (PREDICT, {"boxes": [[1, 2, 3, float("inf")]]}, "boxes.0.3"),
    "box with text": (PREDICT, {"boxes": [[1, 2, 3, "x"]]}, "boxes.0.3"),
    "boxes null": (PREDICT, {"boxes": None}, "boxes"),
    "no boxes": (PREDICT, {"boxes": []}, "boxes"),
    "33 boxes": (PREDICT, {"boxes": [[1, 1, 2, 2]] * 33}, "boxes"),
    "labels of another length": (PREDICT, {"boxes": [[1, 1, 2, 2]], "labels": [1, 0]}, "labels"),
    "labels without boxes": (PREDICT, {"labels": [1]}, "labels"),
    "label 2": (PREDICT, {"boxes": [[1, 1, 2, 2]], "labels": [2]}, "labels.0"),
    "label true": (PREDICT, {"boxes": [[1, 1, 2, 2]], "labels": [True]}, "labels.0"),
    "threshold over 1": (PREDICT, {"score_threshold": 1.01}, "score_threshold"),
    "threshold below 0": (PREDICT, {"score_threshold": -0.1}, "score_threshold"),
    "threshold NaN": (PREDICT, {"score_threshold": float("nan")}, "score_threshold"),
    "threshold null": (PREDICT, {"score_threshold": None}, "score_threshold"),
    "threshold of one prompt": (
        BATCH,
        {"prompts": [{"text": "cat", "score_threshold": 2}]},
        "prompts.0.score_threshold",
    ),
    "nms over 1": (PREDICT, {"nms_iou": 2}, "nms_iou"),
    "no instances": (PREDICT, {"max_instances": 0}, "max_instances"),
    "201 instances": (PREDICT, {"max_instances": 201}, "max_instances"),
    "negative area": (PREDICT, {"min_area": -1}, "min_area"),
    "area no integer": (PREDICT, {"min_area": 1.5}, "min_area"),
    "huge holes": (PREDICT, {"fill_holes": 2**26 + 1}, "fill_holes"),
    "islands a text": (PREDICT, {"remove_islands": "9"}, "remove_islands"),
    "unknown output": (PREDICT, {"outputs": ["mask", "video"]}, "outputs.1"),
    "outputs a text": (PREDICT, {"outputs": "mask"}, "outputs"),
    "unknown segmentation": (PREDICT, {"segmentation": "rle"}, "segmentation"),
    "negative tolerance": (PREDICT, {"polygon_tolerance": -1}, "polygon_tolerance"),
}


@pytest.mark.parametrize("case", WRONG_BODIES)
async def test_wrong_field_is_named(bench: Bench, http: httpx.AsyncClient, case: str) -> None:
    """A missing, unknown or wrong field gives 400 with its name; the row stays pending."""
    path, wrong, field = WRONG_BODIES[case]
    good = body_of(bench, path)
    await bench.rows.insert_pending(Task(good["task_id"], USER, bench.image, (PROMPT,)))
    changed = {name: value for name, value in (good | wrong).items() if value is not ...}
    status, code, message = error_of(await post(http, path, changed))
    assert (status, code) == (400, "INVALID_REQUEST")
    assert message.startswith(f"{field}: ")
    assert LONG_ID not in message
    await check_untouched(bench, good["task_id"])


async def test_longest_prompts_are_accepted(bench: Bench, http: httpx.AsyncClient) -> None:
    """A prompt of 32 tokens, one of 200 characters, and ten prompts are accepted; 33 tokens are not."""
    prompts: list[str | list[str]] = [
        *(" ".join(["cat"] * 30), f"red{' ' * 191}circle", [f"circle {number}" for number in range(10)])
    ]
    for prompt in prompts:
        path, field = (PREDICT, "text_prompt") if isinstance(prompt, str) else (BATCH, "prompts")
        response = await http.post(path, json=body_of(bench, path, **{field: prompt}))
        assert response.status_code == httpx.codes.OK, response.text
    response = await http.post(PREDICT, json=body_of(bench, text_prompt=" ".join(["cat"] * 31)))
    assert error_of(response)[2] == "text_prompt: has 33 tokens; the model reads 32"


REFUSED_PROMPTS: dict[str, tuple[str, str]] = {
    "NUL": ("a\0b", "holds a control character (U+0000)"),
    "line feed at the end": ("black circle\n", "holds a control character (U+000A)"),
    "tab": ("black\tcircle", "holds a control character (U+0009)"),
    "escape": ("\x1b[2Kcircle", "holds a control character (U+001B)"),
    "C1 control": ("a\u009bb", "holds a control character (U+009B)"),
    "line separator": ("a\u2028b", "holds a line separator (U+2028)"),
    "paragraph separator": ("a\u2029", "holds a paragraph separator (U+2029)"),
    "half of a pair": ("a\ud83d", "holds half of a surrogate pair (U+D83D)"),
    "spaces": (" \u00a0\u3000", "must hold more than spaces and invisible characters"),
    "joiners": ("\u200d\u200c\ufeff", "must hold more than spaces and invisible characters"),
    "fillers": ("\u3164\u2800\ufe0f", "must hold more than spaces and invisible characters"),
    "tags": ("\U000e0067\U000e007f", "must hold more than spaces and invisible characters"),
}


@pytest.mark.parametrize("case", REFUSED_PROMPTS)
async def test_invalid_text_is_refused(bench: Bench, http: httpx.AsyncClient, case: str) -> None:
    """The error names the character by its number and does not repeat the text; no row is made."""
    text, reason = REFUSED_PROMPTS[case]
    body = body_of(bench, text_prompt=text)
    assert error_of(await post(http, PREDICT, body)) == (400, "INVALID_REQUEST", f"text_prompt: {reason}")
    assert await bench.rows.get(body["task_id"]) is None


RAW_BODIES: dict[str, tuple[bytes, str | None]] = {
    "empty": (b"", "application/json"),
    "not JSON": (b"{", "application/json"),
    "half a string": (b'{"image_url": "', "application/json"),
    "a list": (b"[]", "application/json"),
    "a text": (b'"text"', "application/json"),
    "null": (b"null", "application/json"),
    "NaN": (b"NaN", "application/json"),
    "a huge number": (b'{"task_id": ' + b"9" * 60_000 + b"}", "application/json"),
    "not UTF-8": (b'{"image_url": "\xff\xfe"}', "application/json"),
    "UTF-16": ('{"image_url": "a"}'.encode("utf-16"), "application/json"),
    "deep lists": (b"[" * 60_000, "application/json"),
    "deep objects": (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "application/json"),
    "deep within a field": (b'{"text_prompt":' + b"[" * 900 + b"]" * 900 + b"}", "application/json"),
    "a form": (b"image_url=a&text_prompt=b", "application/x-www-form-urlencoded"),
    "multipart": (b"--x--", "multipart/form-data; boundary=x"),
    "no content type": (b'{"a": 1}', None),
    "plain text": (b'{"a": 1}', "text/plain"),
    "a broken content type": (b'{"a": 1}', "application/json; charset=\xff"),
}


@pytest.mark.parametrize("path", [PREDICT, BATCH])
@pytest.mark.parametrize("case", RAW_BODIES)
async def test_unreadable_body_is_refused(http: httpx.AsyncClient, case: str, path: str) -> None:
    """A body that is not a JSON object with the right content type gives 400 with a short message."""
    content, kind = RAW_BODIES[case]
    headers = {} if kind is None else {b"Content-Type": kind.encode("latin-1")}
    status, code, message = error_of(await http.post(path, content=content, headers=headers))
    assert (status, code) == (400, "INVALID_REQUEST")
    assert len(message) < 300


SENTENCES: dict[str, tuple[bytes, str]] = {
    "half a pair in a name": (
        b'{"\\ud800": 1}',
        "the body: the name of a field holds half of a surrogate pair (U+D800)",
    ),
    "broken off": (
        b'{"image_url": "a',
        "the body: is not JSON: Unterminated string starting at (character 14)",
    ),
    "two values": (b"{} {}", "the body: is not JSON: Extra data (character 3)"),
    "not UTF-8": (b'{"image_url": "\xff"}', "the body: is not UTF-8 (byte 15)"),
    "too deep": (b"[" * 60_000, "the body: is nested too deeply"),
    "a number of 5,000 digits": (b"[" + b"9" * 5000 + b"]", "the body: holds a number of too many digits"),
    "no object": (b"[]", "the body: must be a JSON object, sent with Content-Type: application/json"),
    "NaN": (b"NaN", "the body: must be a JSON object, sent with Content-Type: application/json"),
}


@pytest.mark.parametrize("case", SENTENCES)
async def test_error_describes_the_unreadable_body(http: httpx.AsyncClient, case: str) -> None:
    """The error describes the fault of an unreadable body without repeating it."""
    content, sentence = SENTENCES[case]
    response = await http.post(PREDICT, content=content, headers=JSON)
    assert error_of(response) == (400, "INVALID_REQUEST", sentence)


@pytest.mark.parametrize("field", ["image_url", "user_id", "task_id"])
async def test_lone_surrogate_is_refused(bench: Bench, http: httpx.AsyncClient, field: str) -> None:
    """The error names the field and the lone surrogate."""
    response = await post(http, PREDICT, body_of(bench, **{field: "\udc00"}))
    assert error_of(response)[2] == f"{field}: holds half of a surrogate pair (U+DC00)"


async def test_long_name_of_an_unknown_field_is_truncated(bench: Bench, http: httpx.AsyncClient) -> None:
    """The error truncates the name of an unknown field."""
    status, _, message = error_of(await post(http, PREDICT, body_of(bench) | {"k" * 50_000: 1}))
    assert status == httpx.codes.BAD_REQUEST
    assert message.startswith("kkk")
    assert len(message) < 200


async def test_byte_order_mark_is_ignored(bench: Bench, http: httpx.AsyncClient) -> None:
    """A byte order mark before the JSON is ignored."""
    content = b"\xef\xbb\xbf" + json.dumps(body_of(bench)).encode()
    assert (await http.post(PREDICT, content=content, headers=JSON)).status_code == httpx.codes.OK


async def test_last_of_two_values_for_a_field_counts(bench: Bench, http: httpx.AsyncClient) -> None:
    """If a field occurs twice, the last value counts."""
    text = json.dumps(body_of(bench))[:-1] + ', "image_url": "uploads/other/x"}'
    response = await http.post(PREDICT, content=text, headers=JSON)
    assert error_of(response)[:2] == (403, "FORBIDDEN")


async def test_body_of_the_limit(bench: Bench, http: httpx.AsyncClient) -> None:
    """A request of exactly 64 KiB is accepted; one more byte gives 413, and no row is made."""
    text = json.dumps(body_of(bench))
    good = await http.post(PREDICT, content=text.ljust(MAX_BODY_BYTES), headers=JSON)
    assert good.status_code == httpx.codes.OK
    body = body_of(bench)
    response = await http.post(PREDICT, content=json.dumps(body).ljust(MAX_BODY_BYTES + 1), headers=JSON)
    assert error_of(response)[:2] == (413, "FILE_TOO_LARGE")
    assert await bench.rows.get(body["task_id"]) is None


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        *(("GET", PREDICT, "POST"), ("PUT", PREDICT, "POST"), ("DELETE", BATCH, "POST")),
        *(("POST", "/health", "GET, HEAD"), ("POST", "/api/v1/model/info", "GET, HEAD")),
    ],
)
async def test_wrong_method(http: httpx.AsyncClient, method: str, path: str, allow: str) -> None:
    """A wrong method gives 405 with our error body and Allow."""
    response = await http.request(method, path)
    assert error_of(response)[:2] == (405, "METHOD_NOT_ALLOWED")
    assert response.headers["Allow"] == allow


@pytest.mark.parametrize(
    "path", ["/api/v1/anything", f"{PREDICT}/", "/health/", "/api", "/%2e%2e/etc/passwd"]
)
async def test_unknown_path(http: httpx.AsyncClient, path: str) -> None:
    """An unknown path gives 404 with our error body, and no redirect."""
    assert error_of(await http.get(path))[:2] == (404, "NOT_FOUND")


FOREIGN_URLS: dict[str, tuple[str, set[int]]] = {
    "another user's": ("uploads/user-2/cat", {403}),
    "a longer user's": ("uploads/user-11/cat", {403}),
    "climbing": (f"uploads/{USER}/../user-2/cat", {400}),
    "climbing out": (f"uploads/{USER}/../../../../../../etc/passwd", {400}),
    "escaped climbing": (f"uploads/{USER}/%2e%2e/user-2/cat", {404}),
    "absolute": ("/etc/passwd", {400}),
    "doubled slash": (f"uploads//{USER}/cat", {400}),
    "dot": (f"uploads/./{USER}/cat", {400}),
    "backslash": (f"uploads\\{USER}\\cat", {400}),
    "a mask": (f"masks/{USER}/x.png", {403}),
    "file URL": ("file:///etc/passwd", {403}),
    "file URL with a host": ("file://evil/etc/passwd", {403}),
    "web": ("https://example.com/cat.png", {403}),
    "metadata service": ("http://169.254.169.254/latest/meta-data/", {403}),
    "our own server": ("http://127.0.0.1/health", {403}),
    "data URL": ("data:image/png;base64,AAAA", {403}),
    "NUL": (f"uploads/{USER}/cat\0.png", {400}),
    "line end": (f"uploads/{USER}/cat\n", {400}),
    "tab": (f"uploads/{USER}/c\tat", {400}),
    "lone surrogate": (f"uploads/{USER}/\ud800", {400}),
    "the folder": (f"uploads/{USER}/", {400}),
    "an option": ("--help", {403}),
}


@pytest.mark.parametrize("case", FOREIGN_URLS)
async def test_image_url_stays_in_the_users_uploads(bench: Bench, http: httpx.AsyncClient, case: str) -> None:
    """An image_url outside the user's uploads is refused, and the row has the same message."""
    url, allowed = FOREIGN_URLS[case]
    body = body_of(bench, image_url=url)
    status, code, message = error_of(await post(http, PREDICT, body))
    assert status in allowed
    assert code == {400: "INVALID_REQUEST", 403: "FORBIDDEN", 404: "IMAGE_NOT_FOUND"}[status]
    assert "image" in message
    assert "passwd" not in message
    row = await bench.rows.get(body["task_id"])
    if row is not None:  # a body that is no request has none
        assert (row.status, row.metadata) == ("error", {"error_message": message})
    assert bench.masks() == []


# Overload.


@pytest.fixture
async def full(tmp_path: Path, tokenizer: PromptTokenizer) -> AsyncIterator[Bench]:
    """A bench that has as many requests in progress as it may have: one, which waits for the model."""
    async with opened_bench(tmp_path, tokenizer, max_in_flight=1) as bench:
        bench.stages.hold("segment")
        caller = bench.call()
        await bench.stages.entry_of("segment")
        bench.stages.entered.clear()
        yield bench
        bench.stages.release("segment")
        await in_time(caller)


def refusals(code: str = "OVERLOADED") -> tuple[float, float]:
    """Requests that were refused so far, in each of the two metrics."""
    return TASKS.labels("refused", code)._value.get(), OVERLOAD_REFUSALS.labels("in_flight")._value.get()


@pytest.mark.parametrize("path", [PREDICT, BATCH])
async def test_overload(full: Bench, path: str) -> None:
    """A refusal has the body, the headers and the metrics that the route's own refusal has."""
    failure = await full.failure()  # as the route would refuse it
    before = refusals()
    async with client_of(full) as http:
        body = body_of(full, path)
        response = await http.post(path, json=body, headers={"X-Request-ID": "mine"})
        assert response.status_code == failure.status == 429
        assert response.text == failure.body("mine").model_dump_json()
        assert response.headers["Retry-After"] == failure.headers["Retry-After"]
        assert (response.headers["Content-Type"], response.headers["X-Request-ID"]) == (
            "application/json",
            "mine",
        )
        assert refusals() == tuple(count + 1 for count in before)
        assert await full.rows.get(body["task_id"]) is None
        assert full.stages.entered["claim"] == 0
        assert (await http.get("/health")).status_code == 200


@pytest.mark.parametrize(
    ("path", "prompt", "cost"),
    [
        (PREDICT, {"text_prompt": ..., "boxes": [[0, 0, 5, 5]]}, 1.0),
        (BATCH, {"prompts": ["star", {"boxes": [[0, 0, 5, 5]]}, {"text": "circle"}]}, 1.2),
    ],
)
async def test_requests_with_boxes_under_overload(
    full: Bench, monkeypatch: pytest.MonkeyPatch, path: str, prompt: dict[str, Any], cost: float
) -> None:
    """They are refused before their route reads them; each prompt costs, whatever it is."""
    places: list[float] = []
    check = full.pipeline.admission.check

    def checked(place: Place) -> Refusal | None:
        places.append(place.cost)
        return check(place)

    monkeypatch.setattr(full.pipeline.admission, "check", checked)
    async with client_of(full) as http:
        response = await http.post(path, json=body_of(full, path, **prompt))
        assert error_of(response)[:2] == (429, "OVERLOADED")
    assert places == pytest.approx([cost])
    assert not full.stages.entered["check"]  # the route's own refusal asks the model first


async def test_order_of_errors_under_overload(full: Bench) -> None:
    """An overloaded server still names a wrong key, body and deadline, but counts no tokens."""
    async with client_of(full) as http:

        async def code_of(headers: dict[str, str] | None = None, **changes: Any) -> tuple[int, str]:
            response = await http.post(PREDICT, json=body_of(full, **changes), headers=headers)
            return error_of(response)[:2]

        assert await code_of(text_prompt=TOO_MANY_TOKENS) == (429, "OVERLOADED")
        assert await code_of({"X-Deadline-Ms": "60000"}) == (429, "OVERLOADED")
        assert await code_of({"X-API-Key": "wrong"}) == (401, "AUTH_INVALID")
        assert await code_of({"X-Deadline-Ms": "0"}) == (400, "INVALID_REQUEST")
        assert await code_of(user_id="") == (400, "INVALID_REQUEST")
        assert await code_of(more=1) == (400, "INVALID_REQUEST")
        full.model.state = "error"
        assert await code_of() == (503, "MODEL_NOT_LOADED")
        full.model.state = "ok"


# Random requests.

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(["image_url", "text_prompt", "prompts", "user_id", "task_id"])
LIKELY = {
    "image_url": st.just(f"uploads/{USER}/none") | st.text(max_size=40),
    "text_prompt": st.text(max_size=220),
    "prompts": st.lists(st.text(max_size=20), max_size=12),
    "user_id": st.just(USER) | st.text(max_size=70),
    "task_id": st.uuids().map(str) | st.text(max_size=40),
}
IN_PROCESS = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@given(
    path=st.sampled_from([PREDICT, BATCH]),
    likely=st.fixed_dictionaries({}, optional=LIKELY),
    wild=st.dictionaries(FIELDS | st.text(max_size=8), JSON_VALUES, max_size=2),
)
@IN_PROCESS
async def test_any_json_gets_a_proper_answer(
    http: httpx.AsyncClient, path: str, likely: dict[str, Any], wild: dict[str, Any]
) -> None:
    """Any JSON gives an error of the contract, never a 5xx."""
    assert error_of(await post(http, path, likely | wild))[0] in {400, 403, 404, 409, 413}


@given(content=st.binary(max_size=200))
@IN_PROCESS
async def test_any_bytes_get_a_proper_answer(http: httpx.AsyncClient, content: bytes) -> None:
    """Any bytes as a body give 400."""
    response = await http.post(PREDICT, content=content, headers=JSON)
    assert error_of(response)[:2] == (400, "INVALID_REQUEST")
