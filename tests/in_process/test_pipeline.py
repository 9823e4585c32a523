"""The stages of a task when callers disconnect, deadlines pass, calls fail or end in another order."""

from __future__ import annotations

import asyncio
import gc
import time
from dataclasses import dataclass
from math import inf, nan
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

from admission import slots_per_worker
from contract import BatchRequest, Failure
from results import Claim, Task
from sam3_runner import DeadlineExceeded, InferenceFailed, UnsupportedImage
from sam3_runner.images.image_file import ImageFile
from storage import ObjectNotFound, StorageUnavailable
from tests.in_process.bench import (
    HEAVY_IMAGE,
    LEASE_S,
    PROMPT,
    REQUEST_ID,
    SMALL_IMAGE,
    STAGES,
    USER,
    failure_of,
    in_time,
    opened_bench,
    wait_until,
)

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable
    from pathlib import Path

    from admission import Outcome, Place
    from contract import PredictRequest
    from sam3_runner.prompts import PromptTokenizer
    from tests.in_process.bench import Bench

pytestmark = pytest.mark.anyio

SLOTS = slots_per_worker(max_batch=8, api_workers=2)
"""Of a worker with the default settings."""
BUG = "this message is for the log"
WENT_WRONG = "something went wrong on our side"
IN_TIME = tuple(stage for stage in STAGES if stage not in {"claim", "settle"})
"""Stages that the deadline covers; the lease has another minute for the writes of the row."""


def tracebacks(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.exc_info]


def check_logged_once(caplog: pytest.LogCaptureFixture, request: PredictRequest) -> None:
    """The log has one traceback, with the request id and the task id."""
    [record] = tracebacks(caplog)
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ZeroDivisionError)
    assert REQUEST_ID in record.getMessage()
    assert str(request.task_id) in record.getMessage()


async def test_task_is_done_and_answered_again(bench: Bench) -> None:
    """A done task is answered from its row; nothing is decoded or segmented."""
    answer = await bench.send()
    assert answer.results[0].labels == [PROMPT]
    row = await bench.row()
    assert (row.status, row.labels, row.metadata["prompts"]) == ("done", [PROMPT], [PROMPT])
    assert await bench.send(bench.sent[0]) == answer
    assert await bench.row() == row
    assert bench.stages.finished["decode"] == bench.stages.finished["segment"] == 1
    assert len(bench.masks()) == 1
    assert bench.count() == 0


async def test_batch_is_answered_again(bench: Bench) -> None:
    """A batch is answered from its row too; its union mask is stored beside the others."""
    request = BatchRequest(
        image_url=bench.image, prompts=["red circle", "blue star"], user_id=USER, task_id=uuid4()
    )
    answer = await bench.send(request)
    assert [result.labels for result in answer.results] == [["red circle"], ["blue star"]]
    assert await bench.send(request) == answer
    assert bench.stages.finished["segment"] == 1
    assert len(bench.masks()) == 3


# The caller disconnects.


@pytest.mark.parametrize("stage", STAGES)
async def test_task_is_done_after_its_caller_disconnects(bench: Bench, stage: str) -> None:
    """A task whose caller disconnects in any stage ends as done, and its answer can be requested again."""
    bench.stages.hold(stage)
    caller = bench.call()
    await bench.stages.entry_of(stage)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    bench.stages.release(stage)
    row = await bench.ended_row()
    assert (row.status, row.labels) == ("done", [PROMPT])
    assert (await bench.send(bench.sent[0])).results[0].mask_url == row.mask_url
    assert bench.stages.finished["segment"] == 1


