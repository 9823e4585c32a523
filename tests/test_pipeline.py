"""A task's path with real stores, where the model, or a bug of ours, does what no good model does."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from dataclasses import dataclass, field
from math import inf, nan
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import psutil
import pytest
from PIL import Image

from contract import BatchRequest, Failure, PredictRequest
from pipeline import IMAGE_SLOTS, Pipeline
from recovery import Recovery
from results import Claim, Outbox, SqliteResults, StoredResult, Task, open_outbox
from sam3_runner import Instance, MaskCrop, ModelNotLoaded, PredictResult, RunnerStopped
from sam3_runner.checkpoint import find_checkpoint
from sam3_runner.engine import EngineStatus
from settings import Settings
from storage import LocalFolder, StorageUnavailable
from tests.drawn import scene
from tests.edge import image_bytes, png_bytes, wait_for
from tests.server_processes import is_decoder

if TYPE_CHECKING:
    import logging
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from results import Row
    from sam3_runner.images.square import SquareImage

pytestmark = pytest.mark.anyio

USER = "user-1"
REQUEST_ID = "request-17"
PROMPT = "red circle"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class Model:
    """Stands for the model's process: finds one square everywhere, unless it is to fail."""

    error: Exception | None = None
    score: float = 0.9
    box: tuple[float, float, float, float] = (0.0, 0.0, 8.0, 8.0)
    passes: int = 0
    state: str = "ok"
    status_error: Exception | None = None

    async def status(self) -> EngineStatus:
        if self.status_error is not None:
            raise self.status_error
        return EngineStatus(state=self.state)  # type: ignore[arg-type]

    async def segment(
        self, image: SquareImage, prompts: list[str], _: float, *, log_ids: dict[str, str]
    ) -> tuple[list[PredictResult], float]:
        self.passes += 1
        assert log_ids.keys() == {"request_id", "task_id"}
        if self.error is not None:
            raise self.error
        square = MaskCrop(0, 0, 8, 8, b"\xff" * 8)
        found = Instance(self.score, self.box, 64, square, 0)
        return [PredictResult(prompt, 0.9, image.width, image.height, [found]) for prompt in prompts], 1.0


class Folder(LocalFolder):
    """A folder that can be away."""

    away = False

    async def download_image(self, image_url: str, user_id: str, max_bytes: int) -> bytes:
        if self.away:
            raise StorageUnavailable("the object store does not answer")
        return await super().download_image(image_url, user_id, max_bytes)


class Rows(SqliteResults):
    """Rows whose store can have a bug."""

    bug: Exception | None = None

    async def claim(self, task: Task, attempt_id: str) -> Claim | StoredResult:
        if self.bug is not None:
            raise self.bug
        return await super().claim(task, attempt_id)


