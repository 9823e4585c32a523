"""The one path of a task: claim the row, fetch the image, segment it, store the masks, settle the row.

The row is the result. Once begun, the work goes on also when the caller has hung up, and a claimed row ends
as `done` or `error`. A task that cannot go on (a process has died; R2, the database or the model is away) is
kept, and recovery.py begins it again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from admission import Admission, FairGate, Place, cost_of, slots_per_worker
from contract import Failure, OverloadedError, TaskGivenUpError
from contract.options import TaskOptions
from observability.log_lines import log_ids
from observability.metrics import OVERLOAD_REFUSALS, TASKS, TASKS_IN_FLIGHT
from rendering import OutputFile, Renderer
from results import GIVEN_UP_MESSAGE, AttemptLost, Task, TaskNotFound
from sam3_runner import ModelNotLoaded, RunnerStopped
from sam3_runner.images.tiles import max_tiles
from sam3_runner.metrics import collect_request_s, stage
from segmentation import Query, Segmenter, query_of, sha256_of
from storage import StorageUnavailable, mask_key
from task_answer import ANSWER, Facts, build_answer, fitted_metadata, mask_url_of, read_answer

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping, Sequence

    from contract import BatchRequest, BatchResponse, PredictRequest
    from results import Attempt, Outbox, StoredResult
    from sam3_runner.base import Decoders, Runner
    from sam3_runner.images.image_file import ImageFile
    from sam3_runner.prompts import PromptTokenizer
    from sam3_runner.serving.engine import EngineStatus
    from segmentation import ReadImage
    from settings import Settings
    from storage import ObjectStore

logger = logging.getLogger(__name__)

DRAIN_S = 8.0
"""At a stop, the time to settle rows that are not settled yet: most hosts kill after ten seconds."""

UPLOADS_AT_ONCE = 8
"""Of one task: its many files must not take all connections of the store."""


@dataclass(frozen=True, slots=True)
class _Run:
    """One run of an attempt.

    Attributes:
        query: what to find.
        place: in the queues.
        stages_s: times of the stages so far.
        claimed: the row is this attempt's.
        begun: the work that may kill a process has begun.
    """

    attempt: Attempt
    query: Query
    place: Place
    stages_s: dict[str, float]
    claimed: asyncio.Event = field(default_factory=asyncio.Event)
    begun: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True, slots=True)
class _Result:
    """The result of a task: the answer, and what its row gets."""

    response: BatchResponse
    mask_url: str
    metadata: dict[str, object]
    keys: list[str]
    """Of all stored files."""


class Pipeline:
    """Runs the tasks of one API worker.

    Args:
        settings: limits and times.
        tokenizer: the model's, to count the tokens of prompts.
        objects: images in, masks out.
        outbox: the tasks' rows, behind the file of attempts.
        runner: the model.
        decoders: decode the images; the pipeline starts and closes them.
        model_version: written to the row.
        runners: processes of the model, which all API workers share.

    Attributes:
        segmenter, admission, heavy_turn: direct requests pass the same.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        tokenizer: PromptTokenizer,
        objects: ObjectStore,
        outbox: Outbox,
        runner: Runner,
        decoders: Decoders,
        model_version: str,
        runners: int = 1,
    ) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self._objects = objects
        self._outbox = outbox
        self._runner = runner
        self._decoders = decoders
        self.segmenter = Segmenter(
            max_image_pixels=settings.max_image_pixels, runner=runner, decoders=decoders
        )
        self._renderer = Renderer()
        self._model_version = model_version
        slots = slots_per_worker(settings.sam3_max_batch, settings.api_worker_count, runners)
        # A slot bounds the files that this worker holds too, `MAX_IMAGE_BYTES` each.
        self.admission = Admission(slots, settings.max_in_flight)
        self.heavy_turn = FairGate(1)
        self._running: set[asyncio.Task[BatchResponse]] = set()

    async def start(self) -> None:
        """Start the decoders, which the first task would wait for."""
        await self._decoders.start()

    async def run(
        self, request: PredictRequest | BatchRequest, request_id: str, deadline_ms: int | None = None
    ) -> BatchResponse:
        """Do the task, or return its stored result when it is done already.

        Args:
            request: is valid by itself.
            request_id: for the log.
            deadline_ms: how long the caller waits; None: `default_deadline_s`.

        Raises:
            Failure: and nothing else.
        """
        task = Task(
            task_id=str(request.task_id),
            user_id=request.user_id,
            source_image_url=request.image_url,
            prompts=request.labels_of_prompts,
            options=request.options_text,
        )
        try:
            place = self._new_place(request, deadline_ms)
            await self.admit(request.texts_by_field, place)
        except Exception as error:  # _failure turns every error into a Failure
            raise _refused(_failure(error, task, request_id)) from error
        # Shielded: a caller that hangs up ends its request, not the task.
        with log_ids(request_id=request_id, task_id=task.task_id):
            work = self._start(self._begin(task, request_id, place), place)
        return await asyncio.shield(work)

    def find_refusal(
        self, request: PredictRequest | BatchRequest, deadline_ms: int | None = None
    ) -> Failure | None:
        """What `run` would raise for this request since this worker has too much to do; None if it has not.

        Without an await, for the server's own check before a request is read by its route.
        """
        overloaded = self.find_overload(self._new_place(request, deadline_ms))
        return None if overloaded is None else _refused(Failure.of(overloaded))

    def find_overload(self, place: Place) -> OverloadedError | None:
        """Why a request must not begin, since this worker has too much to do; None where it may.

        None too while the model is not ready: `admit` says why. Without an await.
        """
        return self._find_overload(place) if self._runner.is_ready else None

    async def run_again(self, attempt: Attempt) -> BatchResponse:
        """Begin an attempt again that was kept. Raises `Failure`, and nothing else."""
        with log_ids(request_id=attempt.request_id, task_id=attempt.task.task_id):
            # It has waited: before the new ones of its user, and without their deadline.
            deadline_s = time.monotonic() + self._settings.request_timeout_s
            tiles = max_tiles(TaskOptions.from_text(attempt.task.options).tiles)
            cost = cost_of(len(attempt.task.prompts), tiles)
            place = Place(attempt.task.user_id, deadline_s, cost=cost, order_s=0.0)
            work = self._start(self._attempt(attempt, place), place)
        return await asyncio.shield(work)

    async def close(self) -> None:
        """Let the running tasks end, then close the stores."""
        if self._running:
            logger.info("finishing %d tasks before the stop", len(self._running))
            await asyncio.wait(self._running, timeout=self._settings.request_timeout_s)
        await self._outbox.drain(DRAIN_S)
        await self._outbox.close()
        await self._objects.close()
        await self._decoders.close()

    async def admit(self, texts_by_field: Mapping[str, str], place: Place) -> None:
        """Check what can be checked before anything is changed; direct requests share it.

        Raises PromptTooLong, ModelNotLoaded and OverloadedError. Without an await after the last check: the
        caller begins the work at once.
        """
        for name, text in texts_by_field.items():
            self._tokenizer.check_length(text, name=f"{name}:")
        await self._check_capacity(place)

    @property
    def known_status(self) -> EngineStatus:
        """The model's state by its last answer."""
        return self._runner.known_status

    @property
    def timeout_s(self) -> float:
        """The longest time of a request's work."""
        return self._settings.request_timeout_s

    def deadline_s(self, deadline_ms: int | None) -> float:
        """Until when a request waits, on the clock of `time.monotonic`."""
        wait_s = self._settings.default_deadline_s if deadline_ms is None else deadline_ms / 1000
        return time.monotonic() + min(wait_s, self._settings.request_timeout_s)

    def _new_place(self, request: PredictRequest | BatchRequest, deadline_ms: int | None) -> Place:
        deadline_s = self.deadline_s(deadline_ms)
        # The image's size is not known yet, and so not how many tiles `auto` is.
        cost = cost_of(len(request.labels_of_prompts), max_tiles(request.tiles))
        return Place(request.user_id, deadline_s, cost=cost)

    async def _check_capacity(self, place: Place) -> None:
        """Refuse before anything is claimed, so that the row stays as it is for the next attempt."""
        status = await self._runner.status()
        if status.state != "ok":
            raise ModelNotLoaded(status.detail or "the model is loading")
        # Last: with an await between this check and the start of the work, a burst would pass the check.
        overloaded = self._find_overload(place)
        if overloaded is not None:
            raise overloaded

    def _find_overload(self, place: Place) -> OverloadedError | None:
        refusal = self.admission.check(place)
        if refusal is None:
            return None
        OVERLOAD_REFUSALS.labels(refusal.reason).inc()
        return OverloadedError(refusal.message, refusal.retry_after_s)

    def _start(self, work: Coroutine[None, None, BatchResponse], place: Place) -> asyncio.Task[BatchResponse]:
        self.admission.begin(place)
        running = asyncio.create_task(work)
        # However it ends, also before its first step.
        running.add_done_callback(lambda _: self.admission.end(place))
        self._running.add(running)
        running.add_done_callback(self._running.discard)
        TASKS_IN_FLIGHT.inc()
        running.add_done_callback(lambda _: TASKS_IN_FLIGHT.dec())
        running.add_done_callback(_consume_exception)
        running.add_done_callback(_free_frames)
        return running

    async def _begin(self, task: Task, request_id: str, place: Place) -> BatchResponse:
        """Do the task of a request. Raises `Failure`."""
        try:
            await self._refuse_given_up(task, place)
            attempt = await self._outbox.record(task, request_id)
        except Exception as error:  # _failure turns every error into a Failure
            raise _refused(_failure(error, task, request_id)) from error
        return await self._attempt(attempt, place)

    async def _refuse_given_up(self, task: Task, place: Place) -> None:
        """Raise TaskGivenUpError for a task that was given up and whose image is unchanged."""
        known = await self._outbox.find_given_up(task)
        if known is None:
            return
        await self._wait(place)
        image = await self._download(task)
        if known.image_sha256 in {None, sha256_of(image)}:
            await self._outbox.refuse(task, known.error_message)
            raise TaskGivenUpError(known.error_message)
        await self._outbox.remove_given_up(task.task_id)

    async def _attempt(self, attempt: Attempt, place: Place) -> BatchResponse:
        """One attempt at a task that is in the file of attempts. Raises `Failure`."""
        run = _Run(attempt, _query_of(attempt.task), place, collect_request_s())
        # At the same time: the claim and the image are round trips to different hosts.
        claiming = asyncio.create_task(self._claim(run))
        reading = asyncio.create_task(self._read_image(run))
        for each in (claiming, reading):
            each.add_done_callback(_consume_exception)
        try:
            stored = await claiming
            if stored is not None:
                response = await read_answer(stored, attempt.task, self._objects)
                TASKS.labels("replayed", "").inc()
                return response
            run.claimed.set()
            return await self._settle(run, reading)
        except Exception as error:  # _failure turns every error into a Failure
            raise _failure(error, attempt.task, attempt.request_id) from error
        finally:
            reading.cancel()
            self._outbox.release(attempt)

    async def _claim(self, run: _Run) -> StoredResult | None:
        try:
            with stage("claim"):
                return await self._outbox.claim(run.attempt)
        except Exception as error:  # those without a code end the attempt
            if Failure.of(error).code != "INTERNAL_ERROR":
                raise
            # A bug: the state of the row is unknown, and the task must not be retried for ever.
            raise await self._end_without_result(run, error) from error

    async def _settle(self, run: _Run, reading: asyncio.Task[ReadImage]) -> BatchResponse:
        """Do the work and end the claimed row; the only place that does."""
        try:
            async with asyncio.timeout(self._settings.request_timeout_s):
                result = await self._work(run, reading)
            with stage("settle"):
                await self._outbox.update_result(
                    run.attempt,
                    result.mask_url,
                    _labels(result.response),
                    result.metadata,
                    result.keys,
                )
        except (AttemptLost, TaskNotFound):
            raise  # the row is another attempt's, or deleted: there is nothing to end
        except Exception as error:  # after any error the row must end, or the task be kept
            raise await self._end_without_result(run, error) from error
        TASKS.labels("done", "").inc()
        return result.response

    async def _end_without_result(self, run: _Run, error: Exception) -> Failure:
        """Keep the task after an outage, else end its row. Returns the failure for the caller."""
        attempt = run.attempt
        failure = _failure(error, attempt.task, attempt.request_id)
        try:
            back = await self._keep(run, error)
            TASKS.labels("kept" if back else "error", failure.code).inc()
            if back:
                return failure.with_message(f"{failure.message}; the task is kept, and done when {back}")
            await self._outbox.end_as_error(attempt, failure.message)
        except TaskGivenUpError as given_up:
            TASKS.labels("given_up", failure.code).inc()
            return Failure.of(given_up)
        except (AttemptLost, TaskNotFound) as lost:
            logger.warning("task %s failed with %s; %s", attempt.task.task_id, failure.code, lost)
        except Exception:  # the caller gets the first error; this one goes to the log
            logger.exception(
                "task %s failed with %s, and its end could not be noted (request %s)",
                *(attempt.task.task_id, failure.code, attempt.request_id),
            )
        return failure

    async def _keep(self, run: _Run, error: Exception) -> str | None:
        """Keep the task; returns when it is done, or None when it must end. Raises TaskGivenUpError."""
        attempt = run.attempt
        match error:
            case RunnerStopped():
                if not await self._outbox.requeue_after_death(attempt):
                    raise TaskGivenUpError(GIVEN_UP_MESSAGE)
                return "it is back"
            case ModelNotLoaded():
                back, kept = "it is", await self._outbox.requeue(attempt, str(error), with_backoff=False)
            case StorageUnavailable():
                back, kept = "it is back", await self._outbox.requeue(attempt, str(error), with_backoff=True)
            case TimeoutError() if self._outbox.has_blocked_attempts() and not run.begun.is_set():
                reason = "the task waited too long for its turn"
                back, kept = "it comes", await self._outbox.requeue(attempt, reason, with_backoff=False)
            case _:
                return None
        return back if kept else None

    async def _work(self, run: _Run, reading: asyncio.Task[ReadImage]) -> _Result:
        attempt, query = run.attempt, run.query
        task, options = attempt.task, query.options
        deadline_s = time.monotonic() + self._settings.request_timeout_s
        log_fields = {"request_id": attempt.request_id, "task_id": task.task_id}
        found = await self.segmenter.segment(reading, query, run.place, deadline_s, log_fields)
        model = self._runner.known_status
        found = await self.segmenter.refine(found, options)
        file_name = self._objects.key_of(task.source_image_url, task.user_id).rpartition("/")[2]
        files = await self._renderer.files(found, options, file_name)
        segmentations = await self._renderer.segmentations(found.results, options)
        keys, urls = await self._store(attempt, files)
        facts = Facts(model, self._model_version, run.stages_s, found.inference_ms, found.tiles)
        response = build_answer(
            task, options, found.results, urls=urls, segmentations=segmentations, facts=facts
        )
        metadata, document = fitted_metadata(response, task, self._model_version)
        if document is not None:
            further, answer = await self._store(attempt, [OutputFile(ANSWER, document, "json")])
            metadata["answer_url"] = answer[ANSWER]
            keys += further
        return _Result(response, mask_url_of(response, urls), metadata, keys)

    async def _store(self, attempt: Attempt, files: Sequence[OutputFile]) -> tuple[list[str], dict[str, str]]:
        """Store files of a result; their keys, and their URLs by their names."""
        task = attempt.task
        keys = [
            mask_key(
                *(task.user_id, task.task_id, file.name, file.content),
                attempt_id=attempt.attempt_id,
                suffix=file.suffix,
            )
            for file in files
        ]
        await self._outbox.begin_storing(attempt, keys)
        turns = asyncio.Semaphore(UPLOADS_AT_ONCE)

        async def upload(file: OutputFile, key: str) -> str:
            async with turns:
                return await self._objects.upload_mask(file.content, key)

        with stage("store"):
            urls = await asyncio.gather(*map(upload, files, keys))
        return keys, dict(zip((file.name for file in files), urls, strict=True))

    async def _read_image(self, run: _Run) -> ReadImage:
        attempt, place = run.attempt, run.place
        # What has begun its work never waits for a slot: a suspect waits for it, and others, which hold
        # slots, for the suspect.
        await self._wait(place)
        with place.paused():
            file, sha256 = await self._fetch(attempt.task, run.query)
            # After the claim: a repeat of a task that is done or running decodes nothing, and a death while
            # the database does not answer is not counted against a suspect.
            await run.claimed.wait()
        if file.is_heavy:
            place.join(self.heavy_turn)
            if not place.has_slot:
                # Heavy images wait without a slot, so that others can use it, and are fetched again.
                del file
                await self._wait(place)
                with place.paused():
                    file, sha256 = await self._fetch(attempt.task, run.query)
        place.correct_cost(cost_of(len(run.query.prompts), self.segmenter.tiles_of(file, run.query)))
        await self._begin_work(run, file, sha256)
        return await self.segmenter.decode(file, sha256, run.query)

    async def _wait(self, place: Place) -> None:
        with stage("wait"):
            await place.wait()

    async def _fetch(self, task: Task, query: Query) -> tuple[ImageFile, str]:
        """The image's file, its header parsed, and its checksum."""
        return await self.segmenter.read_file(await self._download(task), query)

    async def _begin_work(self, run: _Run, file: ImageFile, sha256: str) -> None:
        attempt = run.attempt
        # From here to the masks, an image may kill a process.
        noted_sha256 = sha256 if attempt.suspect else None
        async with asyncio.timeout(run.place.deadline_s - time.monotonic()):
            may_begin = await self._outbox.begin_work(attempt, noted_sha256, is_long=file.is_heavy)
        if not may_begin:
            raise ModelNotLoaded("the server is being stopped")
        run.begun.set()

    async def _download(self, task: Task) -> bytes:
        with stage("fetch"):
            return await self._objects.download_image(
                task.source_image_url, task.user_id, self._settings.max_image_bytes
            )


