"""The answer of a task: built from results, fitted into its row, and read from it again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pydantic import ValidationError

from contract import (
    AnswerFacts,
    BatchResponse,
    InstanceModel,
    ModelFacts,
    OutputUrls,
    PredictResponse,
    SettingsModel,
    TaskMismatchError,
)
from rendering import UNION
from sam3_runner.instances import SCORE_THRESHOLD, Instance
from storage import ImageUrlForbidden, ObjectNotFound, ObjectTooLarge

if TYPE_CHECKING:
    from collections.abc import Mapping

    from contract.options import TaskOptions
    from results import StoredResult, Task
    from sam3_runner.instances import PromptResult, Results
    from sam3_runner.serving.engine import EngineStatus
    from storage import ObjectStore

MAX_METADATA_BYTES: Final = 256 * 1024
"""Of a row's metadata, as JSON. 200 instances take 23 KB, with a PNG each 66 KB; ten such prompts 234 and
667 KB. A message of Supabase Realtime holds 1 MB."""
MAX_ANSWER_BYTES: Final = 32 * 2**20
"""Of a stored answer: far more than the longest one."""
MASKS: Final[Any] = {"results": {"__all__": {"instances": {"__all__": {"segmentation"}}}}}
"""The masks inside an answer, for pydantic's `exclude`."""
ANSWER: Final = "answer"
"""Name of the file of an answer that does not fit into its row."""

# More digits would be noise of float32.
SCORE_DIGITS = 4
BOX_DIGITS = 2
_PROMPTS, _VERSION = "prompts", "model_version"
FACTS = tuple(AnswerFacts.model_fields)
"""Fields of the row that are those of the answer."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What an answer says beside its results.

    Attributes:
        model: that answered.
        stages_s: times of the request's stages.
        inference_ms: of the model's pass, or of all passes of an image with tiles.
        tiles: that were segmented besides the whole image.
    """

    model: EngineStatus
    version: str
    stages_s: Mapping[str, float]
    inference_ms: float
    tiles: int = 0


def build_answer(
    task: Task,
    options: TaskOptions,
    results: Results,
    *,
    urls: Mapping[str, str],
    segmentations: list[Any] | None,
    facts: Facts,
) -> BatchResponse:
    """The answer of a task.

    Args:
        task: that was done.
        options: of the task.
        results: one a prompt, refined.
        urls: of the files by their names.
        segmentations: of each instance, in the order of the numbers; None: none.
        facts: beside the results.
    """
    answers, first = [], 1
    share_ms = round(facts.inference_ms / len(results), 1)
    for index, result in enumerate(results):
        instances = _instances(result, first, urls, segmentations)
        answers.append(_prompt_answer(task.task_id, urls[str(index)], result, instances, share_ms))
        first += len(instances)
    is_cut = options.segmentation is not None and segmentations is None
    return BatchResponse(
        task_id=task.task_id,
        results=answers,
        total_inference_time_ms=round(facts.inference_ms, 1),
        outputs=_output_urls(urls),
        model=model_facts(facts.model, facts.version),
        timings_ms={name: round(seconds * 1000, 1) for name, seconds in facts.stages_s.items()},
        settings=settings_of(options, len(results), facts.tiles),
        left_out=["segmentation"] if is_cut else None,
    )


def mask_url_of(response: BatchResponse, urls: Mapping[str, str]) -> str:
    """The mask of the row: the union of all prompts, or of the only one."""
    return urls[UNION] if UNION in urls else response.results[0].mask_url


def fitted_metadata(
    response: BatchResponse, task: Task, version: str
) -> tuple[dict[str, object], bytes | None]:
    """The row's metadata, below `MAX_METADATA_BYTES`, and the whole answer as JSON unless all of it fits."""
    has_masks = any(found.segmentation is not None for each in response.results for found in each.instances)
    document = _json_of(response) if has_masks else None
    if document is not None and len(document) > MAX_METADATA_BYTES:
        # Megabytes of masks are not converted only to be left out: it would take a second of the event loop.
        left_out = [*(response.left_out or ()), "segmentation"]
        metadata = _metadata_of(response, task, version, exclude=MASKS) | {"left_out": left_out}
        _fit(metadata)
        return metadata, document
    metadata = _metadata_of(response, task, version)
    if not _fit(metadata):
        return metadata, None
    return metadata, document or _json_of(response)


def _json_of(response: BatchResponse) -> bytes:
    return response.model_dump_json(exclude_none=True).encode()


def _metadata_of(
    response: BatchResponse, task: Task, version: str, exclude: Mapping[str, Any] | None = None
) -> dict[str, object]:
    answer = response.model_dump(mode="json", exclude_none=True, exclude=exclude)
    facts: dict[str, object] = {name: answer[name] for name in FACTS if name in answer}
    return {
        _VERSION: version,
        "inference_time_ms": response.total_inference_time_ms,
        "confidence": max(result.confidence for result in response.results),
        _PROMPTS: list(task.prompts),
        "results": answer["results"],
        **({"options": task.options} if task.options else {}),
        **facts,
    }


def _fit(metadata: dict[str, object]) -> bool:
    """Leave out of a row's metadata what exceeds `MAX_METADATA_BYTES`, and name it. False: all of it fits.

    First the masks inside the answer are left out, then the instances.
    """
    if _json_bytes(metadata) <= MAX_METADATA_BYTES:
        return False
    results: Any = metadata["results"]
    left_out: list[str] = [*_texts(metadata.get("left_out"))]
    if any("segmentation" in instance for result in results for instance in result["instances"]):
        for instance in (instance for result in results for instance in result["instances"]):
            instance.pop("segmentation", None)
        left_out.append("segmentation")
    if _json_bytes(metadata) > MAX_METADATA_BYTES:
        for result in results:
            result["instances"] = []
        left_out.append("instances")
    metadata["left_out"] = left_out
    return True


