"""The stop of an API worker: running tasks end, others are kept, and outcomes are delivered."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from contract import Failure
from results import ResultsUnavailable
from sam3_runner import ModelNotLoaded
from tests.in_process.bench import HEAVY_IMAGE, PROMPT, in_time, opened_bench

if TYPE_CHECKING:
    from pathlib import Path

    from sam3_runner.prompts import PromptTokenizer
    from tests.in_process.bench import Bench

pytestmark = pytest.mark.anyio

ROWS_AWAY = ResultsUnavailable("the results database does not answer")


def statuses(bench: Bench) -> list[str]:
    """The statuses of all rows, also after the bench has closed its own connection."""
    with closing(sqlite3.connect(bench.folder / "results.sqlite")) as db:
        return [status for (status,) in db.execute("SELECT status FROM segmentation_results")]


@pytest.mark.parametrize("stage", ["claim", "decode", "segment", "settle"])
async def test_running_tasks_end(bench: Bench, stage: str) -> None:
    """A stop waits for running tasks: the callers get their answers, and the rows are done."""
    bench.stages.hold(stage)
    callers = [bench.call() for _ in range(3)]
    await bench.stages.entry_of(stage, calls=3)
    stopping = asyncio.create_task(bench.close())
    await bench.clock.advance(1)
    assert not stopping.done()
    assert bench.decoders.is_open
    bench.stages.release(stage)
    await in_time(stopping)
    for caller in callers:
        assert (await in_time(caller)).results[0].labels == [PROMPT]
    assert statuses(bench) == ["done"] * 3
    assert bench.count() == 0
    assert not bench.decoders.is_open


async def test_running_task_without_its_caller_ends(bench: Bench) -> None:
    """A stop also waits for tasks whose callers have disconnected."""
    bench.stages.hold("segment")
    caller = bench.call()
    await bench.stages.entry_of("segment")
    caller.cancel()
    stopping = asyncio.create_task(bench.close())
    await bench.clock.advance(1)
    bench.stages.release("segment")
    await in_time(stopping)
    assert statuses(bench) == ["done"]


async def test_outcomes_are_delivered_before_the_end(bench: Bench) -> None:
    """Outcomes are delivered at the stop, though they are not due yet."""
    bench.stages.fail("settle", ROWS_AWAY)
    await bench.send()
    assert statuses(bench) == ["processing"]
    bench.stages.mend("settle")
    await bench.close()
    assert statuses(bench) == ["done"]
    assert bench.count() == 0


async def test_outcomes_stay_on_disk_while_the_rows_are_away(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """Outcomes that cannot be delivered stay on disk, and the log has their number."""
    bench.stages.fail("settle", ROWS_AWAY)
    await bench.send()
    await bench.send()
    await bench.close()
    assert bench.count(where="outcome IS NOT NULL") == 2
    assert any(record.getMessage().startswith("2 outcomes stay in the file") for record in caplog.records)


async def test_drain_has_a_timeout(bench: Bench) -> None:
    """A delivery that hangs ends with the drain's timeout."""
    bench.stages.fail("settle", ROWS_AWAY)
    await bench.send()
    bench.stages.mend("settle")
    bench.stages.hold("settle")
    stopping = asyncio.create_task(bench.close())
    await bench.stages.entry_of("settle", calls=2)
    await bench.clock.advance(9)
    await in_time(stopping)
    assert bench.count(where="outcome IS NOT NULL") == 1


async def test_hanging_task_is_left_to_the_next_server(tmp_path: Path, tokenizer: PromptTokenizer) -> None:
    """A hanging claim delays the stop by REQUEST_TIMEOUT_S at most; the next server does the task."""
    async with opened_bench(tmp_path, tokenizer) as first:
        first.stages.hold("claim")
        caller = first.call()
        await first.stages.entry_of("claim")
        stopping = asyncio.create_task(first.close())
        await first.clock.advance(first.settings.request_timeout_s - 1)
        assert not stopping.done()
        await first.clock.advance(2)
        await in_time(stopping)
        assert first.count() == 1
        caller.cancel()
        for each in first.pipeline._running:  # the process ends
            each.cancel()
    async with opened_bench(tmp_path, tokenizer, process="second") as second:
        await second.outbox.reset_after_restart()
        second.sent = first.sent
        assert (await second.recover()).status == "done"


async def test_nothing_is_started_after_the_stop(bench: Bench) -> None:
    """After the stop signal no kept task is started."""
    bench.stages.fail("segment", ModelNotLoaded("the model is loading"))
    await bench.failure()
    bench.stages.mend("segment")
    bench.recovery.start()
    bench.recovery.stop()
    claims = bench.stages.entered["claim"]
    await bench.clock.advance(10)
    assert await bench.stages.stays_at("claim", claims)
    assert bench.count(where="owner IS NULL") == 1


async def test_restarted_task_ends(bench: Bench) -> None:
    """A stop also waits for a restarted task."""
    bench.stages.fail("segment", ModelNotLoaded("the model is loading"))
    await bench.failure()
    bench.stages.mend("segment")
    bench.stages.hold("segment")
    bench.recovery.start()
    await bench.stages.entry_of("segment", calls=2)
    bench.recovery.stop()
    stopping = asyncio.create_task(bench.close())
    await bench.clock.advance(1)
    assert not stopping.done()
    bench.stages.release("segment")
    await in_time(stopping)
    assert statuses(bench) == ["done"]


async def test_waiting_heavy_images_are_kept(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a stop the current decoding ends, and tasks whose heavy images wait are kept."""
    monkeypatch.setattr("results.outbox.LONG_WORK_GRACE_S", 0.0)
    bench.stages.hold("decode")
    bench.upload(HEAVY_IMAGE)
    heavy = [bench.call() for _ in range(5)]
    await bench.stages.entry_of("decode")
    await bench.stages.end_of("fetch", calls=5)
    await bench.outbox.prepare_stop()
    bench.stages.release("decode")
    answers = await in_time(asyncio.gather(*heavy, return_exceptions=True))
    kept = [each for each in answers if isinstance(each, Failure)]
    assert {(each.code, each.status) for each in kept} == {("MODEL_NOT_LOADED", 503)}
    assert all("the task is kept" in each.message for each in kept)
    assert len(kept) == bench.count() == 4
    assert sorted(statuses(bench)) == ["done", *["processing"] * 4]


async def test_kill_after_the_stop_signal_is_not_counted(bench: Bench) -> None:
    """After the stop signal a kill does not count as a death of the running tasks."""
    bench.stages.hold("segment")
    caller = bench.call()
    await bench.stages.entry_of("segment")
    assert bench.count(where="begun > 0") == 1
    await bench.outbox.prepare_stop()
    assert bench.count(where="begun > 0") == 0
    bench.stages.release("segment")
    await in_time(caller)
    assert statuses(bench) == ["done"]
