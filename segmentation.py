"""From an image file and prompts to results: tasks and direct requests share it.

What is fetched, claimed and stored is not known here.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from contract import BoxRefusedError
from outputs.refinement import Refinement, refine
from sam3_runner import BoxOutsideImage, FeaturesNotHeld
from sam3_runner.images.decoded import DecodedImage
from sam3_runner.images.exif import viewed_size
from sam3_runner.images.read import read_image_file
from sam3_runner.metrics import stage
from sam3_runner.prompts import VISUAL, ConceptPrompt

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    import numpy.typing as npt

    from contract.options import TaskOptions
    from sam3_runner.base import Decoders, Runner
    from sam3_runner.images.image_file import ImageFile
    from sam3_runner.instances import PredictResult, Results

    Pixels = npt.NDArray[np.uint8]

PREVIEW_SIDE_PX = 1600
"""Longest side of the picture under an overlay."""


@dataclass(frozen=True, slots=True)
class Query:
    """What to find in an image, and what of it to keep.

    Attributes:
        prompts: for the model.
        options: of the request.
        names: of the prompts' fields, for messages about their boxes.
    """

    prompts: list[ConceptPrompt]
    options: TaskOptions
    names: list[str]


@dataclass(frozen=True, slots=True)
class ReadImage:
    """An image for the runner.

    Attributes:
        image: its pixels, or its key alone where the runner seems to need none.
        file: kept where it may be decoded again.
    """

    image: DecodedImage
    file: ImageFile | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """What was found in one image.

    Attributes:
        results: one a prompt; with each instance's mask where the options need it.
        inference_ms: of the model's pass.
        preview: (rows, columns, 3) uint8, where the options ask for an overlay.
    """

    results: Results
    inference_ms: float
    preview: Pixels | None = None


def query_of(prompts: Sequence[str], options: TaskOptions, *, is_batch: bool) -> Query:
    """The query of a task.

    Args:
        prompts: as answers name them.
        options: of the task.
        is_batch: whether the prompts' fields are those of a batch.
    """
    concepts = []
    for index, prompt in enumerate(prompts):
        own = options.of_prompt(index)
        boxes = tuple(own.boxes or ())
        concepts.append(
            ConceptPrompt(
                text=None if boxes and prompt == VISUAL else prompt,
                boxes=boxes,
                labels=tuple(bool(label) for label in own.labels or [1] * len(boxes)),
                score_threshold=options.threshold_of(index),
            )
        )
    names = [f"prompts.{index}.boxes" if is_batch else "boxes" for index in range(len(prompts))]
    return Query(concepts, options, names)


class Segmenter:
    """Runs images through the decoders and the model.

    Args:
        max_image_pixels: larger images are refused.
        runner: the model.
        decoders: of the images.
    """

    def __init__(self, *, max_image_pixels: int, runner: Runner, decoders: Decoders) -> None:
        self._max_image_pixels = max_image_pixels
        self._runner = runner
        self._decoders = decoders

    async def read_file(self, data: bytes, query: Query) -> tuple[ImageFile, str]:
        """The parsed file, and its SHA-256.

        Raises:
            UnsupportedImage: by its header.
            BoxRefusedError: a box has no px of the image.
        """
        file, sha256 = await asyncio.to_thread(
            lambda: (read_image_file(data, max_pixels=self._max_image_pixels), sha256_of(data))
        )
        size = viewed_size((file.width, file.height), file.orientation)
        for prompt, name in zip(query.prompts, query.names, strict=True):
            try:
                prompt.boxes_inside(*size)
            except BoxOutsideImage as error:
                raise BoxRefusedError(str(error).replace("boxes", name, 1)) from error
        return file, sha256

    async def decode(self, file: ImageFile, sha256: str, query: Query) -> ReadImage:
        """The image for the model: without pixels where a runner seems to hold its features."""
        if self._runner.may_hold(sha256):
            size = viewed_size((file.width, file.height), file.orientation)
            return ReadImage(DecodedImage(None, *size, key=sha256), file)
        is_needed_again = query.options.asks_for("overlay")
        return ReadImage(await self._pixels(file, sha256), file if is_needed_again else None)

    async def segment(
        self, read: ReadImage, query: Query, deadline_s: float, log_ids: Mapping[str, str]
    ) -> Found:
        """Run the model, and decode the preview of an overlay meanwhile. `refine` follows.

        Raises what the runner and the decoders raise.
        """
        preview: asyncio.Task[Pixels] | None = None
        if query.options.asks_for("overlay"):
            assert read.file is not None
            preview = asyncio.create_task(self._preview(read.file))
        try:
            results, inference_ms = await self._find(read, query, deadline_s, log_ids)
            return Found(results, inference_ms, None if preview is None else await preview)
        finally:
            if preview is not None:
                preview.cancel()
                # Of two errors the model's is raised; asyncio logs one that nobody has read.
                await asyncio.gather(preview, return_exceptions=True)

    async def refine(self, found: Found, options: TaskOptions) -> Found:
        """Refine the instances as the options say. Needs no slot of the model."""
        if not options.refines:
            return found
        refinement = Refinement(
            nms_iou=options.nms_iou,
            max_instances=options.max_instances,
            min_area_px=options.min_area,
            fill_holes_px=options.fill_holes,
            remove_islands_px=options.remove_islands,
        )
        with stage("refine"):
            refined = await asyncio.to_thread(refine, with_masks(found.results), refinement)
        return replace(found, results=refined)

    async def _find(
        self, read: ReadImage, query: Query, deadline_s: float, log_ids: Mapping[str, str]
    ) -> tuple[Results, float]:
        try:
            return await self._run(read.image, query, deadline_s, log_ids)
        except FeaturesNotHeld:
            assert read.file is not None
            pixels = await self._pixels(read.file, read.image.key)
            return await self._run(pixels, query, deadline_s, log_ids)

    async def _run(
        self, image: DecodedImage, query: Query, deadline_s: float, log_ids: Mapping[str, str]
    ) -> tuple[Results, float]:
        is_read = False
        try:
            with stage("segment"):
                answer = await self._runner.segment(
                    image,
                    query.prompts,
                    deadline_s,
                    with_masks=query.options.needs_masks,
                    log_ids=dict(log_ids),
                )
            is_read = True
            return answer
        finally:
            # After an error the runner may still read them.
            image.close(is_read=is_read)

    async def _pixels(self, file: ImageFile, sha256: str | None) -> DecodedImage:
        with stage("decode"):
            return replace(await self._decoders.decode(file, self._runner.max_stored_px), key=sha256)

    async def _preview(self, file: ImageFile) -> Pixels:
        with stage("preview"):
            return await self._decoders.preview(file, PREVIEW_SIDE_PX)


def with_masks(results: Results) -> list[PredictResult]:
    """The results of a call that asked for each instance's mask."""
    return cast("list[PredictResult]", results)


def sha256_of(data: bytes) -> str:
    """In hexadecimal."""
    return hashlib.sha256(data).hexdigest()
