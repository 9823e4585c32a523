"""The one path of a task: claim the row, fetch the image, segment it, store the masks, settle the row.

The row is the result and the HTTP answer a courtesy: once begun, the work goes on whether or not the
caller still listens, and a claimed row ends as `done` or `error`; what a killed server or an absent
database left behind is finished in the background.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from contract import (
    BatchResponse,
    Failure,
    InstanceModel,
    OverloadedError,
    PredictResponse,
    TaskMismatchError,
)
from results import ResultsError, StoredResult, Task
from sam3_runner import ModelNotLoaded, PromptTooLong
from sam3_runner.images import decode_image, encode_png, squash
from sam3_runner.instances import union_mask
from sam3_runner.prompts import CONTEXT_TOKENS, PromptTokenizer
from storage import mask_key

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from contract import BatchRequest, PredictRequest
    from results import Claim, Outbox
    from sam3_runner import PredictResult
    from sam3_runner.checkpoint import Checkpoint
    from sam3_runner.client import RunnerClient
    from sam3_runner.images import SquareImage
    from settings import Settings
    from storage import ObjectStore

logger = logging.getLogger("bentoml.sam3")

POLL_S = 0.5
"""How often a worker looks for what was left behind on this machine."""
STALE_POLL_S = 60.0
"""How often it looks for what another machine left behind that may never come back."""
DRAIN_S = 8.0
"""At a stop, the time to tell the database what it has not been told: most hosts kill after ten."""

IMAGE_SLOTS = 4
"""Images that a worker holds as bytes or pixels at once: up to 150 MB each at 50 megapixels."""

UNION = "union"
# What is beyond them is noise of float32; shorter answers read better.
SCORE_DIGITS = 4
BOX_DIGITS = 2


class Pipeline:
    """Runs the tasks of one API worker.

    Args:
        settings: limits and times.
        checkpoint: tells the model's input size and tokenizer.
        objects: images in, masks out.
        rows: the tasks' rows, behind the file that loses none.
        runner: the model.
        model_version: written to the row.
    """

    def __init__(
        self,
        settings: Settings,
        checkpoint: Checkpoint,
        *,
        objects: ObjectStore,
        rows: Outbox,
        runner: RunnerClient,
        model_version: str,
    ) -> None:
        self._settings = settings
        self._tokenizer = PromptTokenizer(checkpoint.tokenizer_file)
        self._input_side_px = checkpoint.input_side_px
        self._objects = objects
        self._rows = rows
        self._runner = runner
        self._model_version = model_version
        self._image_slots = asyncio.Semaphore(IMAGE_SLOTS)
        self._running: set[asyncio.Task[BatchResponse]] = set()
        self._background: asyncio.Task[None] | None = None

    async def run(self, request: PredictRequest | BatchRequest) -> BatchResponse:
        """Do the task, or give its stored result when it is done already.

        Raises `Failure`, and nothing else.
        """
        try:
            self._check_tokens(request)
            await self._check_capacity()
        except Exception as error:  # every error is a failure to the caller; Failure.of knows them all
            raise Failure.of(error) from error
        task = Task(
            task_id=str(request.task_id),
            user_id=request.user_id,
            source_image_url=request.image_url,
            prompts=tuple(request.texts),
        )
        # Shielded: a caller that hangs up ends its request, not the task.
        return await asyncio.shield(self._start(task, self._rows.claim(task)))

    def start(self) -> None:
        """Begin to finish what was left behind; needs the event loop that serves."""
        self._background = asyncio.create_task(self._finish_left_behind())

    async def close(self) -> None:
        """Let the running tasks end, then close the stores."""
        if self._background is not None:
            # What it was telling the rows, it tells them again: at the drain, or after the next start.
            self._background.cancel()
        if self._running:
            logger.info("finishing %d tasks before the stop", len(self._running))
            await asyncio.wait(self._running, timeout=self._settings.request_timeout_s)
        await self._rows.drain(DRAIN_S)
        await self._rows.close()
        await self._objects.close()

    def _check_tokens(self, request: PredictRequest | BatchRequest) -> None:
        for name, text in request.texts_by_field.items():
            tokens = self._tokenizer.count(text)
            if tokens > CONTEXT_TOKENS:
                raise PromptTooLong(f"{name}: has {tokens} tokens; the model reads {CONTEXT_TOKENS}")

    async def _check_capacity(self) -> None:
        """Refuse before anything is claimed, so that the row stays as it was for the next try."""
        status = await self._runner.status()
        if status.state != "ok":
            raise ModelNotLoaded(status.detail or "the model is loading")
        # Last: nothing may wait between this check and the start of the work, or a burst slips through.
        if len(self._running) >= self._settings.max_in_flight:
            raise OverloadedError(f"{len(self._running)} requests are in flight; try again later")

    def _start(
        self, task: Task, claiming: Coroutine[None, None, Claim | StoredResult]
    ) -> asyncio.Task[BatchResponse]:
        running = asyncio.create_task(self._run(task, claiming))
        self._running.add(running)
        running.add_done_callback(self._running.discard)
        running.add_done_callback(_heard)
        return running

    async def _finish_left_behind(self) -> None:
        """Tell the rows what they have not been told, and do again what a killed process had begun."""
        look_for_stale_s = time.monotonic() + STALE_POLL_S
        while True:
            try:
                await self._rows.deliver_due()
                if await self._do_again():
                    continue
                if time.monotonic() > look_for_stale_s:
                    look_for_stale_s = time.monotonic() + STALE_POLL_S
                    await self._rows.end_stale()
            except Exception:
                # Whatever it was, the next look may do better; without this loop tasks would be lost.
                logger.exception("what was left behind could not be finished")
            await asyncio.sleep(POLL_S)

    async def _do_again(self) -> bool:
        """One task at a time: one that kills the server takes none of the others with it for long."""
        if (await self._runner.status()).state != "ok":
            return False
        attempt = await self._rows.take_unfinished()
        if attempt is None:
            return False
        logger.info("task %s is begun again", attempt.task.task_id)
        try:
            await asyncio.shield(self._start(attempt.task, self._rows.claim_again(attempt)))
        except Failure as failure:
            logger.warning("task %s, begun again, met %s", attempt.task.task_id, failure.code)
        return True

    async def _run(self, task: Task, claiming: Coroutine[None, None, Claim | StoredResult]) -> BatchResponse:
        # Begun with the claim, not after it: neither the row nor the image needs to wait for the other.
        fetching = asyncio.create_task(self._fetch(task))
        fetching.add_done_callback(_heard)
        try:
            claim = await claiming
            if isinstance(claim, StoredResult):
                return _replay(claim, list(task.prompts))
            return await self._settle(claim, task, fetching)
        except Exception as error:  # every error is a failure to the caller; Failure.of knows them all
            raise Failure.of(error) from error
        finally:
            fetching.cancel()

    async def _settle(self, claim: Claim, task: Task, fetching: asyncio.Task[SquareImage]) -> BatchResponse:
        """Do the work and end the claimed row. The only place that does."""
        try:
            async with asyncio.timeout(self._settings.request_timeout_s):
                response, mask_url = await self._work(task, fetching)
            metadata = self._metadata(response, task.prompts)
        except Exception as error:  # whatever it is, the row must end
            failure = Failure.of(error)
            if failure.code == "INTERNAL_ERROR":
                logger.exception("task %s failed", task.task_id)
            await self._end_without_result(claim, failure)
            raise
        await self._rows.update_result(
            task.task_id, mask_url, _labels(response), metadata, attempt_id=claim.attempt_id
        )
        return response

    async def _end_without_result(self, claim: Claim, failure: Failure) -> None:
        """End the row as `error`, or give it back when the runner was only being started anew."""
        try:
            if failure.code == "MODEL_NOT_LOADED":
                await self._rows.update_status(claim.task_id, "pending", attempt_id=claim.attempt_id)
                return
            await self._rows.update_status(
                claim.task_id, "error", attempt_id=claim.attempt_id, error_message=failure.message
            )
        except ResultsError as error:
            logger.error(  # noqa: TRY400 - the sentence says it all
                "task %s failed with %s, and its row could not be told: %s",
                claim.task_id,
                failure.code,
                error,
            )

    async def _work(self, task: Task, fetching: asyncio.Task[SquareImage]) -> tuple[BatchResponse, str]:
        """The response, and the URL of the mask that stands for the whole task."""
        deadline_s = time.monotonic() + self._settings.request_timeout_s
        found, inference_ms = await self._runner.segment(await fetching, list(task.prompts), deadline_s)
        masks = [(str(index), [result]) for index, result in enumerate(found)]
        if len(found) > 1:
            masks.append((UNION, found))
        urls = await asyncio.gather(*(self._store_mask(task, name, results) for name, results in masks))
        answers = [
            _answer(task.task_id, url, result, round(inference_ms / len(found), 1))
            for url, result in zip(urls[: len(found)], found, strict=True)
        ]
        total_ms = round(inference_ms, 1)
        response = BatchResponse(task_id=task.task_id, results=answers, total_inference_time_ms=total_ms)
        # The last is the union of all, or the only one.
        return response, urls[-1]

    async def _fetch(self, task: Task) -> SquareImage:
        async with self._image_slots:
            data = await self._objects.download_image(
                task.source_image_url, task.user_id, self._settings.max_image_bytes
            )
            return await asyncio.to_thread(self._decode, data)

    def _decode(self, data: bytes) -> SquareImage:
        return squash(decode_image(data, max_pixels=self._settings.max_image_pixels), self._input_side_px)

    async def _store_mask(self, task: Task, name: str, found: list[PredictResult]) -> str:
        png = await asyncio.to_thread(lambda: encode_png(union_mask(found)))
        return await self._objects.upload_mask(png, mask_key(task.user_id, task.task_id, name, png))

    def _metadata(self, response: BatchResponse, prompts: tuple[str, ...]) -> dict[str, object]:
        return {
            "model_version": self._model_version,
            "inference_time_ms": response.total_inference_time_ms,
            "confidence": max(result.confidence for result in response.results),
            "prompts": list(prompts),
            "results": [result.model_dump(mode="json") for result in response.results],
        }


def _heard(ended: asyncio.Task[Any]) -> None:
    """Read the exception, or asyncio complains when nobody waits for it any more."""
    if not ended.cancelled():
        ended.exception()


def _answer(task_id: str, mask_url: str, result: PredictResult, inference_ms: float) -> PredictResponse:
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


def _replay(stored: StoredResult, prompts: list[str]) -> BatchResponse:
    """The answer of a task that is done. Raises `TaskMismatchError` when its row holds another one's."""
    if stored.metadata.get("prompts") != prompts:
        raise TaskMismatchError("this task is done already, for other prompts")
    answer = {
        "task_id": stored.task_id,
        "results": stored.metadata.get("results"),
        "total_inference_time_ms": stored.metadata.get("inference_time_ms"),
    }
    try:
        return BatchResponse.model_validate(answer)
    except ValidationError:
        # Users may write to their own rows.
        raise TaskMismatchError("this task is done already, but its row no longer holds the result") from None
