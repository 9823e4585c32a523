"""A pipeline in the test's process, with real embedded stores, whose calls a test can hold or fail.

The model and the decoders are plain classes that answer immediately. One clock is used for the event loop's
timers, the leases and the pauses between retries; a test advances it instead of waiting.
"""

from __future__ import annotations

import asyncio
import inspect
import sqlite3
import time
from collections import Counter
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

import numpy as np
import pytest
from PIL import Image

from contract import BatchRequest, Failure, PredictRequest
from pipeline import Pipeline
from recovery import Recovery
from results import Claim, Outbox, SqliteResults, StoredResult, Task, open_outbox
from sam3_runner.images.decoded import DecodedImage, LocalImage
from sam3_runner.instances import FoundInstance, Instance, MaskCrop, PredictResult, UnionResult, Window
from sam3_runner.serving.engine import EngineStatus
from settings import Settings
from storage import LocalFolder
from tests.edge import png_bytes
from tests.image_files import png_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from contract import BatchResponse
    from results import Row
    from sam3_runner.images.image_file import ImageFile
    from sam3_runner.instances import PackedMask, Results
    from sam3_runner.prompts import ConceptPrompt, PromptTokenizer

T = TypeVar("T")

USER = "user-1"
REQUEST_ID = "request-17"
PROMPT = "red circle"
STAGES = ("claim", "fetch", "decode", "segment", "encode", "upload", "settle")
"""The stages of a task in their order; `check` comes before."""
LEASE_S = 120.0
WAIT_S = 30.0
"""The longest wait for a condition."""

MOMENT_S = 0.1

SMALL_IMAGE = png_bytes(Image.new("RGB", (16, 12), (200, 30, 30)))
HEAVY_IMAGE = png_of(5000, 5000, b"")
"""Its header has this size; nothing here decodes it."""


class Clock:
    """`time.monotonic` plus the seconds by which the test has advanced it."""

    def __init__(self) -> None:
        self._ahead_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self._ahead_s

    def install(self) -> None:
        """Use this clock in the running event loop."""
        asyncio.get_running_loop().time = self  # type: ignore[method-assign]

    async def advance(self, seconds: float) -> None:
        """Run the loop's ready callbacks, advance the clock, and run those that are due then."""
        for step_s in (0.0, seconds):
            self._ahead_s += step_s
            for _ in range(20):
                await asyncio.sleep(0)


async def wait_until(holds: Callable[[], object]) -> None:
    """Wait until the condition, a function or a coroutine function, is true; at most WAIT_S of real time."""
    limit_s = time.monotonic() + WAIT_S
    while True:
        held = holds()
        if await held if inspect.isawaitable(held) else held:
            return
        assert time.monotonic() < limit_s, "the condition did not become true"
        await asyncio.sleep(0.002)


async def in_time(work: Awaitable[T]) -> T:
    """The result of `work`; fails after WAIT_S of real time."""
    task = asyncio.ensure_future(work)
    await wait_until(task.done)
    return await task


async def failure_of(caller: asyncio.Task[Any]) -> Failure:
    """The failure that a caller gets."""
    with pytest.raises(Failure) as raised:
        await in_time(caller)
    return raised.value


