"""The route that takes an image in its body: its form, its answer, its limits; it touches no store."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from direct_form import PATH
from observability.metrics import DIRECT_REQUESTS
from sam3_runner import RunnerStopped
from tests.edge import error_of
from tests.in_process.bench import HEAVY_IMAGE, SMALL_IMAGE, in_time, opened_bench, wait_until
from tests.in_process.conftest import client_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    import httpx

    from contract import BatchResponse
    from sam3_runner.prompts import PromptTokenizer
    from tests.in_process.bench import Bench

pytestmark = pytest.mark.anyio


async def post(http: httpx.AsyncClient, image: bytes | None = SMALL_IMAGE, **fields: Any) -> httpx.Response:
    """Send a form; a list is sent as repeated fields."""
    files = {} if image is None else {"image": ("picture", image)}
    return await http.post(PATH, data=fields, files=files or {"other": b""})


def check_untouched(bench: Bench) -> None:
    """No store and no row was touched."""
    assert bench.masks() == []
    assert not {"claim", "fetch", "upload", "settle"} & bench.stages.entered.keys()
    assert bench.count() == 0


async def test_masks_as_png(bench: Bench, http: httpx.AsyncClient) -> None:
    """The answer has each instance's mask as a PNG of the image's size, its box and its score."""
    answer = (await post(http, prompt="red circle")).json()
    [found] = answer["data"]
    assert (found["box"], found["score"]) == ([0.0, 0.0, 8.0, 8.0], 0.9)
    with Image.open(io.BytesIO(base64.b64decode(found["mask"]))) as mask:
        assert (mask.size, mask.mode) == ((16, 12), "L")
        levels = np.asarray(mask)
    assert (levels[:8, :8] == 255).all()
    assert levels.sum() == 64 * 255
    assert answer["model"]["checkpoint"] == "demo"
    assert "segment" in answer["timings_ms"]
    check_untouched(bench)


@pytest.mark.parametrize(
    "fields",
    [
        {"boxes": "[[1, 1, 7, 7], [2, 2, 9, 9]]", "box_labels": "[1, 0]"},
        {"boxes": ["[1, 1, 7, 7]", "[2, 2, 9, 9]"], "box_labels": ["1", "0"]},
    ],
)
async def test_boxes_as_text_or_repeated(
    bench: Bench, http: httpx.AsyncClient, fields: dict[str, Any]
) -> None:
    """Boxes and labels are JSON text, or repeated fields; a prompt is not needed beside them."""
    response = await post(http, mask_format="rle", score_threshold="0", model="sam3", **fields)
    [found] = response.json()["data"]
    assert found["mask"]["size"] == [12, 16]
    [prompt] = bench.model.prompts
    assert (prompt.text, prompt.labels, prompt.score_threshold) == (None, (True, False), 0.0)
    check_untouched(bench)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no image": ({"image": None, "prompt": "cat"}, "image"),
    "no prompt": ({}, "prompt"),
    "control character": ({"prompt": "a\nb"}, "prompt"),
    "tokens": ({"prompt": "zq " * 60}, "prompt"),
    "unknown field": ({"prompt": "cat", "threshold": "1"}, "threshold"),
    "outputs need a store": ({"prompt": "cat", "outputs": "coco"}, "outputs"),
    "boxes no JSON": ({"boxes": "[[1, 2"}, "boxes"),
    "box without area": ({"boxes": "[[1, 1, 1, 2]]"}, "boxes.0"),
    "deep boxes": ({"boxes": "[" * 30_000}, "boxes"),
    "box outside": ({"boxes": "[[99, 99, 100, 100]]"}, "boxes[0]"),
    "labels": ({"boxes": "[[1, 1, 2, 2]]", "box_labels": "[1, 0]"}, "box_labels"),
    "mask format": ({"prompt": "cat", "mask_format": "svg"}, "mask_format"),
    "threshold": ({"prompt": "cat", "score_threshold": "2"}, "score_threshold"),
    "boolean": ({"prompt": "cat", "score_threshold": "true"}, "score_threshold"),
    "null": ({"prompt": "cat", "nms_iou": "null"}, "nms_iou"),
    "labels alone": ({"prompt": "cat", "box_labels": "[1]"}, "box_labels"),
    "instances": ({"prompt": "cat", "max_instances": "many"}, "max_instances"),
}


@pytest.mark.parametrize("case", WRONG)
async def test_wrong_field_is_named(bench: Bench, http: httpx.AsyncClient, case: str) -> None:
    """A wrong field gives 400 with its name."""
    fields, name = WRONG[case]
    status, code, message = error_of(await post(http, **fields))
    assert (status, code) == (400, "INVALID_REQUEST")
    assert message.startswith(name)
    check_untouched(bench)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "multipart/form-data; boundary=x"),
        (b"--x\r\n", "multipart/form-data; boundary=x"),
        (b"--x--", "multipart/form-data"),
        (b'{"prompt": "cat"}', "application/json"),
        (b"prompt=cat", "application/x-www-form-urlencoded"),
        (b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--", "multipart/form-data; boundary=x"),
    ],
)
async def test_broken_form_is_refused(http: httpx.AsyncClient, content: bytes, kind: str) -> None:
    """What is no form is a 400, never a 5xx."""
    response = await http.post(PATH, content=content, headers={"Content-Type": kind})
    assert error_of(response)[:2] == (400, "INVALID_REQUEST")


async def test_hostile_image_is_refused(bench: Bench, http: httpx.AsyncClient) -> None:
    """An image that is none is a 415, as on the other routes; a body over the limit a 413."""
    assert error_of(await post(http, b"no picture", prompt="cat"))[:2] == (415, "UNSUPPORTED_IMAGE")
    assert error_of(await post(http, b"x" * 100_001, prompt="cat"))[:2] == (413, "FILE_TOO_LARGE")
    check_untouched(bench)


async def test_key_is_needed(http: httpx.AsyncClient) -> None:
    """Without the key nothing below /v1/ is answered."""
    for path in (PATH, "/v1/other"):
        response = await http.post(path, headers={"X-API-Key": "wrong"})
        assert error_of(response)[:2] == (401, "AUTH_INVALID")


async def test_heavy_image_takes_its_turn(bench: Bench, http: httpx.AsyncClient) -> None:
    """A heavy image passes the gate of heavy images and gives its place back."""
    response = await post(http, HEAVY_IMAGE, prompt="cat")
    assert response.status_code == 200, response.text
    assert json.loads(response.text)["data"]
    assert bench.pipeline.heavy_turn.has_free_slot
    assert bench.pipeline.admission.gate.has_free_slot


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT"])
async def test_route_that_is_off_is_not_found(bench: Bench, method: str) -> None:
    """Without DIRECT_API the path is answered as an unknown one, also for a long body; it needs the key."""
    async with client_of(bench, with_direct=False) as http:
        for path in (PATH, "/v1/other"):
            found = await http.request(method, path)
            assert found.status_code == 404
            if method != "HEAD":
                assert error_of(found) == (404, "NOT_FOUND", "there is nothing at this path")
            refused = await http.request(method, path, headers={"X-API-Key": "wrong"})
            assert refused.status_code == 401
        long = await post(http, b"x" * 70_000, prompt="cat")
        assert error_of(long)[:2] == (404, "NOT_FOUND")


async def test_direct_request_does_not_run_beside_a_suspect(bench: Bench, http: httpx.AsyncClient) -> None:
    """A task that is retried alone waits for a direct request, and the next one waits for the task."""
    bench.stages.fail("segment", RunnerStopped("the model's process stopped"))
    suspect = bench.request()
    await bench.failure(suspect)
    bench.stages.mend("segment")
    bench.stages.hold("decode")
    first = asyncio.create_task(post(http, prompt="cat"))
    await bench.stages.entry_of("decode", calls=2)
    again = bench.call(suspect)
    await wait_until(lambda: bench.count(where="begun = 2") == 1)  # it waits to work alone
    second = asyncio.create_task(post(http, prompt="dog"))
    assert await bench.stages.stays_at("decode", 2)
    bench.stages.release("decode")
    answers = await in_time(asyncio.gather(first, second))
    await in_time(again)
    assert [answer.status_code for answer in answers] == [200, 200]
    assert [prompt.text for prompt in bench.model.prompts] == ["red circle", "cat", "red circle", "dog"]
    assert bench.stages.at_once["decode"] == bench.stages.at_once["segment"] == 1
    assert bench.count("other_work") == 0


async def test_direct_request_waits_for_a_suspect_until_its_deadline(
    bench: Bench, http: httpx.AsyncClient
) -> None:
    """Behind a task that is retried alone a direct request ends with 504, its image not decoded."""
    bench.stages.fail("segment", RunnerStopped("the model's process stopped"))
    suspect = bench.request()
    await bench.failure(suspect)
    bench.stages.mend("segment")
    bench.stages.hold("segment")
    again = bench.call(suspect)
    await bench.stages.entry_of("segment", calls=2)
    response = await in_time(
        http.post(
            PATH,
            data={"prompt": "cat"},
            files={"image": ("a", SMALL_IMAGE)},
            headers={"X-Deadline-Ms": "100"},
        )
    )
    assert error_of(response)[:2] == (504, "DEADLINE_EXCEEDED")
    assert bench.stages.entered["decode"] == 2
    bench.stages.release("segment")
    await in_time(again)
    assert bench.count("other_work") == 0


# Overload.


@asynccontextmanager
async def full_bench(
    folder: Path, tokenizer: PromptTokenizer
) -> AsyncIterator[tuple[Bench, asyncio.Task[BatchResponse]]]:
    """A bench with as many requests in progress as it may have: one, which waits for the model; its call."""
    async with opened_bench(folder, tokenizer, max_in_flight=1) as bench:
        bench.stages.hold("segment")
        caller = bench.call()
        await bench.stages.entry_of("segment")
        yield bench, caller
        bench.stages.release()
        await in_time(caller)


class Body:
    """A form that is sent piece by piece."""

    headers: ClassVar = {"Content-Type": "multipart/form-data; boundary=x"}

    def __init__(self) -> None:
        self.pieces_read = 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in (b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\ncat\r\n', b"--x--\r\n"):
            self.pieces_read += 1
            yield piece


async def test_direct_requests_are_refused_under_overload(tmp_path: Path, tokenizer: PromptTokenizer) -> None:
    """A full worker refuses a direct request before its body is read, and counts it."""
    async with full_bench(tmp_path, tokenizer) as (bench, caller), client_of(bench) as http:
        before, body = DIRECT_REQUESTS.labels("OVERLOADED")._value.get(), Body()
        response = await in_time(http.post(PATH, content=body, headers=body.headers))
        assert error_of(response)[:2] == (429, "OVERLOADED")
        assert int(response.headers["Retry-After"]) >= 1
        assert body.pieces_read == 0
        assert DIRECT_REQUESTS.labels("OVERLOADED")._value.get() == before + 1
        assert bench.stages.entered["decode"] == 1
        bench.stages.release("segment")
        await in_time(caller)
        assert (await post(http, prompt="cat")).status_code == 200


async def test_direct_request_is_refused_for_its_tiles(bench: Bench, http: httpx.AsyncClient) -> None:
    """Where only a request without tiles could be done in time, one with tiles is refused, once read."""
    bench.stages.hold("segment")
    holder = bench.call()
    await bench.stages.entry_of("segment")
    bench.pipeline.admission.gate.expected_s = lambda place: 100.0 * (place.cost > 1)  # type: ignore[method-assign]
    assert error_of(await post(http, prompt="cat", tiles="3"))[:2] == (429, "OVERLOADED")
    bench.stages.release("segment")
    assert (await post(http, prompt="cat")).status_code == 200
    await in_time(holder)


async def test_order_of_errors_under_overload(tmp_path: Path, tokenizer: PromptTokenizer) -> None:
    """An overloaded worker still names a wrong key, length, encoding or deadline, or a missing model."""
    async with full_bench(tmp_path, tokenizer) as (bench, _), client_of(bench) as http:

        async def code_of(**headers: str) -> tuple[int, str]:
            body, named = Body(), {name.replace("_", "-"): value for name, value in headers.items()}
            return error_of(await http.post(PATH, content=body, headers=body.headers | named))[:2]

        assert await code_of(X_Deadline_Ms="60000") == (429, "OVERLOADED")
        assert await code_of(X_API_Key="wrong") == (401, "AUTH_INVALID")
        assert await code_of(Content_Length="100001") == (413, "FILE_TOO_LARGE")
        assert await code_of(Content_Encoding="gzip") == (415, "UNSUPPORTED_MEDIA_TYPE")
        assert await code_of(X_Deadline_Ms="0") == (400, "INVALID_REQUEST")
        bench.model.state = "error"
        assert error_of(await post(http, prompt="cat"))[:2] == (503, "MODEL_NOT_LOADED")
        bench.model.state = "ok"


async def test_direct_request_counts_as_one_in_progress(tmp_path: Path, tokenizer: PromptTokenizer) -> None:
    """While a direct request is in progress, a full worker refuses a task."""
    async with opened_bench(tmp_path, tokenizer, max_in_flight=1) as bench, client_of(bench) as http:
        bench.stages.hold("segment")
        direct = asyncio.create_task(post(http, prompt="cat"))
        await bench.stages.entry_of("segment")
        assert (await bench.failure()).code == "OVERLOADED"
        bench.stages.release("segment")
        assert (await in_time(direct)).status_code == 200
        await bench.send()
