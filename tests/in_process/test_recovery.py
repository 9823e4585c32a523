"""Tasks that are kept while the model or a store is away, and how Recovery finishes them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from results import ResultsUnavailable
from sam3_runner import ModelNotLoaded, RunnerStopped, UnsupportedImage
from storage import StorageUnavailable
from tests.drawn import scene
from tests.edge import png_bytes
from tests.in_process.bench import PROMPT, REQUEST_ID, failure_of, in_time, opened_bench, wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from contract import BatchResponse, PredictRequest
    from sam3_runner.prompts import PromptTokenizer
    from tests.in_process.bench import Bench

pytestmark = pytest.mark.anyio

STOPPED = RunnerStopped("the model's process stopped")
LOADING = ModelNotLoaded("the model is loading")
IMAGES_AWAY = StorageUnavailable("the object store does not answer")
ROWS_AWAY = ResultsUnavailable("the results database does not answer")

KEPT: dict[str, tuple[str, Exception, str, int]] = {
    "the model's process dies": ("segment", STOPPED, "MODEL_NOT_LOADED", 503),
    "the model is loading": ("segment", LOADING, "MODEL_NOT_LOADED", 503),
    "images cannot be read": ("fetch", IMAGES_AWAY, "STORAGE_UNAVAILABLE", 502),
    "masks cannot be stored": ("upload", IMAGES_AWAY, "STORAGE_UNAVAILABLE", 502),
}
"""The stage that fails, its error, and the answer's code and status."""


@pytest.mark.parametrize("case", KEPT)
async def test_task_is_kept_and_done_later(bench: Bench, case: str) -> None:
    """The answer says that the task is kept; the row stays processing, and the same attempt is done later."""
    stage, error, code, status = KEPT[case]
    bench.stages.fail(stage, error)
    failure = await bench.failure()
    assert (failure.code, failure.status) == (code, status)
    assert "the task is kept" in failure.message
    if status == 503:
        assert failure.headers["Retry-After"]
    before = await bench.row()
    assert before.status == "processing"
    assert bench.count() == bench.count(where="owner IS NULL") == 1
    bench.stages.mend(stage)
    row = await bench.recover()
    assert (row.status, row.attempt_id) == ("done", before.attempt_id)


async def test_kept_task_is_retried_by_its_caller(bench: Bench) -> None:
    """A retry of a kept task is done immediately, by the same attempt."""
    bench.stages.fail("fetch", IMAGES_AWAY)
    await bench.failure()
    before = await bench.row()
    bench.stages.mend("fetch")
    assert (await bench.send(bench.sent[0])).results[0].labels == [PROMPT]
    assert (await bench.row()).attempt_id == before.attempt_id
    assert bench.count() == 0


async def test_task_is_kept_after_its_caller_disconnects(bench: Bench) -> None:
    """A task whose caller has disconnected is kept too."""
    bench.stages.fail("segment", STOPPED)
    bench.stages.hold("segment")
    caller = bench.call()
    await bench.stages.entry_of("segment")
    caller.cancel()
    bench.stages.release("segment")
    await wait_until(lambda: bench.count(where="owner IS NULL AND outcome IS NULL") == 1)
    bench.stages.mend("segment")
    assert (await bench.recover()).status == "done"


async def test_nothing_is_started_while_the_model_is_away(bench: Bench) -> None:
    """Kept tasks are not started while the model is loading."""
    bench.stages.fail("segment", LOADING)
    await bench.failure()
    bench.stages.mend("segment")
    bench.model.state = "loading"
    claims, checks = bench.stages.entered["claim"], bench.stages.entered["check"]
    bench.recovery.start()
    await bench.stages.entry_of("check", calls=checks + 2)  # for the leases and for the tasks
    assert await bench.stages.stays_at("claim", claims)
    bench.model.state = "ok"
    await bench.clock.advance(1)
    assert (await bench.ended_row()).status == "done"