class Stages:
    """Holds, fails and counts the calls of a task by stage."""

    def __init__(self) -> None:
        self.entered: Counter[str] = Counter()
        self.finished: Counter[str] = Counter()
        self.cancelled: Counter[str] = Counter()
        self.at_once: Counter[str] = Counter()
        """The highest number of concurrent calls of a stage."""
        self._running: Counter[str] = Counter()
        self._errors: dict[str, tuple[Exception, bool]] = {}
        self._held: dict[str, asyncio.Event] = {}
        self._changed = asyncio.Condition()

    def fail(self, stage: str, error: Exception, *, after: bool = False) -> None:
        """Make each call of a stage fail; `after`: after its effect."""
        self._errors[stage] = error, after

    def mend(self, stage: str) -> None:
        """Make the calls of a stage succeed again."""
        del self._errors[stage]

    def hold(self, *stages: str) -> None:
        """Make the calls of these stages wait for `release`."""
        self._held |= {stage: asyncio.Event() for stage in stages}

    def release(self, *stages: str) -> None:
        """Continue the calls of these stages, by default of all."""
        for stage in stages or tuple(self._held):
            self._held.pop(stage).set()

    @asynccontextmanager
    async def call(self, stage: str) -> AsyncIterator[None]:
        """The context of one call of a stage."""
        await self._count(self.entered, stage)
        self._running[stage] += 1
        self.at_once[stage] = max(self.at_once[stage], self._running[stage])
        try:
            if stage in self._held:
                await self._held[stage].wait()
            self._raise(stage, after=False)
            yield
            self._raise(stage, after=True)
        except asyncio.CancelledError:
            self.cancelled[stage] += 1
            raise
        finally:
            self._running[stage] -= 1
        await self._count(self.finished, stage)

    async def entry_of(self, stage: str, calls: int = 1) -> None:
        """Wait until a stage has been entered `calls` times."""
        await self._wait(self.entered, stage, calls)

    async def stays_at(self, stage: str, calls: int) -> bool:
        """Whether a stage is entered `calls` times and, for MOMENT_S, not once more."""
        try:
            async with asyncio.timeout(MOMENT_S):
                await self.entry_of(stage, calls + 1)
        except TimeoutError:
            return self.entered[stage] == calls
        return False

    async def end_of(self, stage: str, calls: int = 1) -> None:
        """Wait until `calls` calls of a stage have succeeded."""
        await self._wait(self.finished, stage, calls)

    def _raise(self, stage: str, *, after: bool) -> None:
        error, is_after = self._errors.get(stage, (None, after))
        if error is not None and is_after == after:
            raise error

    async def _count(self, counter: Counter[str], stage: str) -> None:
        async with self._changed:
            counter[stage] += 1
            self._changed.notify_all()

    async def _wait(self, counter: Counter[str], stage: str, calls: int) -> None:
        async with asyncio.timeout(WAIT_S), self._changed:
            await self._changed.wait_for(lambda: counter[stage] >= calls)


@dataclass(frozen=True)
class StagedMask:
    """Bits of a mask whose reading is the stage `encode`."""

    bits: PackedMask
    stages: Stages
    loop: asyncio.AbstractEventLoop

    def __array__(self, *_: object, **__: object) -> PackedMask:
        asyncio.run_coroutine_threadsafe(self._enter(), self.loop).result()
        return self.bits

    async def _enter(self) -> None:
        async with self.stages.call("encode"):
            pass