@dataclass
class Bench:
    """A pipeline on a folder, and what its callers know."""

    pipeline: Pipeline
    recovery: Recovery
    outbox: Outbox
    model: Model
    objects: Folder
    rows: Rows
    folder: Path
    image: str = ""
    sent: list[PredictRequest] = field(default_factory=list)

    def upload(self, seed: int) -> str:
        key = f"uploads/{USER}/{seed}"
        self.objects.put_upload(key, png_bytes(scene(seed).image))
        return key

    async def send(self, request: PredictRequest | BatchRequest | None = None) -> dict[str, Any]:
        """The answer to a new task, or to `request`."""
        if request is None:
            request = PredictRequest(image_url=self.image, text_prompt=PROMPT, user_id=USER, task_id=uuid4())
            self.sent.append(request)
        return (await self.pipeline.run(request, REQUEST_ID)).model_dump()

    async def fails(self, request: PredictRequest | BatchRequest | None = None) -> Failure:
        with pytest.raises(Failure) as raised:
            await self.send(request)
        return raised.value

    async def row(self, request: PredictRequest | None = None) -> Row:
        row = await self.rows.get(str((request or self.sent[-1]).task_id))
        assert row is not None
        return row

    async def recover(self, status: str) -> Row:
        """The row of the last task once the background has ended it."""
        self.recovery.start()
        await asyncio.to_thread(wait_for, self.status_on_disk, lambda found: found == status)
        await asyncio.to_thread(wait_for, self.on_disk, lambda left: left == 0)
        self.recovery.stop()
        return await self.row()

    def status_on_disk(self) -> str:
        with closing(sqlite3.connect(self.folder / "results.sqlite")) as db:
            [[status]] = db.execute(
                "SELECT status FROM segmentation_results WHERE id = ?", (str(self.sent[-1].task_id),)
            ).fetchall()
            return str(status)

    def on_disk(self, table: str = "attempts") -> int:
        with closing(sqlite3.connect(self.folder / "outbox.sqlite")) as db:
            [[count]] = db.execute(f"SELECT count(*) FROM {table}").fetchall()  # noqa: S608 - ours
            return int(count)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    settings = Settings(sam3_weights_path="demo")
    rows, objects, model = Rows(tmp_path / "results.sqlite", 120), Folder(tmp_path / "objects"), Model()
    outbox = open_outbox(
        tmp_path / "outbox.sqlite",
        rows,
        owner="this process",
        is_alive=lambda _: True,
        server_version="1",
        lease_s=120,
        outage_limit_s=settings.outage_limit_s,
    )
    pipeline = Pipeline(
        settings,
        find_checkpoint("demo"),
        objects=objects,
        outbox=outbox,
        runner=model,  # type: ignore[arg-type]
        model_version="1",
    )
    recovery = Recovery(outbox, objects, model, pipeline)  # type: ignore[arg-type]
    opened = Bench(pipeline, recovery, outbox, model, objects, rows, tmp_path)
    opened.image = opened.upload(1)
    yield opened
    opened.recovery.stop()
    await pipeline.close()


def tracebacks(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.exc_info]


async def test_task_is_done_and_answered_again(bench: Bench) -> None:
    """The stand-in for the model is good enough for a whole task, and for its replay."""
    answer = await bench.send()
    assert answer["results"][0]["labels"] == [PROMPT]
    assert (await bench.row()).status == "done"
    assert await bench.send(bench.sent[0]) == answer
    assert bench.model.passes == 1
    assert bench.on_disk() == 0


@pytest.mark.parametrize("number", [nan, inf])
async def test_result_that_is_no_json_ends_the_row(
    bench: Bench, number: float, caplog: pytest.LogCaptureFixture
) -> None:
    """A box that is not finite cannot be stored: the row ends at once, and says so; nothing is left."""
    bench.model.box = (0.0, number, 8.0, 8.0)
    failure = await bench.fails()
    assert (failure.code, failure.status) == ("INTERNAL_ERROR", 500)
    assert "JSON" in failure.message
    row = await bench.row()
    assert (row.status, row.metadata) == ("error", {"error_message": failure.message})
    assert bench.on_disk() == 0
    assert bench.on_disk("unneeded_masks") == 1
    [record] = tracebacks(caplog)
    assert REQUEST_ID in record.getMessage()


STAGES: dict[str, Callable[[Bench, Exception], None]] = {
    "check": lambda bench, error: setattr(bench.model, "status_error", error),
    "claim": lambda bench, error: setattr(bench.rows, "bug", error),
    "work": lambda bench, error: setattr(bench.model, "error", error),
}