async def read_answer(stored: StoredResult, task: Task, objects: ObjectStore) -> BatchResponse:
    """The answer of a task that is done.

    Raises `TaskMismatchError` when its row holds another task's answer, or no longer what this server
    wrote: users may write to their own rows, and their text is not returned as our answer.
    """
    metadata = stored.metadata
    if metadata.get(_PROMPTS) != list(task.prompts):
        raise TaskMismatchError("this task is done already, for other prompts")
    if metadata.get("options", "") != task.options:
        raise TaskMismatchError("this task is done already, with other options")
    try:
        response = await _stored_answer(stored, task, objects)
    except (ValidationError, ImageUrlForbidden, ObjectNotFound, ObjectTooLarge):
        response = None
    if response is None or not _is_ours(response, stored.mask_url, task, objects):
        raise TaskMismatchError("this task is done already, but its row no longer holds the result")
    return response


async def _stored_answer(stored: StoredResult, task: Task, objects: ObjectStore) -> BatchResponse | None:
    metadata = stored.metadata
    url = metadata.get("answer_url")
    if url is not None:
        if not isinstance(url, str) or not objects.holds_mask(url, task.user_id, task.task_id):
            return None
        text = await objects.download_answer(url, task.user_id, task.task_id, MAX_ANSWER_BYTES)
        return BatchResponse.model_validate_json(text)
    answer = {
        "task_id": stored.task_id,
        "results": metadata.get("results"),
        "total_inference_time_ms": metadata.get("inference_time_ms"),
    }
    return BatchResponse.model_validate(answer | {name: metadata.get(name) for name in FACTS})


def _is_ours(response: BatchResponse, mask_url: str, task: Task, objects: ObjectStore) -> bool:
    """Whether a stored answer is whole, and its files are this task's."""
    urls = [mask_url]
    for result in response.results:
        urls += [result.mask_url, *(found.mask_url for found in result.instances if found.mask_url)]
    if response.outputs is not None:
        urls += response.outputs.model_dump(exclude_none=True).values()
    return (
        len(response.results) == len(task.prompts)
        and response.task_id == task.task_id
        and all(
            result.task_id == task.task_id
            and {*result.labels, *(found.label for found in result.instances)} <= {prompt}
            for result, prompt in zip(response.results, task.prompts, strict=True)
        )
        and all(objects.holds_mask(url, task.user_id, task.task_id) for url in urls)
    )


def model_facts(status: EngineStatus, version: str) -> ModelFacts | None:
    """Which model answered; None where no runner has said it yet."""
    if status.checkpoint is None or status.weights_sha256 is None:
        return None
    return ModelFacts(checkpoint=status.checkpoint, sha256=status.weights_sha256, version=version)


def settings_of(options: TaskOptions, prompts: int, tiles: int) -> SettingsModel:
    """The settings that applied to an answer of so many prompts and tiles."""
    own = [options.threshold_of(index) for index in range(prompts)]
    thresholds = [SCORE_THRESHOLD if each is None else each for each in own]
    request = SCORE_THRESHOLD if options.score_threshold is None else options.score_threshold
    return SettingsModel(
        outputs=["mask", *(name for name in options.outputs if name != "mask")],
        tiles=tiles or None,
        score_threshold=request,
        score_thresholds=thresholds if {*thresholds} != {request} else None,
        nms_iou=options.nms_iou,
        max_instances=options.max_instances,
        min_area=options.min_area or None,
        fill_holes=options.fill_holes or None,
        remove_islands=options.remove_islands or None,
        segmentation=options.segmentation,
        polygon_tolerance=options.polygon_tolerance if options.segmentation == "polygons" else None,
    )


def _instances(
    result: PromptResult,
    first: int,
    urls: Mapping[str, str],
    segmentations: list[Any] | None,
) -> list[InstanceModel]:
    found = []
    for number, instance in enumerate(result.instances, first):
        url = urls.get(f"instance-{number}")
        mask = instance.mask if isinstance(instance, Instance) else None
        x0, y0, x1, y1 = (round(side, BOX_DIGITS) for side in instance.box)
        found.append(
            InstanceModel.model_construct(
                label=result.prompt,
                score=round(instance.score, SCORE_DIGITS),
                box=(x0, y0, x1, y1),
                area=instance.area_px,
                number=number,
                # Not validated again: of many points that takes longer than all else.
                segmentation=None if segmentations is None else segmentations[number - 1],
                mask_url=url,
                mask_offset=(mask.left, mask.top) if url is not None and mask is not None else None,
            )
        )
    return found


def _prompt_answer(
    task_id: str,
    mask_url: str,
    result: PromptResult,
    instances: list[InstanceModel],
    inference_ms: float,
) -> PredictResponse:
    return PredictResponse(
        task_id=task_id,
        mask_url=mask_url,
        labels=[result.prompt] if instances else [],
        inference_time_ms=inference_ms,
        confidence=round(result.confidence, SCORE_DIGITS),
        presence=round(result.presence, SCORE_DIGITS),
        instances=instances,
        image_width=result.image_width,
        image_height=result.image_height,
    )


def _output_urls(urls: Mapping[str, str]) -> OutputUrls | None:
    asked = {name: urls[name] for name in OutputUrls.model_fields if name in urls}
    return OutputUrls(**asked) if asked else None


def _json_bytes(metadata: dict[str, object]) -> int:
    return len(json.dumps(metadata, ensure_ascii=False).encode())


def _texts(value: object) -> list[str]:
    return [each for each in value if isinstance(each, str)] if isinstance(value, list) else []
