"""The one path of a task: claim the row, fetch the image, segment it, store the masks, settle the row.

The row is the result. Once begun, the work goes on also when the caller has hung up, and a claimed row ends
as `done` or `error`. A task that cannot go on (a process has died; R2, the database or the model is away) is
kept, and recovery.py begins it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from admission import Admission, FairGate, Place, cost_of, slots_per_worker
from contract import (
    BatchResponse,
    Failure,
    InstanceModel,
    OverloadedError,
    PredictResponse,
    TaskGivenUpError,
    TaskMismatchError,
)
from observability.log_lines import log_ids
from observability.metrics import OVERLOAD_REFUSALS, TASKS, TASKS_IN_FLIGHT
from outputs.mask_png import encode_png
from results import GIVEN_UP_MESSAGE, AttemptLost, Task, TaskNotFound
from sam3_runner import FeaturesNotHeld, InferenceFailed, ModelNotLoaded, RunnerStopped
from sam3_runner.images.decoded import DecodedImage
from sam3_runner.images.exif import viewed_size
from sam3_runner.images.read import read_image_file
from sam3_runner.instances import packed_union
from sam3_runner.metrics import stage
from sam3_runner.prompts import ConceptPrompt
from storage import StorageUnavailable, mask_key

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

    from admission import Outcome
    from contract import BatchRequest, PredictRequest
    from results import Attempt, Outbox, StoredResult
    from sam3_runner.base import Decoders, Runner
    from sam3_runner.images.image_file import ImageFile
    from sam3_runner.instances import PredictResult, Results, UnionResult
    from sam3_runner.prompts import PromptTokenizer
    from settings import Settings
    from storage import ObjectStore

logger = logging.getLogger(__name__)

DRAIN_S = 8.0
"""At a stop, the time to settle rows that are not settled yet: most hosts kill after ten seconds."""

LARGE_MASK_PX = 2**24
"""Larger masks are encoded one at a time in a worker: each needs 1.3 bytes a pixel and the file."""

UNION = "union"
# More digits would be noise of float32.
SCORE_DIGITS = 4
BOX_DIGITS = 2


@dataclass(frozen=True, slots=True)
class _ReadImage:
    """An image for the runner; its file too, if it has no pixels since the runner seems to need none."""

    image: DecodedImage
    file: ImageFile | None = None


@dataclass(frozen=True, slots=True)
class _Result:
    """The result of a task: the answer, the URL of the mask for its row, the keys of all masks."""

    response: BatchResponse
    mask_url: str
    mask_keys: list[str]


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
        self._model_version = model_version
        slots = slots_per_worker(settings.sam3_max_batch, settings.api_worker_count, runners)
        # A slot bounds the files that this worker holds too, `MAX_IMAGE_BYTES` each.
        self._admission = Admission(slots, settings.max_in_flight)
        self._heavy_turn = FairGate(1)
        self._large_mask = asyncio.Lock()
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
            self._check_tokens(request)
            place = self._new_place(request, deadline_ms)
            await self._check_capacity(place)
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
        if not self._runner.is_ready:
            return None  # `run` says why
        overloaded = self._find_overload(self._new_place(request, deadline_ms))
        return None if overloaded is None else _refused(Failure.of(overloaded))

    async def run_again(self, attempt: Attempt) -> BatchResponse:
        """Begin an attempt again that was kept. Raises `Failure`, and nothing else."""
        with log_ids(request_id=attempt.request_id, task_id=attempt.task.task_id):
            # It has waited: before the new ones of its user, and without their deadline.
            deadline_s = time.monotonic() + self._settings.request_timeout_s
            cost = cost_of(len(attempt.task.prompts))
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

    def _check_tokens(self, request: PredictRequest | BatchRequest) -> None:
        for name, text in request.texts_by_field.items():
            self._tokenizer.check_length(text, name=f"{name}:")

    def _new_place(self, request: PredictRequest | BatchRequest, deadline_ms: int | None) -> Place:
        wait_s = self._settings.default_deadline_s if deadline_ms is None else deadline_ms / 1000
        deadline_s = time.monotonic() + min(wait_s, self._settings.request_timeout_s)
        return Place(request.user_id, deadline_s, cost=cost_of(len(request.texts)))

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
        refusal = self._admission.check(place)
        if refusal is None:
            return None
        OVERLOAD_REFUSALS.labels(refusal.reason).inc()
        return OverloadedError(refusal.message, refusal.retry_after_s)

    def _start(self, work: Coroutine[None, None, BatchResponse], place: Place) -> asyncio.Task[BatchResponse]:
        self._admission.begin(place)
        running = asyncio.create_task(work)
        # However it ends, also before its first step.
        running.add_done_callback(lambda _: self._admission.end(place))
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
        if known.image_sha256 in {None, _sha256(image)}:
            await self._outbox.refuse(task, known.error_message)
            raise TaskGivenUpError(known.error_message)
        await self._outbox.remove_given_up(task.task_id)

    async def _attempt(self, attempt: Attempt, place: Place) -> BatchResponse:
        """One attempt at a task that is in the file of attempts. Raises `Failure`."""
        claimed, begun = asyncio.Event(), asyncio.Event()
        # At the same time: the claim and the image are round trips to different hosts.
        claiming = asyncio.create_task(self._claim(attempt, begun))
        reading = asyncio.create_task(self._read_image(attempt, place, claimed, begun))
        for each in (claiming, reading):
            each.add_done_callback(_consume_exception)
        try:
            stored = await claiming
            if stored is not None:
                response = self._replay(stored, attempt.task)
                TASKS.labels("replayed", "").inc()
                return response
            claimed.set()
            return await self._settle(attempt, place, reading, begun)
        except Exception as error:  # _failure turns every error into a Failure
            raise _failure(error, attempt.task, attempt.request_id) from error
        finally:
            reading.cancel()
            self._outbox.release(attempt)

    async def _claim(self, attempt: Attempt, begun: asyncio.Event) -> StoredResult | None:
        try:
            with stage("claim"):
                return await self._outbox.claim(attempt)
        except Exception as error:  # those without a code end the attempt
            if Failure.of(error).code != "INTERNAL_ERROR":
                raise
            # A bug: the state of the row is unknown, and the task must not be retried for ever.
            raise await self._end_without_result(attempt, error, begun) from error

    async def _settle(
        self, attempt: Attempt, place: Place, reading: asyncio.Task[_ReadImage], begun: asyncio.Event
    ) -> BatchResponse:
        """Do the work and end the claimed row; the only place that does."""
        try:
            async with asyncio.timeout(self._settings.request_timeout_s):
                result = await self._work(attempt, place, reading)
            with stage("settle"):
                await self._outbox.update_result(
                    attempt,
                    result.mask_url,
                    _labels(result.response),
                    self._metadata(result.response, attempt.task.prompts),
                    result.mask_keys,
                )
        except (AttemptLost, TaskNotFound):
            raise  # the row is another attempt's, or deleted: there is nothing to end
        except Exception as error:  # after any error the row must end, or the task be kept
            raise await self._end_without_result(attempt, error, begun) from error
        TASKS.labels("done", "").inc()
        return result.response

    async def _end_without_result(self, attempt: Attempt, error: Exception, begun: asyncio.Event) -> Failure:
        """Keep the task after an outage, else end its row. Returns the failure for the caller."""
        failure = _failure(error, attempt.task, attempt.request_id)
        try:
            back = await self._keep(attempt, error, begun)
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

    async def _keep(self, attempt: Attempt, error: Exception, begun: asyncio.Event) -> str | None:
        """Keep the task; returns when it is done, or None when it must end. Raises TaskGivenUpError."""
        match error:
            case RunnerStopped():
                if not await self._outbox.requeue_after_death(attempt):
                    raise TaskGivenUpError(GIVEN_UP_MESSAGE)
                return "it is back"
            case ModelNotLoaded():
                back, kept = "it is", await self._outbox.requeue(attempt, str(error), with_backoff=False)
            case StorageUnavailable():
                back, kept = "it is back", await self._outbox.requeue(attempt, str(error), with_backoff=True)
            case TimeoutError() if self._outbox.has_blocked_attempts() and not begun.is_set():
                reason = "the task waited too long for its turn"
                back, kept = "it comes", await self._outbox.requeue(attempt, reason, with_backoff=False)
            case _:
                return None
        return back if kept else None

    async def _work(self, attempt: Attempt, place: Place, reading: asyncio.Task[_ReadImage]) -> _Result:
        task = attempt.task
        deadline_s = time.monotonic() + self._settings.request_timeout_s
        outcome: Outcome = "failed"
        try:
            read = await reading
            outcome = "late"
            found, inference_ms = await self._find(attempt, read, min(deadline_s, place.deadline_s))
            outcome = "done"
        except InferenceFailed:
            outcome = "done"  # the model has worked for it
            raise
        finally:
            place.leave(outcome)
        masks: dict[str, Results] = {str(index): [result] for index, result in enumerate(found)}
        if len(found) > 1:
            masks[UNION] = found
        with stage("encode_masks"):
            pngs = await self._pngs(list(masks.values()))
        keys = [
            mask_key(task.user_id, task.task_id, name, png, attempt_id=attempt.attempt_id)
            for name, png in zip(masks, pngs, strict=True)
        ]
        await self._outbox.begin_storing(attempt, keys)
        with stage("store"):
            urls = await asyncio.gather(*map(self._objects.upload_mask, pngs, keys))
        answers = [
            _answer(task.task_id, url, result, round(inference_ms / len(found), 1))
            for url, result in zip(urls[: len(found)], found, strict=True)
        ]
        total_ms = round(inference_ms, 1)
        response = BatchResponse(task_id=task.task_id, results=answers, total_inference_time_ms=total_ms)
        # The last mask is the union of all, or the only one.
        return _Result(response, urls[-1], keys)

    async def _find(self, attempt: Attempt, read: _ReadImage, deadline_s: float) -> tuple[Results, float]:
        try:
            return await self._segment(attempt, read.image, deadline_s)
        except FeaturesNotHeld:
            assert read.file is not None
            return await self._segment(attempt, await self._pixels(read.file, read.image.key), deadline_s)

    async def _segment(
        self, attempt: Attempt, image: DecodedImage, deadline_s: float
    ) -> tuple[Results, float]:
        is_read = False
        try:
            with stage("segment"):
                answer = await self._runner.segment(
                    image,
                    [ConceptPrompt(prompt) for prompt in attempt.task.prompts],
                    deadline_s,
                    log_ids={"request_id": attempt.request_id, "task_id": attempt.task.task_id},
                )
            is_read = True
            return answer
        finally:
            # After an error the runner may still read them.
            image.close(is_read=is_read)

    async def _pngs(self, masks: Sequence[Results]) -> list[bytes]:
        """The PNG of each mask; equal ones are encoded once: empty ones, and the union of a single one."""
        parts = [tuple(id(result) for result in mask if result.instances) for mask in masks]
        different = dict(zip(parts, masks, strict=True))
        pngs = dict(zip(different, await asyncio.gather(*map(self._png, different.values())), strict=True))
        return [pngs[part] for part in parts]

    async def _png(self, results: Results) -> bytes:
        """The PNG of the union of all instances of `results`."""
        is_large = results[0].image_width * results[0].image_height > LARGE_MASK_PX
        async with self._large_mask if is_large else contextlib.nullcontext():
            return await asyncio.to_thread(lambda: encode_png(packed_union(results), results[0].image_width))

    async def _read_image(
        self, attempt: Attempt, place: Place, claimed: asyncio.Event, begun: asyncio.Event
    ) -> _ReadImage:
        # What has begun its work never waits for a slot: a suspect waits for it, and others, which hold
        # slots, for the suspect.
        await self._wait(place)
        with place.paused():
            file, sha256 = await self._fetch(attempt.task)
            # After the claim: a repeat of a task that is done or running decodes nothing, and a death while
            # the database does not answer is not counted against a suspect.
            await claimed.wait()
        if file.is_heavy:
            place.join(self._heavy_turn)
            if not place.has_slot:
                # Heavy images wait without a slot, so that others can use it, and are fetched again.
                del file
                await self._wait(place)
                with place.paused():
                    file, sha256 = await self._fetch(attempt.task)
        return await self._decode(attempt, place, file, sha256, begun)

    async def _wait(self, place: Place) -> None:
        with stage("wait"):
            await place.wait()

    async def _fetch(self, task: Task) -> tuple[ImageFile, str]:
        """The image's file, its header parsed, and its checksum."""
        data = await self._download(task)
        max_pixels = self._settings.max_image_pixels
        return await asyncio.to_thread(lambda: (read_image_file(data, max_pixels=max_pixels), _sha256(data)))

    async def _decode(
        self, attempt: Attempt, place: Place, file: ImageFile, sha256: str, begun: asyncio.Event
    ) -> _ReadImage:
        # From here to the masks, an image may kill a process.
        noted_sha256 = sha256 if attempt.suspect else None
        async with asyncio.timeout(place.deadline_s - time.monotonic()):
            may_begin = await self._outbox.begin_work(attempt, noted_sha256, is_long=file.is_heavy)
        if not may_begin:
            raise ModelNotLoaded("the server is being stopped")
        begun.set()
        if self._runner.may_hold(sha256):
            size = viewed_size((file.width, file.height), file.orientation)
            return _ReadImage(DecodedImage(None, *size, key=sha256), file)
        return _ReadImage(await self._pixels(file, sha256))

    async def _pixels(self, file: ImageFile, sha256: str | None) -> DecodedImage:
        with stage("decode"):
            return replace(await self._decoders.decode(file, self._runner.max_stored_px), key=sha256)

    async def _download(self, task: Task) -> bytes:
        with stage("fetch"):
            return await self._objects.download_image(
                task.source_image_url, task.user_id, self._settings.max_image_bytes
            )

    def _metadata(self, response: BatchResponse, prompts: tuple[str, ...]) -> dict[str, object]:
        return {
            "model_version": self._model_version,
            "inference_time_ms": response.total_inference_time_ms,
            "confidence": max(result.confidence for result in response.results),
            "prompts": list(prompts),
            "results": [result.model_dump(mode="json") for result in response.results],
        }

    def _replay(self, stored: StoredResult, task: Task) -> BatchResponse:
        """The answer of a task that is done.

        Raises `TaskMismatchError` when its row holds another task's answer, or no longer what this server
        wrote: users may write to their own rows, and their text is not returned as our answer.
        """
        if stored.metadata.get("prompts") != list(task.prompts):
            raise TaskMismatchError("this task is done already, for other prompts")
        answer = {
            "task_id": stored.task_id,
            "results": stored.metadata.get("results"),
            "total_inference_time_ms": stored.metadata.get("inference_time_ms"),
        }
        try:
            response = BatchResponse.model_validate(answer)
        except ValidationError:
            response = None
        if response is None or not self._is_ours(response, stored.mask_url, task):
            raise TaskMismatchError("this task is done already, but its row no longer holds the result")
        return response

    def _is_ours(self, response: BatchResponse, mask_url: str, task: Task) -> bool:
        """Whether a stored answer is whole, and its masks are this task's."""
        urls = [mask_url, *(result.mask_url for result in response.results)]
        return (
            len(response.results) == len(task.prompts)
            and all(
                result.task_id == task.task_id and set(result.labels) <= {prompt}
                for result, prompt in zip(response.results, task.prompts, strict=True)
            )
            and all(self._objects.holds_mask(url, task.user_id, task.task_id) for url in urls)
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


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _answer(
    task_id: str, mask_url: str, result: PredictResult | UnionResult, inference_ms: float
) -> PredictResponse:
    instances = [
        InstanceModel(
            label=result.prompt,
            score=round(instance.score, SCORE_DIGITS),
            box=tuple(round(side, BOX_DIGITS) for side in instance.box),
            area=instance.area_px,
        )
        for instance in result.instances
    ]
    return PredictResponse(
        task_id=task_id,
        mask_url=mask_url,
        labels=[result.prompt] if instances else [],
        inference_time_ms=inference_ms,
        confidence=round(result.confidence, SCORE_DIGITS),
        instances=instances,
        image_width=result.image_width,
        image_height=result.image_height,
    )


def _labels(response: BatchResponse) -> list[str]:
    """The prompts that were found, each once, in their order."""
    return list(dict.fromkeys(label for result in response.results for label in result.labels))