@dataclass
class Model:
    """A stand-in for the model's process: finds one square of 8 x 8 px in each image."""

    stages: Stages
    state: str = "ok"
    detail: str | None = None
    box: tuple[float, float, float, float] = (0.0, 0.0, 8.0, 8.0)
    tasks: list[str] = field(default_factory=list)
    """Ids of the tasks that it got, in their order."""
    deadlines_s: list[float] = field(default_factory=list)
    calls: list[tuple[DecodedImage, Sequence[ConceptPrompt]]] = field(default_factory=list)
    """The images that it got, with their prompts."""

    max_stored_px: int = 0
    input_side_px: int = 1008

    @property
    def is_ready(self) -> bool:
        return self.state == "ok"

    @property
    def prompts(self) -> list[ConceptPrompt]:
        """All that it got, in their order."""
        return [prompt for _, prompts in self.calls for prompt in prompts]

    def may_hold(self, _key: str) -> bool:
        return False

    @property
    def known_status(self) -> EngineStatus:
        return EngineStatus(
            state=self.state,  # type: ignore[arg-type]
            detail=self.detail,
            checkpoint="demo",
            input_side_px=self.input_side_px,
            weights_sha256="0" * 64,
        )

    async def status(self) -> EngineStatus:
        async with self.stages.call("check"):
            return self.known_status

    async def statuses(self) -> list[EngineStatus]:
        return [await self.status()]

    async def segment(
        self,
        image: DecodedImage,
        prompts: Sequence[ConceptPrompt],
        deadline_s: float,
        *,
        with_masks: bool = False,
        log_ids: dict[str, str] | None = None,
    ) -> tuple[Results, float]:
        assert deadline_s > time.monotonic()
        assert log_ids is not None
        assert log_ids.keys() == {"request_id", "task_id"}
        self.tasks.append(log_ids["task_id"])
        self.deadlines_s.append(deadline_s)
        self.calls.append((image, prompts))
        async with self.stages.call("segment"):
            size = image.width, image.height
            if with_masks:
                square = Instance(0.9, self.box, 64, 0, MaskCrop(0, 0, 8, 8, b"\xff" * 8))
                return [PredictResult(prompt.model_text, 0.9, *size, [square]) for prompt in prompts], 1.0
            found = FoundInstance(0.9, self.box, 64, 0)
            bits = np.zeros((image.height, -(-image.width // 8)), dtype=np.uint8)
            bits[:8, :1] = 255
            mask: Any = StagedMask(bits, self.stages, asyncio.get_running_loop())
            return [UnionResult(prompt.model_text, 0.9, *size, [found], mask) for prompt in prompts], 1.0


@dataclass
class Squares:
    """A stand-in for the decoder processes: every file is a small black image."""

    stages: Stages
    is_open: bool = False

    async def start(self) -> None:
        self.is_open = True

    async def decode(self, file: ImageFile, max_stored_px: int) -> DecodedImage:
        async with self.stages.call("decode"):
            assert file.data
            assert max_stored_px >= 0
            return LocalImage(np.zeros((2, 2, 3), dtype=np.uint8), width=16, height=12)

    async def decode_windows(self, file: ImageFile, windows: Sequence[Window]) -> list[DecodedImage]:
        async with self.stages.call("decode"):
            assert file.data
            pixels = np.zeros((2, 2, 3), dtype=np.uint8)
            return [LocalImage(pixels, window.width, window.height) for window in windows]

    async def preview(self, file: ImageFile, max_side_px: int) -> npt.NDArray[np.uint8]:
        async with self.stages.call("preview"):
            assert file.data
            return np.zeros((12, min(16, max_side_px), 3), dtype=np.uint8)

    async def close(self) -> None:
        self.is_open = False


class Objects(LocalFolder):
    """The embedded folder, with stages."""

    def __init__(self, root: Path, stages: Stages) -> None:
        super().__init__(root)
        self._stages = stages

    async def download_image(self, image_url: str, user_id: str, max_bytes: int) -> bytes:
        async with self._stages.call("fetch"):
            return await super().download_image(image_url, user_id, max_bytes)

    async def upload_mask(self, mask: bytes, key: str) -> str:
        async with self._stages.call("upload"):
            return await super().upload_mask(mask, key)

    async def delete_mask(self, key: str) -> None:
        async with self._stages.call("delete"):
            await super().delete_mask(key)


class Rows(SqliteResults):
    """The embedded rows, with stages."""

    def __init__(self, path: Path, stages: Stages, clock: Clock) -> None:
        super().__init__(path, LEASE_S, clock_s=clock)
        self._stages = stages

    async def claim(self, task: Task, attempt_id: str) -> Claim | StoredResult:
        async with self._stages.call("claim"):
            return await super().claim(task, attempt_id)

    async def update_result(
        self, task_id: str, mask_url: str, labels: list[str], metadata: dict[str, object], *, attempt_id: str
    ) -> None:
        async with self._stages.call("settle"):
            await super().update_result(task_id, mask_url, labels, metadata, attempt_id=attempt_id)


@dataclass
class Bench:
    """A pipeline on a folder, with everything that it calls."""

    folder: Path
    settings: Settings
    clock: Clock
    stages: Stages
    model: Model
    decoders: Squares
    objects: Objects
    rows: Rows
    outbox: Outbox
    pipeline: Pipeline
    recovery: Recovery
    image: str = f"uploads/{USER}/image"
    sent: list[PredictRequest | BatchRequest] = field(default_factory=list)
    _is_closed: bool = False

    def request(self, prompt: str = PROMPT, **changes: Any) -> PredictRequest:
        """A request for a new task with the uploaded image."""
        fields: dict[str, Any] = {"image_url": self.image, "user_id": USER, "task_id": uuid4()}
        fields["text_prompt"] = prompt
        return PredictRequest(**fields | changes)

    def upload(self, data: bytes, name: str = "image") -> str:
        """Store a file as the user's image."""
        key = f"uploads/{USER}/{name}"
        self.objects.put_upload(key, data)
        return key

    def call(
        self, request: PredictRequest | BatchRequest | None = None, *, deadline_ms: int | None = None
    ) -> asyncio.Task[BatchResponse]:
        """Start a call for a new task, or for `request`."""
        request = request or self.request()
        self.sent.append(request)
        return asyncio.create_task(self.pipeline.run(request, REQUEST_ID, deadline_ms))

    async def send(self, request: PredictRequest | BatchRequest | None = None) -> BatchResponse:
        """The answer to a new task, or to `request`."""
        return await in_time(self.call(request))

    async def failure(self, request: PredictRequest | BatchRequest | None = None) -> Failure:
        """The failure of a new task, or of `request`."""
        return await failure_of(self.call(request))

    async def find_row(self, request: PredictRequest | BatchRequest | None = None) -> Row | None:
        """The row of a request, by default of the last one; None if there is none."""
        return await self.rows.get(str((request or self.sent[-1]).task_id))

    async def row(self, request: PredictRequest | BatchRequest | None = None) -> Row:
        """The row of a request, by default of the last one."""
        row = await self.find_row(request)
        assert row is not None
        return row

    async def ended_row(self, request: PredictRequest | BatchRequest | None = None) -> Row:
        """The row after its task has ended, and no attempt is left in the file."""

        async def has_ended() -> bool:
            row = await self.find_row(request)
            return row is not None and row.status in {"done", "error"} and self.count() == 0

        await wait_until(has_ended)
        return await self.row(request)

    async def recover(self) -> Row:
        """Run Recovery until the last task has ended; its row."""
        await self.clock.advance(2)  # past the first pause between retries
        self.recovery.start()
        try:
            return await self.ended_row()
        finally:
            self.recovery.stop()

    def count(self, table: str = "attempts", where: str = "true") -> int:
        """The number of rows of a table in the file of attempts."""
        with closing(sqlite3.connect(self.folder / "outbox.sqlite")) as db:
            [[count]] = db.execute(f"SELECT count(*) FROM {table} WHERE {where}")  # noqa: S608 - ours
            return int(count)

    def execute(self, statement: str) -> None:
        """Execute a statement on the file of the rows."""
        with closing(sqlite3.connect(self.folder / "results.sqlite")) as db, db:
            db.execute(statement)

    def masks(self) -> list[Path]:
        """The masks that are stored."""
        return sorted((self.folder / "objects").glob("masks/**/*.png"))

    async def close(self) -> None:
        """Stop like the server."""
        if not self._is_closed:
            self._is_closed = True
            self.recovery.stop()
            await self.pipeline.close()

    async def kill(self) -> None:
        """End like a killed process: tasks are not finished, and nothing more is written."""
        self._is_closed = True
        self.recovery.stop()
        running = [*self.pipeline._running]
        for each in running:
            each.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await self.outbox.close()


@asynccontextmanager
async def opened_bench(
    folder: Path, tokenizer: PromptTokenizer, *, process: str = "first", **settings: Any
) -> AsyncIterator[Bench]:
    """A pipeline on `folder`, closed at the end of the block.

    Args:
        folder: of the stores; benches may use the same folder one after another.
        tokenizer: the model's.
        process: the owner of this bench's attempts; other owners count as dead processes.
        settings: changes to the settings.
    """
    checked = Settings(sam3_weights_path="demo", data_dir=folder, **settings)
    clock, stages = Clock(), Stages()
    clock.install()
    model, decoders = Model(stages), Squares(stages)
    objects, rows = Objects(folder / "objects", stages), Rows(folder / "results.sqlite", stages, clock)
    outbox = open_outbox(
        folder / "outbox.sqlite",
        rows,
        owner=process,
        is_alive=lambda owner: owner == process,
        server_version="1",
        lease_s=LEASE_S,
        outage_limit_s=checked.outage_limit_s,
        now=clock,
    )
    pipeline = Pipeline(
        checked,
        tokenizer=tokenizer,
        objects=objects,
        outbox=outbox,
        runner=model,
        decoders=decoders,
        model_version="1",
    )
    recovery = Recovery(outbox, objects, model, pipeline)
    bench = Bench(folder, checked, clock, stages, model, decoders, objects, rows, outbox, pipeline, recovery)
    bench.upload(SMALL_IMAGE)
    await pipeline.start()
    try:
        yield bench
    finally:
        stages.release()
        await bench.close()