@pytest.mark.parametrize("stage", STAGES)
async def test_unknown_exception_is_logged_once(
    bench: Bench, stage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A bug is a 500, and the log has its traceback once, with the request's and the task's ids."""
    STAGES[stage](bench, ZeroDivisionError("a bug"))
    failure = await bench.fails()
    assert (failure.code, failure.message) == ("INTERNAL_ERROR", "something went wrong on our side")
    [record] = tracebacks(caplog)
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ZeroDivisionError)
    assert REQUEST_ID in record.getMessage()
    assert str(bench.sent[0].task_id) in record.getMessage()
    assert bench.on_disk() == 0


async def test_unknown_exception_of_a_task_begun_again(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """A bug that a kept task meets is logged like any other, under the id of the request that brought it."""
    bench.model.error = ModelNotLoaded("the model is loading")
    assert (await bench.fails()).code == "MODEL_NOT_LOADED"
    bench.model.error = ZeroDivisionError("a bug")
    row = await bench.recover("error")
    assert row.metadata["error_message"] == "something went wrong on our side"
    [record] = tracebacks(caplog)
    assert REQUEST_ID in record.getMessage()
    assert str(bench.sent[0].task_id) in record.getMessage()


KEEPERS: dict[str, tuple[Exception, str, int]] = {
    "the runner dies": (RunnerStopped("the model's process stopped"), "MODEL_NOT_LOADED", 503),
    "the runner is new": (ModelNotLoaded("the model is loading"), "MODEL_NOT_LOADED", 503),
}


@pytest.mark.parametrize("keeper", KEEPERS)
async def test_task_is_kept_while_the_model_is_away(bench: Bench, keeper: str) -> None:
    """The caller is told that the task is kept; its row stays ours, and is done without another call."""
    bench.model.error, code, status = KEEPERS[keeper]
    failure = await bench.fails()
    assert (failure.code, failure.status) == (code, status)
    assert failure.headers["Retry-After"]
    assert "the task is kept" in failure.message
    before = await bench.row()
    assert before.status == "processing"
    bench.model.error = None
    assert (await bench.recover("done")).attempt_id == before.attempt_id


async def test_task_is_kept_while_the_object_store_is_away(bench: Bench) -> None:
    """An outage of the object store after the claim is a 502, and the task is done when it is back."""
    bench.objects.away = True
    failure = await bench.fails()
    assert (failure.code, failure.status) == ("STORAGE_UNAVAILABLE", 502)
    assert "the task is kept" in failure.message
    before = await bench.row()
    assert before.status == "processing"
    bench.objects.away = False
    assert (await bench.recover("done")).attempt_id == before.attempt_id


async def test_kept_task_may_be_sent_again(bench: Bench) -> None:
    """A caller that sends a kept task again has it done at once, by the same attempt."""
    bench.objects.away = True
    await bench.fails()
    before = await bench.row()
    bench.objects.away = False
    answer = await bench.send(bench.sent[0])
    assert answer["results"][0]["labels"] == [PROMPT]
    assert (await bench.row()).attempt_id == before.attempt_id
    assert bench.on_disk() == 0


async def given_up(bench: Bench) -> PredictRequest:
    """A task during whose work the model's process dies whenever it is begun."""
    bench.model.error = RunnerStopped("the model's process stopped")
    await bench.fails()
    row = await bench.recover("error")
    assert "stopped 3 times" in str(row.metadata["error_message"])
    assert bench.model.passes == 4
    bench.model.error = None
    return bench.sent[-1]


async def test_caller_of_the_last_death_is_told_that_the_task_is_given_up(bench: Bench) -> None:
    """Who sends a suspect again, and has it killed for the last time, is not told that it is kept."""
    bench.model.error = RunnerStopped("the model's process stopped")
    request = PredictRequest(image_url=bench.image, text_prompt=PROMPT, user_id=USER, task_id=uuid4())
    failures = [await bench.fails(request) for _ in range(4)]
    assert ["the task is kept" in failure.message for failure in failures] == [True, True, True, False]
    assert (failures[-1].code, failures[-1].status) == ("INFERENCE_FAILED", 500)
    assert "stopped 3 times" in failures[-1].message


async def test_given_up_task_stays_given_up(bench: Bench) -> None:
    """Sent again, a task that was given up is refused by the same sentence, and its work is not begun."""
    request = await given_up(bench)
    before = await bench.row()
    failure = await bench.fails(request)
    assert (failure.code, failure.status) == ("INFERENCE_FAILED", 500)
    assert failure.message == before.metadata["error_message"]
    assert await bench.row() == before
    assert bench.model.passes == 4
    # An Edge may have made the row pending again.
    with closing(sqlite3.connect(bench.folder / "results.sqlite")) as db, db:
        db.execute("UPDATE segmentation_results SET status = 'pending', metadata = '{}'")
    await bench.fails(request)
    assert (await bench.row()).metadata == before.metadata
    assert bench.model.passes == 4


@pytest.mark.parametrize("change", ["image", "prompt", "operator"])
async def test_given_up_task_is_tried_after_a_change(bench: Bench, change: str) -> None:
    """Another picture at the same place, other prompts, or an operator's word: the task is done."""
    request = await given_up(bench)
    if change == "image":
        bench.objects.put_upload(bench.image, png_bytes(scene(2).image))
    elif change == "prompt":
        request = request.model_copy(update={"text_prompt": "blue star"})
    else:
        await bench.outbox.remove_given_up(str(request.task_id))
    await bench.send(request)
    assert (await bench.row()).status == "done"


def spoil(bench: Bench, change: str) -> None:
    with closing(sqlite3.connect(bench.folder / "results.sqlite")) as db, db:
        db.execute(f"UPDATE segmentation_results SET {change}")  # noqa: S608 - ours


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
    """A stored answer is believed only if it is whole and its masks are this task's own."""
    await bench.send()
    spoil(bench, SPOILED[change])
    failure = await bench.fails(bench.sent[0])
    assert (failure.code, failure.status) == ("INVALID_REQUEST", 400)
    assert "no longer holds the result" in failure.message
    assert bench.on_disk() == 0


async def test_batch_is_answered_again(bench: Bench) -> None:
    """The stored answer of several prompts is whole too."""
    request = BatchRequest(
        image_url=bench.image, prompts=["red circle", "blue star"], user_id=USER, task_id=uuid4()
    )
    assert await bench.send(request) == await bench.send(request)
    assert bench.model.passes == 1


async def test_masks_of_a_failed_task_are_deleted(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was stored for a row that then ends as an error is deleted in the background."""
    monkeypatch.setattr("results.unneeded_masks.DELETE_AFTER_S", 0.0)
    bench.model.box = (0.0, nan, 8.0, 8.0)
    await bench.fails()
    masks = bench.folder / "objects" / "masks"
    assert list(masks.rglob("*.png"))
    bench.recovery.start()
    await asyncio.to_thread(
        wait_for,
        lambda: (list(masks.rglob("*.png")), bench.on_disk("unneeded_masks")),
        lambda left: left == ([], 0),
    )


def heavy_image() -> bytes:
    """A small file of 25 megapixels."""
    return image_bytes(Image.new("RGB", (5000, 5000)), "JPEG")


def decoders() -> list[psutil.Process]:
    """The processes that decode; that of a heavy image ends with it."""
    return [each for each in psutil.Process().children() if is_decoder(each)]


async def test_repeats_decode_nothing(bench: Bench) -> None:
    """A task that is done is answered again without its image being decoded."""
    bench.objects.put_upload(bench.image, heavy_image())
    first = asyncio.create_task(bench.send())
    await asyncio.to_thread(wait_for, decoders, bool)
    answer = await first
    for _ in range(5):
        again = asyncio.create_task(bench.send(bench.sent[0]))
        while not again.done():
            assert decoders() == []
            await asyncio.sleep(0.01)
        assert again.result() == answer


@pytest.mark.slow
async def test_heavy_images_keep_nobody_waiting(bench: Bench) -> None:
    """However many heavy images wait for their turn, an ordinary one is done beside them."""
    ordinary = bench.image
    bench.image = f"uploads/{USER}/heavy"
    bench.objects.put_upload(bench.image, heavy_image())
    heavy = [asyncio.create_task(bench.send()) for _ in range(2 * IMAGE_SLOTS)]
    await asyncio.to_thread(wait_for, bench.on_disk, lambda begun: begun == len(heavy))
    bench.image = ordinary
    await bench.send()
    assert len([each for each in heavy if not each.done()]) > IMAGE_SLOTS
    await asyncio.gather(*heavy)


@pytest.mark.slow
async def test_stop_keeps_images_that_wait(bench: Bench) -> None:
    """At a stop what is decoded soon is done, and what would wait for longer is kept for the next server."""
    bench.objects.put_upload(bench.image, heavy_image())
    heavy = [asyncio.create_task(bench.send()) for _ in range(40)]
    await asyncio.to_thread(wait_for, bench.on_disk, lambda begun: begun == len(heavy))
    await bench.outbox.prepare_stop()
    answers = await asyncio.gather(*heavy, return_exceptions=True)
    kept = [each for each in answers if isinstance(each, Failure)]
    assert {(each.code, each.status) for each in kept} == {("MODEL_NOT_LOADED", 503)}
    assert 0 < len(kept) == bench.on_disk() < len(heavy)