def _failure(error: Exception, task: Task, request_id: str) -> Failure:
    """The failure that a caller sees for `error`. An error without a code is logged, once."""
    failure = Failure.of(error)
    if failure.code == "INTERNAL_ERROR" and failure is not error:
        logger.error(
            "task %s failed (request %s)",
            *(task.task_id, request_id),
            exc_info=error,
            extra={"request_id": request_id, "task_id": task.task_id},
        )
    return failure


def _refused(failure: Failure) -> Failure:
    """The same failure; counts a task that was not begun."""
    TASKS.labels("refused", failure.code).inc()
    return failure


def _consume_exception(ended: asyncio.Task[Any]) -> None:
    """Read the exception: asyncio logs one that nobody has read."""
    if not ended.cancelled():
        ended.exception()


def _free_frames(ended: asyncio.Task[Any]) -> None:
    """Free what a failed task's frames hold, among it the image's file.

    The errors hold the frames, and these hold asyncio's tasks that hold the errors: they would stay in memory
    until the collector runs. What is worth a traceback has been logged.
    """
    errors = [] if ended.cancelled() else [ended.exception()]
    while errors:
        error = errors.pop()
        if error is not None and error.__traceback__ is not None:
            error.__traceback__ = None
            errors += [error.__cause__, error.__context__]


def _query_of(task: Task) -> Query:
    # The fields of a single prompt's boxes are named as predict has them.
    return query_of(task.prompts, TaskOptions.from_text(task.options), is_batch=len(task.prompts) > 1)


def _labels(response: BatchResponse) -> list[str]:
    """The prompts that were found, each once, in their order."""
    return list(dict.fromkeys(label for result in response.results for label in result.labels))