async def test_unknown_exception_in_a_restarted_task(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """An unknown exception in a restarted task is logged with the original request id."""
    bench.stages.fail("segment", LOADING)
    assert (await bench.failure()).code == "MODEL_NOT_LOADED"
    bench.stages.fail("segment", ZeroDivisionError("a bug"))
    row = await bench.recover()
    assert row.metadata == {"error_message": "something went wrong on our side"}
    [record] = [record for record in caplog.records if record.exc_info]
    assert REQUEST_ID in record.getMessage()
    assert str(bench.sent[0].task_id) in record.getMessage()


async def test_known_error_in_a_restarted_task(bench: Bench) -> None:
    """A known error in a restarted task ends its row."""
    bench.stages.fail("fetch", IMAGES_AWAY)
    await bench.failure()
    bench.stages.fail("fetch", UnsupportedImage("the image is damaged"))
    row = await bench.recover()
    assert (row.status, row.metadata) == ("error", {"error_message": "the image is damaged"})


async def test_outage_limit(tmp_path: Path, tokenizer: PromptTokenizer) -> None:
    """A kept task ends as error after OUTAGE_LIMIT_S, and its row has the reason."""
    async with opened_bench(tmp_path, tokenizer, outage_limit_s=600) as bench:
        bench.stages.fail("fetch", IMAGES_AWAY)
        await bench.failure()
        bench.model.state = "loading"  # only the leases are renewed
        bench.recovery.start()
        await bench.clock.advance(601)
        row = await bench.ended_row()
        assert row.status == "error"
        assert "the object store does not answer" in str(row.metadata["error_message"])
        assert "after waiting 10 minutes" in str(row.metadata["error_message"])


async def test_lease_of_a_kept_task_is_renewed(bench: Bench) -> None:
    """The lease of a kept task is renewed, so that no other server claims it."""
    bench.stages.fail("fetch", IMAGES_AWAY)
    await bench.failure()
    before = await bench.row()
    bench.model.state = "loading"
    bench.recovery.start()
    for renewals in range(1, 7):  # three leases long
        await bench.clock.advance(60)
        await bench.stages.end_of("claim", calls=1 + renewals)
    assert await bench.rows.end_stale(0.0) == 0
    row = await bench.row()
    assert (row.status, row.attempt_id) == ("processing", before.attempt_id)


async def test_rows_away_at_the_claim(bench: Bench) -> None:
    """A task that could not be claimed gives 502, is kept, and is done later."""
    bench.stages.fail("claim", ROWS_AWAY)
    failure = await bench.failure()
    assert (failure.code, failure.status) == ("RESULTS_UNAVAILABLE", 502)
    assert "the task is kept" in failure.message
    assert await bench.find_row() is None
    assert not bench.stages.entered["decode"]
    bench.stages.mend("claim")
    assert (await bench.recover()).status == "done"


async def test_answer_of_the_claim_is_lost(bench: Bench) -> None:
    """A claim whose answer was lost is repeated by the same attempt."""
    bench.stages.fail("claim", ROWS_AWAY, after=True)
    assert (await bench.failure()).status == 502
    before = await bench.row()
    assert before.status == "processing"
    bench.stages.mend("claim")
    assert (await bench.recover()).attempt_id == before.attempt_id


async def test_rows_and_images_away_at_once(bench: Bench) -> None:
    """If both stores are away, the answer is the rows' error."""
    bench.stages.fail("claim", ROWS_AWAY)
    bench.stages.fail("fetch", IMAGES_AWAY)
    assert (await bench.failure()).code == "RESULTS_UNAVAILABLE"
    bench.stages.mend("claim")
    bench.stages.mend("fetch")
    assert (await bench.recover()).status == "done"


@pytest.mark.parametrize("after", [False, True])
async def test_rows_away_at_the_end(bench: Bench, *, after: bool) -> None:
    """The caller gets the result, and the row is settled later, whether or not the write took effect."""
    bench.stages.fail("settle", ROWS_AWAY, after=after)
    answer = await bench.send()
    assert (await bench.row()).status == ("done" if after else "processing")
    assert bench.count(where="outcome IS NOT NULL") == 1
    bench.stages.mend("settle")
    row = await bench.recover()
    assert (row.status, row.mask_url) == ("done", answer.results[0].mask_url)
    assert bench.stages.finished["segment"] == 1
    assert bench.count("unneeded_masks") == 0


# A task that kills the model's process.


async def given_up(bench: Bench) -> PredictRequest:
    """A request whose task was given up, because the model's process died each time."""
    bench.stages.fail("segment", STOPPED)
    request = bench.request()
    await bench.failure(request)
    row = await bench.recover()
    assert "stopped 3 times" in str(row.metadata["error_message"])
    assert bench.stages.entered["segment"] == 4
    bench.stages.mend("segment")
    return request


async def test_answer_after_the_last_death(bench: Bench) -> None:
    """The answer after the last death says that the task is given up, not kept."""
    bench.stages.fail("segment", STOPPED)
    request = bench.request()
    failures = [await bench.failure(request) for _ in range(4)]
    assert ["the task is kept" in failure.message for failure in failures] == [True, True, True, False]
    assert (failures[-1].code, failures[-1].status) == ("INFERENCE_FAILED", 500)
    assert "stopped 3 times" in failures[-1].message


async def test_given_up_task_stays_given_up(bench: Bench) -> None:
    """A retry of a given-up task gives the same message, and its work is not started."""
    request = await given_up(bench)
    before = await bench.row()
    failure = await bench.failure(request)
    assert (failure.code, failure.status) == ("INFERENCE_FAILED", 500)
    assert failure.message == before.metadata["error_message"]
    assert await bench.row() == before
    # An Edge may have set the row to pending.
    bench.execute("UPDATE segmentation_results SET status = 'pending', metadata = '{}'")
    await bench.failure(request)
    assert (await bench.row()).metadata == before.metadata
    assert bench.stages.entered["segment"] == 4


@pytest.mark.parametrize("change", ["image", "prompt", "operator"])
async def test_given_up_task_is_done_after_a_change(bench: Bench, change: str) -> None:
    """With another image, another prompt, or the operator's command the task is done."""
    request = await given_up(bench)
    if change == "image":
        bench.upload(png_bytes(scene(2).image))
    elif change == "prompt":
        request = request.model_copy(update={"text_prompt": "blue star"})
    else:
        await bench.outbox.remove_given_up(str(request.task_id))
    await bench.send(request)
    assert (await bench.row()).status == "done"


async def suspect_beside_a_neighbour(
    bench: Bench,
) -> tuple[asyncio.Task[BatchResponse], asyncio.Task[BatchResponse], PredictRequest]:
    """The call of a task that decodes, that of a suspect, which waits for it, and the suspect."""
    bench.stages.fail("segment", STOPPED)
    suspect = bench.request()
    await bench.failure(suspect)
    bench.stages.mend("segment")
    bench.stages.hold("decode")
    neighbour = bench.call()
    await bench.stages.entry_of("decode", calls=2)
    again = bench.call(suspect)
    return neighbour, again, suspect


async def test_suspect_runs_alone(bench: Bench) -> None:
    """A task during whose work a process died runs alone."""
    neighbour, again, _ = await suspect_beside_a_neighbour(bench)
    assert await bench.stages.stays_at("decode", 2)
    late = bench.call()
    assert await bench.stages.stays_at("decode", 2)
    bench.stages.release("decode")
    await in_time(asyncio.gather(neighbour, again, late))
    assert bench.stages.at_once["decode"] == bench.stages.at_once["segment"] == 1
    assert bench.count() == 0


async def test_suspect_that_waits_until_the_deadline_is_kept(bench: Bench) -> None:
    """A task that waits to run alone until its deadline is kept, and done later."""
    neighbour, again, suspect = await suspect_beside_a_neighbour(bench)
    await wait_until(lambda: bench.count(where="begun = 2") == 1)
    await bench.clock.advance(bench.settings.request_timeout_s + 1)
    failure = await failure_of(again)
    assert (failure.code, failure.status) == ("DEADLINE_EXCEEDED", 504)
    assert "the task is kept" in failure.message
    assert (await failure_of(neighbour)).code == "DEADLINE_EXCEEDED"  # its deadline has passed too
    assert (await bench.row(suspect)).status == "processing"
    bench.stages.release("decode")
    await bench.recover()
    assert (await bench.row(suspect)).status == "done"


# The background steps.


async def test_masks_of_a_failed_task_are_deleted(bench: Bench) -> None:
    """The masks of a task that ended as error are deleted after half a minute."""
    bench.stages.fail("settle", ZeroDivisionError("a bug"))
    await bench.failure()
    assert len(bench.masks()) == 1
    await bench.clock.advance(31)
    bench.recovery.start()
    await wait_until(lambda: bench.masks() == [] and bench.count("unneeded_masks") == 0)


@pytest.mark.parametrize("error", [IMAGES_AWAY, ZeroDivisionError("a bug")])
async def test_failing_step_does_not_stop_the_others(
    bench: Bench, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """A step that fails does not stop the other steps, and is retried."""
    bench.stages.fail("settle", ZeroDivisionError("a bug"))
    await bench.failure()
    bench.stages.mend("settle")
    bench.stages.fail("segment", LOADING)
    await bench.failure()
    bench.stages.mend("segment")
    bench.stages.fail("delete", error)
    await bench.clock.advance(31)
    caplog.clear()
    bench.recovery.start()
    await bench.stages.entry_of("delete")
    assert (await bench.ended_row()).status == "done"
    tracebacks = [record for record in caplog.records if record.exc_info]
    assert len(tracebacks) == isinstance(error, ZeroDivisionError)
    bench.stages.mend("delete")
    await bench.clock.advance(61)
    await wait_until(lambda: len(bench.masks()) == 1 and bench.count("unneeded_masks") == 0)


async def test_task_of_a_dead_process_is_done(tmp_path: Path, tokenizer: PromptTokenizer) -> None:
    """A task of a killed process is done by the next process, with the same attempt."""
    async with opened_bench(tmp_path, tokenizer) as killed:
        killed.stages.hold("segment")
        caller = killed.call()
        await killed.stages.entry_of("segment")
        before = await killed.row()
        await killed.kill()
        assert isinstance(
            (await in_time(asyncio.gather(caller, return_exceptions=True)))[0], asyncio.CancelledError
        )
    async with opened_bench(tmp_path, tokenizer, process="second") as bench:
        assert await bench.outbox.reset_after_restart() == (0, 1)
        bench.sent = killed.sent
        row = await bench.recover()
        assert (row.status, row.attempt_id) == ("done", before.attempt_id)


async def test_outcome_of_a_dead_process_is_delivered(tmp_path: Path, tokenizer: PromptTokenizer) -> None:
    """An outcome of a killed process is delivered without repeating the work."""
    async with opened_bench(tmp_path, tokenizer) as killed:
        killed.stages.fail("settle", ROWS_AWAY)
        answer = await killed.send()
        await killed.kill()
    async with opened_bench(tmp_path, tokenizer, process="second") as bench:
        assert await bench.outbox.reset_after_restart() == (1, 0)
        bench.sent = killed.sent
        row = await bench.recover()
        assert (row.status, row.mask_url) == ("done", answer.results[0].mask_url)
        assert not bench.stages.entered["segment"]
