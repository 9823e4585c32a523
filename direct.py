"""The path of a direct request: an image in its body, the answer in its answer; no store, no row.

It passes the same admission, decoders and model as tasks do. It is no attempt: when a process dies under it,
it is answered with 503 and not tried again. It does not run beside a suspect, whose deaths are counted.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from typing import TYPE_CHECKING, Final
from uuid import uuid4

from admission import Place, cost_of
from contract import CocoRle, Failure
from contract.direct import DirectAnswer, DirectInstance
from contract.options import PromptOptions, TaskOptions
from observability.log_lines import log_ids
from observability.metrics import DIRECT_REQUESTS
from outputs.coco_rle import coco_rle
from outputs.mask_png import encode_png
from sam3_runner.images.tiles import max_tiles
from sam3_runner.instances import PredictResult, packed_union
from sam3_runner.metrics import collect_request_s
from sam3_runner.prompts import VISUAL
from segmentation import query_of, with_masks
from task_answer import BOX_DIGITS, SCORE_DIGITS, model_facts, settings_of

if TYPE_CHECKING:
    from contract.direct import DirectRequest
    from pipeline import Pipeline
    from results import Outbox
    from sam3_runner.instances import Instance
    from segmentation import Query, ReadImage

logger = logging.getLogger(__name__)

USER: Final = "/direct"
"""Whose turns direct requests take, all together: no user_id has a slash."""


class DirectPath:
    """Serves direct requests of one API worker.

    Args:
        pipeline: whose admission, decoders and model they use.
        outbox: of the tasks.
        version: of the server, for the answer.
    """

    def __init__(self, pipeline: Pipeline, outbox: Outbox, version: str) -> None:
        self._pipeline = pipeline
        self._outbox = outbox
        self._version = version

    def find_refusal(self, deadline_ms: int | None) -> Failure | None:
        """What `run` would raise for every request, since this worker has too much to do; None if it has not.

        Without an await, for before the body is read: the request counts as one without tiles.
        """
        overloaded = self._pipeline.find_overload(Place(USER, self._pipeline.deadline_s(deadline_ms)))
        if overloaded is None:
            return None
        failure = Failure.of(overloaded)
        DIRECT_REQUESTS.labels(failure.code).inc()
        return failure

    async def run(
        self, request: DirectRequest, image: bytes, request_id: str, deadline_ms: int | None
    ) -> DirectAnswer:
        """Segment an image.

        Args:
            request: is valid by itself.
            image: the file.
            request_id: for the log.
            deadline_ms: how long the caller waits; None: `default_deadline_s`.

        Raises:
            Failure: and nothing else.
        """
        code = ""
        try:
            with log_ids(request_id=request_id):
                return await self._run(request, image, request_id, deadline_ms)
        except Exception as error:  # every error becomes a Failure
            failure = Failure.of(error)
            code = failure.code
            if code == "INTERNAL_ERROR" and failure is not error:
                logger.exception("a direct request failed (request %s)", request_id)
            raise failure from error
        finally:
            DIRECT_REQUESTS.labels(code).inc()

    async def _run(
        self, request: DirectRequest, image: bytes, request_id: str, deadline_ms: int | None
    ) -> DirectAnswer:
        pipeline, segmenter, stages_s = self._pipeline, self._pipeline.segmenter, collect_request_s()
        texts = {} if request.prompt is None else {"prompt": request.prompt}
        cost = cost_of(1, max_tiles(request.tiles))
        place, work_id = Place(USER, pipeline.deadline_s(deadline_ms), cost=cost), str(uuid4())
        await pipeline.admit(texts, place)
        pipeline.admission.begin(place)
        try:
            query, log_fields = _query_of(request), {"request_id": request_id, "task_id": "-"}
            async with asyncio.timeout(pipeline.timeout_s):
                reading = self._read(query, image, place, work_id)
                found = await segmenter.segment(reading, query, place, place.deadline_s, log_fields)
                found = await segmenter.refine(found, query.options)
                [result] = with_masks(found.results)
                data = [await _instance(each, result, request.mask_format) for each in result.instances]
        finally:
            pipeline.admission.end(place)
            await self._outbox.end_other_work(work_id)
        return DirectAnswer(
            data=data,
            presence=round(result.presence, SCORE_DIGITS),
            image_width=result.image_width,
            image_height=result.image_height,
            model=model_facts(pipeline.known_status, self._version),
            timings_ms={name: round(seconds * 1000, 1) for name, seconds in stages_s.items()},
            settings=settings_of(query.options.model_copy(update={"segmentation": None}), 1, found.tiles),
        )

    async def _read(self, query: Query, image: bytes, place: Place, work_id: str) -> ReadImage:
        segmenter = self._pipeline.segmenter
        await place.wait()
        file, sha256 = await segmenter.read_file(image, query)
        if file.is_heavy:
            place.join(self._pipeline.heavy_turn)
            await place.wait()
        place.correct_cost(cost_of(1, segmenter.tiles_of(file, query)))
        # From here to the masks, an image may kill a process.
        async with asyncio.timeout(place.deadline_s - time.monotonic()):
            await self._outbox.begin_other_work(work_id)
        return await segmenter.decode(file, sha256, query)


def _query_of(request: DirectRequest) -> Query:
    fields = {name: getattr(request, name) for name in type(request).model_fields}
    own = PromptOptions.model_construct(boxes=request.boxes, labels=request.labels)
    options = TaskOptions.model_construct(
        **{name: fields[name] for name in TaskOptions.model_fields if name in fields},
        segmentation="coco_rle",  # each instance's mask is needed
        prompts=[own],
    )
    return query_of([request.prompt or VISUAL], options, is_batch=False)


async def _instance(instance: Instance, result: PredictResult, mask_format: str) -> DirectInstance:
    # A call each: a request that ends meanwhile ends the work.
    mask = await asyncio.to_thread(_rle if mask_format == "rle" else _png, instance, result)
    x0, y0, x1, y1 = (round(side, BOX_DIGITS) for side in instance.box)
    return DirectInstance(mask=mask, box=(x0, y0, x1, y1), score=round(instance.score, SCORE_DIGITS))


def _rle(instance: Instance, result: PredictResult) -> CocoRle:
    return CocoRle(**coco_rle(instance.mask, result.image_width, result.image_height))


def _png(instance: Instance, result: PredictResult) -> str:
    size = result.image_width, result.image_height
    alone = PredictResult(result.prompt, result.presence, *size, [instance])
    return base64.b64encode(encode_png(packed_union([alone]), result.image_width)).decode()