@pytest.mark.parametrize("stage", STAGES)
async def test_task_fails_after_its_caller_disconnects(
    bench: Bench, stage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An unknown exception after the caller has disconnected ends the row and is logged."""
    bench.stages.fail(stage, ZeroDivisionError(BUG), after=stage == "claim")
    bench.stages.hold(stage)
    request = bench.request()
    caller = bench.call(request)
    await bench.stages.entry_of(stage)
    caller.cancel()
    bench.stages.release(stage)
    row = await bench.ended_row(request)
    assert (row.status, row.metadata) == ("error", {"error_message": WENT_WRONG})
    check_logged_once(caplog, request)


async def test_caller_disconnects_before_the_task_starts(bench: Bench) -> None:
    """A caller that disconnects during the check of the model leaves no row and no attempt."""
    bench.stages.hold("check")
    caller = bench.call()
    await bench.stages.entry_of("check")
    caller.cancel()
    bench.stages.release("check")
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert await bench.find_row() is None
    assert bench.count() == 0
    assert not bench.stages.entered["claim"]


async def test_second_call_for_a_running_task_is_refused(bench: Bench) -> None:
    """A second call for a running task gives 409 and does not affect the first."""
    bench.stages.hold("segment")
    request = bench.request()
    first = bench.call(request)
    await bench.stages.entry_of("segment")
    failure = await bench.failure(request)
    assert (failure.code, failure.status) == ("TASK_IN_PROGRESS", 409)
    assert failure.headers["Retry-After"]
    bench.stages.release("segment")
    assert (await in_time(first)).results[0].labels == [PROMPT]
    assert bench.stages.entered["claim"] == 1


# The deadline.


@pytest.mark.parametrize("stage", IN_TIME)
async def test_deadline_ends_the_task(bench: Bench, stage: str) -> None:
    """A task over REQUEST_TIMEOUT_S in one of these stages gives 504, and its row ends as error."""
    bench.stages.hold(stage)
    caller = bench.call()
    await bench.stages.entry_of(stage)
    await bench.stages.end_of("claim")
    await bench.clock.advance(bench.settings.request_timeout_s + 1)
    failure = await failure_of(caller)
    assert (failure.code, failure.status) == ("DEADLINE_EXCEEDED", 504)
    row = await bench.row()
    assert (row.status, row.metadata) == ("error", {"error_message": "the request took too long"})
    assert bench.count() == 0
    if stage != "encode":  # a thread cannot be cancelled
        assert bench.stages.cancelled[stage] == 1


def image_files() -> int:
    """Files of images in memory."""
    # Not isinstance: some modules hold objects that warn when they are looked at.
    return sum(type(each) is ImageFile for each in gc.get_objects())


@pytest.mark.parametrize(("stage", "late"), [("decode", True), ("segment", True), ("decode", False)])
async def test_failed_task_keeps_no_file(bench: Bench, stage: str, *, late: bool) -> None:
    """The image's file, up to `MAX_IMAGE_BYTES`, is freed at once: the collector may run much later."""
    gc.collect()
    before = image_files()
    gc.disable()
    try:
        if late:
            bench.stages.hold(stage)
            caller = bench.call()
            await bench.stages.entry_of(stage)
            await bench.clock.advance(bench.settings.request_timeout_s + 1)
            failure = await failure_of(caller)
        else:
            bench.stages.fail(stage, InferenceFailed("the model failed on this image"))
            failure = await bench.failure()
        assert failure.code == ("DEADLINE_EXCEEDED" if late else "INFERENCE_FAILED")
        assert image_files() == before
    finally:
        gc.enable()


@pytest.mark.parametrize("stage", ["claim", "settle"])
async def test_deadline_does_not_cancel_writes_of_the_row(bench: Bench, stage: str) -> None:
    """A slow claim or final write is not cancelled: it must be known whether it took effect."""
    bench.stages.hold(stage)
    caller = bench.call()
    await bench.stages.entry_of(stage)
    await bench.clock.advance(bench.settings.request_timeout_s + 1)
    assert not caller.done()
    bench.stages.release(stage)
    assert (await in_time(caller)).results[0].labels == [PROMPT]
    assert (await bench.row()).status == "done"


async def test_deadline_starts_after_the_claim(bench: Bench) -> None:
    """The deadline starts when the row is claimed."""
    bench.stages.hold("claim", "fetch")
    caller = bench.call()
    await bench.stages.entry_of("claim")
    await bench.stages.entry_of("fetch")
    await bench.clock.advance(bench.settings.request_timeout_s + 1)
    bench.stages.release("claim")
    await bench.stages.end_of("claim")
    await bench.clock.advance(bench.settings.request_timeout_s / 2)
    bench.stages.release("fetch")
    assert (await in_time(caller)).results[0].labels == [PROMPT]


# Errors that the table knows.


@dataclass(frozen=True)
class Case:
    """A fault, and the code and status of the answer."""

    prepare: Callable[[Bench], object]
    code: str
    status: int


KNOWN: dict[str, Case] = {
    "no such image": Case(
        lambda bench: setattr(bench, "image", "uploads/user-1/none"), "IMAGE_NOT_FOUND", 404
    ),
    "another user's image": Case(
        lambda bench: setattr(bench, "image", "uploads/user-2/image"), "FORBIDDEN", 403
    ),
    "a broken image_url": Case(
        lambda bench: setattr(bench, "image", "uploads/user-1/../image"), "INVALID_REQUEST", 400
    ),
    "no image": Case(lambda bench: bench.upload(b"text"), "UNSUPPORTED_IMAGE", 415),
    "a large image": Case(lambda bench: bench.upload(bytes(1001)), "FILE_TOO_LARGE", 413),
    "damaged pixels": Case(
        lambda bench: bench.stages.fail("decode", UnsupportedImage("damaged")), "UNSUPPORTED_IMAGE", 415
    ),
    "a model that fails": Case(
        lambda bench: bench.stages.fail("segment", InferenceFailed("the model failed on this image")),
        *("INFERENCE_FAILED", 500),
    ),
    "a model that is late": Case(
        lambda bench: bench.stages.fail("segment", DeadlineExceeded("the deadline has passed")),
        *("DEADLINE_EXCEEDED", 504),
    ),
}


@pytest.mark.parametrize("case", KNOWN)
async def test_known_error_ends_the_row(
    tmp_path: Path, tokenizer: PromptTokenizer, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A known error ends the row with the caller's message, and logs no traceback."""
    async with opened_bench(tmp_path, tokenizer, max_image_bytes=1000) as bench:
        KNOWN[case].prepare(bench)
        failure = await bench.failure()
        assert (failure.code, failure.status) == (KNOWN[case].code, KNOWN[case].status)
        row = await bench.row()
        assert (row.status, row.metadata) == ("error", {"error_message": failure.message})
        assert bench.count() == 0
        assert tracebacks(caplog) == []


async def test_row_deleted_during_the_work(bench: Bench) -> None:
    """A row that is deleted during the work gives 404, is not recreated, and its mask becomes unneeded."""
    bench.stages.hold("settle")
    caller = bench.call()
    await bench.stages.entry_of("settle")
    bench.execute("DELETE FROM segmentation_results")
    bench.stages.release("settle")
    failure = await failure_of(caller)
    assert (failure.code, failure.status) == ("TASK_NOT_FOUND", 404)
    assert await bench.find_row() is None
    assert bench.count() == 0
    assert bench.count("unneeded_masks") == len(bench.masks()) == 1


async def test_row_claimed_by_another_server_during_the_work(bench: Bench) -> None:
    """An attempt whose row another server has claimed after the lease does not change it."""
    bench.stages.hold("settle")
    request = bench.request()
    caller = bench.call(request)
    await bench.stages.entry_of("settle")
    await bench.clock.advance(LEASE_S + 1)
    assert isinstance(await bench.rows.claim(task_of(request), str(uuid4())), Claim)
    row = await bench.row()
    bench.stages.release("settle")
    failure = await failure_of(caller)
    assert (failure.code, failure.status) == ("TASK_IN_PROGRESS", 409)
    assert await bench.row() == row
    assert bench.count() == 0
    assert bench.count("unneeded_masks") == len(bench.masks()) == 1


# Errors that no table knows.


@pytest.mark.parametrize("stage", STAGES)
async def test_unknown_exception_ends_the_row(
    bench: Bench, stage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An unknown exception gives 500 without its message; the row ends, and it is logged once."""
    bench.stages.fail(stage, ZeroDivisionError(BUG), after=stage == "claim")
    request = bench.request()
    failure = await bench.failure(request)
    assert (failure.code, failure.status, failure.message) == ("INTERNAL_ERROR", 500, WENT_WRONG)
    row = await bench.row()
    assert (row.status, row.metadata, row.mask_url) == ("error", {"error_message": WENT_WRONG}, None)
    check_logged_once(caplog, request)
    assert bench.count() == 0
    assert bench.count("unneeded_masks") >= len(bench.masks())


async def test_unknown_exception_during_the_check(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """An unknown exception before the claim gives 500 and leaves no row."""
    bench.stages.fail("check", ZeroDivisionError(BUG))
    request = bench.request()
    failure = await bench.failure(request)
    assert (failure.code, failure.status, failure.message) == ("INTERNAL_ERROR", 500, WENT_WRONG)
    check_logged_once(caplog, request)
    assert await bench.find_row() is None
    assert bench.count() == 0


async def test_unknown_exception_before_the_claims_effect(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """A claim that raises without an effect leaves the row pending, and no attempt."""
    request = bench.request()
    await bench.rows.insert_pending(task_of(request))
    bench.stages.fail("claim", ZeroDivisionError(BUG))
    assert (await bench.failure(request)).code == "INTERNAL_ERROR"
    check_logged_once(caplog, request)
    assert (await bench.row()).status == "pending"
    assert bench.count() == 0


async def test_exception_after_the_final_write_keeps_the_result(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """An exception after the final write does not undo the result: a retry returns it."""
    bench.stages.fail("settle", ZeroDivisionError(BUG), after=True)
    request = bench.request()
    assert (await bench.failure(request)).code == "INTERNAL_ERROR"
    check_logged_once(caplog, request)
    row = await bench.row()
    assert row.status == "done"
    bench.stages.mend("settle")
    assert (await bench.send(request)).results[0].mask_url == row.mask_url
    assert bench.count("unneeded_masks") == 0


@pytest.mark.parametrize("number", [nan, inf])
async def test_result_that_is_not_json_ends_the_row(
    bench: Bench, number: float, caplog: pytest.LogCaptureFixture
) -> None:
    """A result with an infinite number ends the row with an error that says so."""
    bench.model.box = (0.0, number, 8.0, 8.0)
    failure = await bench.failure()
    assert (failure.code, failure.status) == ("INTERNAL_ERROR", 500)
    assert "JSON" in failure.message
    row = await bench.row()
    assert (row.status, row.metadata) == ("error", {"error_message": failure.message})
    assert bench.count() == 0
    assert bench.count("unneeded_masks") == 1
    [record] = tracebacks(caplog)
    assert REQUEST_ID in record.getMessage()


# The claim and the fetch run side by side.


def task_of(request: PredictRequest) -> Task:
    return Task(str(request.task_id), request.user_id, request.image_url, request.labels_of_prompts)


async def held_by_another(bench: Bench) -> PredictRequest:
    """A request for a task that another server has claimed."""
    request = bench.request()
    assert isinstance(await bench.rows.claim(task_of(request), str(uuid4())), Claim)
    bench.stages.entered.clear()
    return request


async def test_fetch_first(bench: Bench) -> None:
    """An image that is fetched first is not decoded before its row is claimed."""
    bench.stages.hold("claim")
    caller = bench.call()
    await bench.stages.end_of("fetch")
    assert await bench.stages.stays_at("decode", 0)
    assert bench.count(where="begun > 0") == 0
    bench.stages.release("claim")
    assert (await in_time(caller)).results[0].labels == [PROMPT]


async def test_claim_first(bench: Bench) -> None:
    """The row is processing while its image is still being fetched."""
    bench.stages.hold("fetch")
    caller = bench.call()
    await bench.stages.end_of("claim")
    assert (await bench.row()).status == "processing"
    bench.stages.release("fetch")
    assert (await in_time(caller)).results[0].labels == [PROMPT]


async def test_refused_claim_cancels_the_fetch(bench: Bench) -> None:
    """A refused claim cancels the fetch and does not change the other attempt's row."""
    request = await held_by_another(bench)
    before = await bench.row(request)
    bench.stages.hold("fetch")
    failure = await bench.failure(request)
    assert (failure.code, failure.status) == ("TASK_IN_PROGRESS", 409)
    assert int(failure.headers["Retry-After"]) > 1
    await wait_until(lambda: bench.stages.cancelled["fetch"] == bench.stages.entered["fetch"])
    assert await bench.row() == before
    assert bench.count() == 0


async def test_replay_does_not_wait_for_the_fetch(bench: Bench) -> None:
    """A done task is answered without waiting for the image."""
    answer = await bench.send()
    bench.stages.entered.clear()
    bench.stages.hold("fetch")
    assert await bench.send(bench.sent[0]) == answer
    await wait_until(lambda: bench.stages.cancelled["fetch"] == bench.stages.entered["fetch"])


async def test_fetch_fails_first(bench: Bench) -> None:
    """A failed fetch is reported after the claim, and the row ends with the same message."""
    bench.stages.hold("claim")
    bench.image = f"uploads/{USER}/none"
    caller = bench.call()
    await bench.stages.entry_of("fetch")
    await bench.clock.advance(1)
    assert not caller.done()
    bench.stages.release("claim")
    failure = await failure_of(caller)
    assert (failure.code, failure.status) == ("IMAGE_NOT_FOUND", 404)
    row = await bench.row()
    assert (row.status, row.metadata) == ("error", {"error_message": failure.message})


@pytest.mark.parametrize("first", ["claim", "fetch"])
async def test_claim_and_fetch_both_fail(bench: Bench, first: str) -> None:
    """If both fail, in either order, the caller gets the claim's error, and the row does not change."""
    request = await held_by_another(bench)
    before = await bench.row(request)
    bench.stages.fail("fetch", UnsupportedImage("the image is damaged"))
    second = "fetch" if first == "claim" else "claim"
    bench.stages.hold(second)
    caller = bench.call(request)
    await bench.stages.entry_of("fetch")
    await bench.stages.entry_of("claim")
    await bench.clock.advance(1)
    bench.stages.release(second)
    failure = await failure_of(caller)
    assert failure.code == "TASK_IN_PROGRESS"
    assert await bench.row() == before
    assert bench.count() == 0


async def test_exception_in_the_claim_cancels_the_fetch(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """A claim that raises after its effect ends the row without waiting for the image."""
    bench.stages.fail("claim", ZeroDivisionError(BUG), after=True)
    bench.stages.hold("fetch")
    request = bench.request()
    assert (await bench.failure(request)).code == "INTERNAL_ERROR"
    await wait_until(lambda: bench.stages.cancelled["fetch"] == bench.stages.entered["fetch"])
    assert (await bench.row()).status == "error"
    check_logged_once(caplog, request)


# Replay.

SPOILED = {
    "no result": "metadata = json_set(metadata, '$.results', json('[]'))",
    "one result too many": """metadata = json_set(metadata, '$.results',
        json_array(json_extract(metadata, '$.results[0]'), json_extract(metadata, '$.results[0]')))""",
    "a foreign mask": "metadata = json_set(metadata, '$.results[0].mask_url', 'https://evil.example/x.png')",
    "a foreign mask in the column": "mask_image_url = 'https://evil.example/x.png'",
    "another task's id": "metadata = json_set(metadata, '$.results[0].task_id', 'x')",
    "another label": """metadata = json_set(metadata, '$.results[0].labels', json('["cat"]'))""",
    "no box": "metadata = json_remove(metadata, '$.results[0].instances[0].box')",
    "no list": "metadata = json_set(metadata, '$.results', 'x')",
}


@pytest.mark.parametrize("change", SPOILED)
async def test_forged_result_is_not_answered(bench: Bench, change: str) -> None:
    """A stored answer that is incomplete or names foreign masks gives 400."""
    await bench.send()
    bench.execute(f"UPDATE segmentation_results SET {SPOILED[change]}")  # noqa: S608 - ours
    failure = await bench.failure(bench.sent[0])
    assert (failure.code, failure.status) == ("INVALID_REQUEST", 400)
    assert "no longer holds the result" in failure.message
    assert bench.stages.entered["segment"] == 1
    assert bench.count() == 0


async def test_done_task_is_not_answered_for_other_prompts(bench: Bench) -> None:
    """A done task with another prompt gives 400, and the row does not change."""
    await bench.send()
    row = await bench.row()
    failure = await bench.failure(bench.sent[0].model_copy(update={"text_prompt": "blue star"}))
    assert (failure.code, failure.status) == ("INVALID_REQUEST", 400)
    assert "other prompts" in failure.message
    assert await bench.row() == row
    assert bench.stages.entered["segment"] == 1


# Before the claim.


@pytest.mark.parametrize("state", ["loading", "error"])
async def test_model_is_not_ready(bench: Bench, state: str) -> None:
    """A model that is not ready gives 503 before the claim, and no row is made."""
    bench.model.state = state
    failure = await bench.failure()
    assert (failure.code, failure.status) == ("MODEL_NOT_LOADED", 503)
    assert failure.headers["Retry-After"]
    assert await bench.find_row() is None
    assert not bench.stages.entered["claim"]


async def test_prompt_with_too_many_tokens(bench: Bench) -> None:
    """A prompt with too many tokens gives 400 before the claim."""
    failure = await bench.failure(bench.request("zq " * 60))
    assert (failure.code, failure.status) == ("INVALID_REQUEST", 400)
    assert "text_prompt: has 122 tokens; the model reads 32" in failure.message
    assert await bench.find_row() is None


async def test_burst_over_max_in_flight(tmp_path: Path, tokenizer: PromptTokenizer) -> None:
    """Of 20 concurrent calls MAX_IN_FLIGHT are accepted; the others get 429 before the claim."""
    async with opened_bench(tmp_path, tokenizer, max_in_flight=3) as bench:
        bench.stages.hold("segment")
        callers = [bench.call() for _ in range(20)]
        await bench.stages.entry_of("segment", calls=3)
        refused = [each for each in callers if each.done()]
        assert len(refused) == 17
        failures = [each.exception() for each in refused]
        for failure in failures:
            assert isinstance(failure, Failure)
            assert (failure.code, failure.status) == ("OVERLOADED", 429)
            assert failure.headers["Retry-After"]
        assert bench.stages.entered["claim"] == bench.count() == 3
        bench.stages.release("segment")
        await in_time(asyncio.gather(*(each for each in callers if each not in refused)))
        # Another task is accepted again.
        assert (await bench.send()).results[0].labels == [PROMPT]


# Heavy images.


async def test_heavy_images_do_not_delay_others(bench: Bench) -> None:
    """Heavy images are decoded one at a time, and do not delay an ordinary one."""
    ordinary = bench.image
    bench.stages.hold("decode")
    bench.image = bench.upload(HEAVY_IMAGE, "heavy")
    heavy = [bench.call() for _ in range(2 * SLOTS)]
    await bench.stages.entry_of("fetch", calls=len(heavy))
    await bench.stages.entry_of("decode")
    bench.image = ordinary
    light = bench.call()
    # The first heavy one, and the ordinary one.
    await bench.stages.entry_of("decode", calls=2)
    bench.stages.release("decode")
    await in_time(light)
    await in_time(asyncio.gather(*heavy))
    assert bench.stages.at_once["decode"] == 2
    # The waiting ones released their slots, and fetched again.
    assert bench.stages.entered["fetch"] == 2 * len(heavy)


async def test_files_in_memory_are_bounded(bench: Bench) -> None:
    """A worker holds at most as many files as it has slots."""
    bench.stages.hold("decode")
    callers = [bench.call() for _ in range(3 * SLOTS)]
    await bench.stages.entry_of("decode", calls=SLOTS)
    assert await bench.stages.stays_at("fetch", SLOTS)
    bench.stages.release("decode")
    await in_time(asyncio.gather(*callers))


# Overload.

TWO_SLOTS: dict[str, Any] = {"sam3_max_batch": 2, "api_workers": 4}
OTHER = "user-2"


def of_other(bench: Bench) -> PredictRequest:
    """A request of another user."""
    key = f"uploads/{OTHER}/image"
    bench.objects.put_upload(key, SMALL_IMAGE)
    return bench.request(user_id=OTHER, image_url=key)


async def test_slot_spans_the_model(tmp_path: Path, tokenizer: PromptTokenizer) -> None:
    """No image is fetched while as many requests as there are slots wait for the model."""
    async with opened_bench(tmp_path, tokenizer, **TWO_SLOTS) as bench:
        bench.stages.hold("segment")
        callers = [bench.call() for _ in range(4)]
        await bench.stages.entry_of("segment", calls=2)
        assert await bench.stages.stays_at("fetch", 2)
        bench.stages.hold("upload")
        bench.stages.release("segment")
        # The next ones do not wait for masks to be stored.
        await bench.stages.entry_of("segment", calls=4)
        bench.stages.release("upload")
        await in_time(asyncio.gather(*callers))


async def test_users_take_turns(tmp_path: Path, tokenizer: PromptTokenizer) -> None:
    """A user's first request does not wait for another user's queue."""
    async with opened_bench(tmp_path, tokenizer, **TWO_SLOTS) as bench:
        bench.stages.hold("segment")
        callers = [bench.call() for _ in range(20)]
        await bench.stages.entry_of("segment", calls=2)
        other = of_other(bench)
        callers.append(bench.call(other))
        await bench.stages.end_of("claim", calls=21)
        bench.stages.release("segment")
        await in_time(asyncio.gather(*callers))
        # Two held the slots, two got those, and at most one more came before.
        assert bench.model.tasks.index(str(other.task_id)) <= 4


async def test_earlier_deadline_comes_first(tmp_path: Path, tokenizer: PromptTokenizer) -> None:
    """Of one user's requests the one with the earliest deadline gets the next slot."""
    async with opened_bench(tmp_path, tokenizer, **TWO_SLOTS) as bench:
        bench.stages.hold("segment")
        callers = [bench.call() for _ in range(20)]
        await bench.stages.entry_of("segment", calls=2)
        urgent = bench.request()
        callers.append(bench.call(urgent, deadline_ms=20_000))
        await bench.stages.end_of("claim", calls=21)
        bench.stages.release("segment")
        await in_time(asyncio.gather(*callers))
        # It arrived last; on a busy machine its image may come later than those of the next slots.
        assert bench.model.tasks.index(str(urgent.task_id)) < 10


@pytest.mark.parametrize(("deadline_ms", "wait_s"), [(None, 25.0), (5_000, 5.0)])
async def test_deadline_passes_while_a_task_waits(
    tmp_path: Path, tokenizer: PromptTokenizer, deadline_ms: int | None, wait_s: float
) -> None:
    """A task whose turn does not come in time ends; it fetches nothing, and takes no slot from others."""
    async with opened_bench(tmp_path, tokenizer, **TWO_SLOTS) as bench:
        bench.stages.hold("segment")
        callers = [bench.call() for _ in range(2)]
        await bench.stages.entry_of("segment", calls=2)
        late = bench.request()
        caller = bench.call(late, deadline_ms=deadline_ms)
        await bench.stages.end_of("claim", calls=3)
        await bench.clock.advance(wait_s - 1)
        assert not caller.done()
        await bench.clock.advance(1)
        failure = await failure_of(caller)
        assert (failure.code, failure.status) == ("DEADLINE_EXCEEDED", 504)
        row = await bench.row(late)
        assert (row.status, row.metadata) == ("error", {"error_message": failure.message})
        assert "waited for its turn" in failure.message
        assert bench.stages.entered["fetch"] == 2
        bench.stages.release("segment")
        await in_time(asyncio.gather(*callers))
        assert (await bench.send(late)).results[0].labels == [PROMPT]


async def test_model_gets_the_deadline(bench: Bench) -> None:
    """The model does not begin a request after its deadline, nor after REQUEST_TIMEOUT_S."""
    before_s = time.monotonic()
    for deadline_ms in (7_000, 600_000):
        await in_time(bench.call(deadline_ms=deadline_ms))
    for deadline_s, longest_s in zip(bench.model.deadlines_s, (7, 60), strict=True):
        assert before_s + longest_s <= deadline_s < before_s + longest_s + 5


async def test_slow_claim_is_not_counted(bench: Bench) -> None:
    """The time of a slow database is added to the deadline."""
    bench.stages.hold("claim")
    before_s = time.monotonic()
    caller = bench.call(deadline_ms=7_000)
    await bench.stages.end_of("fetch")
    fetched_s = time.monotonic()
    assert await bench.stages.stays_at("decode", 0)
    slow_s = time.monotonic() - fetched_s
    bench.stages.release("claim")
    await in_time(caller)
    [deadline_s] = bench.model.deadlines_s
    assert deadline_s >= before_s + 7 + slow_s


async def test_request_that_cannot_be_in_time(
    tmp_path: Path, tokenizer: PromptTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request whose deadline the queue makes impossible gets 429 before the claim; others are accepted."""
    monkeypatch.setattr("admission.MIN_MEASURED_S", 0.0)
    async with opened_bench(tmp_path, tokenizer, **TWO_SLOTS) as bench:
        await in_time(asyncio.gather(*(bench.call() for _ in range(6))))
        bench.stages.hold("segment")
        bench.stages.entered.clear()
        callers = [bench.call() for _ in range(6)]
        await bench.stages.entry_of("segment", calls=2)
        await bench.stages.end_of("claim", calls=12)
        hurried = bench.request()
        failure = await failure_of(bench.call(hurried, deadline_ms=1))
        assert (failure.code, failure.status) == ("OVERLOADED", 429)
        assert "too long for this request's deadline" in failure.message
        assert int(failure.headers["Retry-After"]) >= 1
        assert await bench.find_row(hurried) is None
        assert bench.stages.entered["claim"] == 6
        callers.append(bench.call(hurried, deadline_ms=60_000))
        bench.stages.release("segment")
        await in_time(asyncio.gather(*callers))


@pytest.mark.parametrize(
    ("stage", "error", "status"),
    [
        ("fetch", ObjectNotFound("nothing is stored there"), 504),
        ("decode", UnsupportedImage("damaged"), 504),
        ("segment", InferenceFailed("the model failed"), 429),
    ],
)
async def test_failures_before_the_model_are_not_measured(
    *,
    tmp_path: Path,
    tokenizer: PromptTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    error: Exception,
    status: int,
) -> None:
    """Until a request has reached the model nothing is known of its rate, and none is refused by it."""
    monkeypatch.setattr("admission.MIN_MEASURED_S", 0.0)
    async with opened_bench(tmp_path, tokenizer, **TWO_SLOTS) as bench:
        bench.stages.fail(stage, error)
        failed = await in_time(asyncio.gather(*(bench.call() for _ in range(6)), return_exceptions=True))
        assert all(isinstance(each, Failure) for each in failed)
        bench.stages.mend(stage)
        assert await status_of_hurried_request(bench) == status


@pytest.mark.parametrize(
    ("stage", "error", "outcome"),
    [
        ("decode", UnsupportedImage("damaged"), "failed"),
        ("segment", DeadlineExceeded("the deadline passed"), "late"),
        ("segment", InferenceFailed("the model failed"), "done"),
        ("upload", StorageUnavailable("the store does not answer"), "done"),
    ],
)
async def test_outcome_of_a_slot(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, stage: str, error: Exception, outcome: str
) -> None:
    """The rate learns whether the model has worked, had no time to, or was not reached."""
    outcomes, gate = [], bench.pipeline.admission.gate
    leave = gate.exit

    def spy(place: Place, *, held_slot: bool, outcome: Outcome) -> None:
        outcomes.append(outcome)
        leave(place, held_slot=held_slot, outcome=outcome)

    monkeypatch.setattr(gate, "exit", spy)
    bench.stages.fail(stage, error)
    await bench.failure()
    assert outcomes == [outcome]


async def test_replays_are_not_measured(
    tmp_path: Path, tokenizer: PromptTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests for tasks that are done already say nothing of the model's rate."""
    monkeypatch.setattr("admission.MIN_MEASURED_S", 0.0)
    async with opened_bench(tmp_path, tokenizer, **TWO_SLOTS) as bench:
        requests = [bench.request() for _ in range(6)]
        for request in requests:
            await bench.send(request)
        await in_time(asyncio.gather(*map(bench.call, requests)))
        assert await status_of_hurried_request(bench) == 504


async def status_of_hurried_request(bench: Bench) -> int:
    """The status of a request with a deadline of 1 ms, while all slots are in use."""
    bench.stages.hold("segment")
    bench.stages.entered.clear()
    callers = [bench.call() for _ in range(2)]
    await bench.stages.entry_of("segment", calls=2)
    failure = await failure_of(bench.call(deadline_ms=1))
    bench.stages.release("segment")
    await in_time(asyncio.gather(*callers))
    return failure.status


async def test_thousand_requests_for_one_task(bench: Bench) -> None:
    """A thousand requests for one task cost one claim, one fetch and one decoding."""
    bench.stages.hold("segment")
    request = bench.request()
    callers = [bench.call(request) for _ in range(1000)]
    await bench.stages.entry_of("segment")
    await wait_until(lambda: sum(caller.done() for caller in callers) == 999)
    bench.stages.release("segment")
    answers = await in_time(asyncio.gather(*callers, return_exceptions=True))
    codes = {each.code for each in answers if isinstance(each, Failure)}
    assert "TASK_IN_PROGRESS" in codes
    assert codes <= {"TASK_IN_PROGRESS", "OVERLOADED"}
    assert sum(not isinstance(each, BaseException) for each in answers) == 1
    for stage in ("claim", "fetch", "decode", "segment"):
        assert bench.stages.entered[stage] == 1


async def test_heavy_image_takes_no_slot(tmp_path: Path, tokenizer: PromptTokenizer) -> None:
    """A heavy image that the model works on, and those that wait for it, hold none of the slots."""
    async with opened_bench(tmp_path, tokenizer, **TWO_SLOTS) as bench:
        bench.stages.hold("segment")
        ordinary, bench.image = bench.image, bench.upload(HEAVY_IMAGE, "heavy")
        callers = [bench.call() for _ in range(5)]
        await bench.stages.entry_of("segment")
        bench.image = ordinary
        callers += [bench.call() for _ in range(3)]
        await bench.stages.entry_of("segment", calls=3)
        assert await bench.stages.stays_at("decode", 3)
        bench.stages.release("segment")
        await in_time(asyncio.gather(*callers))
        assert bench.stages.at_once["segment"] == 3
