"""From an image file and prompts to results: tasks and direct requests share it.

What is fetched, claimed and stored is not known here.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from contract import BoxRefusedError
from outputs.refinement import Refinement, refine
from outputs.tile_merge import merge
from sam3_runner import BoxOutsideImage, FeaturesNotHeld, InferenceFailed
from sam3_runner.images.decoded import DecodedImage
from sam3_runner.images.exif import viewed_size
from sam3_runner.images.read import read_image_file
from sam3_runner.images.tiles import tile_windows
from sam3_runner.instances import Window
from sam3_runner.metrics import stage
from sam3_runner.prompts import VISUAL, ConceptPrompt

if TYPE_CHECKING:
    from collections.abc import Awaitable, Mapping, Sequence

    import numpy as np
    import numpy.typing as npt

    from admission import Outcome, Place
    from contract.options import TaskOptions
    from sam3_runner.base import Decoders, Runner
    from sam3_runner.images.image_file import ImageFile
    from sam3_runner.instances import PredictResult, Results

    Pixels = npt.NDArray[np.uint8]

PREVIEW_SIDE_PX = 1600
"""Longest side of the picture under an overlay."""
VIEWS_AT_ONCE = 4
"""Of one image, in the runner's queue: other requests get their turns between its tiles."""


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
class View:
    """What the model sees at once: the whole image, or a window of it.

    Attributes:
        image: its pixels, or its key alone where the runner seems to need none.
        prompts: by their indexes in the query, with exemplars in px of the window.
        window: in px of the image; None: the whole image, as it is without tiles.
    """

    image: DecodedImage
    prompts: dict[int, ConceptPrompt]
    window: Window | None = None

    @property
    def key(self) -> str:
        """Of its features."""
        assert self.image.key is not None
        return self.image.key


@dataclass(frozen=True, slots=True)
class ReadImage:
    """An image for the runner.

    Attributes:
        views: the whole image, and its tiles.
        file: kept where it may be decoded again.
    """

    views: list[View]
    file: ImageFile | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """What was found in one image.

    Attributes:
        results: one a prompt; with each instance's mask where the options need it.
        inference_ms: of the model's pass; with tiles of all passes that held one.
        preview: (rows, columns, 3) uint8, where the options ask for an overlay.
        tiles: that were segmented besides the whole image.
    """

    results: Results
    inference_ms: float
    preview: Pixels | None = None
    tiles: int = 0


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


def prompts_in(
    window: Window, size: tuple[int, int], prompts: Sequence[ConceptPrompt]
) -> dict[int, ConceptPrompt]:
    """The prompts for a window, by their indexes.

    A box counts where the window contains all of it: a part of an object is no example of it. A prompt
    without a text is left out where the window has no positive box of it.

    Args:
        window: in px of the image.
        size: width and height of the image.
        prompts: with boxes in px of the image, each with a px in it.
    """
    found = {}
    for index, prompt in enumerate(prompts):
        inside = [
            ((x0 - window.left, y0 - window.top, x1 - window.left, y1 - window.top), label)
            for (x0, y0, x1, y1), label in zip(prompt.boxes_inside(*size), prompt.labels, strict=True)
            if window.left <= x0 and window.top <= y0 and x1 <= window.right and y1 <= window.bottom
        ]
        is_whole = len(inside) == len(prompt.boxes)
        if prompt.text is not None or is_whole or any(label for _, label in inside):
            boxes, labels = tuple(box for box, _ in inside), tuple(label for _, label in inside)
            found[index] = replace(prompt, boxes=boxes, labels=labels)
    return found


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
        views = self._views(file, sha256, query)
        if all(self._runner.may_hold(view.key) for view in views):
            return ReadImage(views, file)
        is_needed_again = query.options.asks_for("overlay")
        return ReadImage(await self._with_pixels(views, file), file if is_needed_again else None)

    def tiles_of(self, file: ImageFile, query: Query) -> int:
        """How many tiles are segmented besides the whole image."""
        return len(self._views(file, "", query)) - 1

    async def segment(
        self,
        reading: Awaitable[ReadImage],
        query: Query,
        place: Place,
        deadline_s: float,
        log_ids: Mapping[str, str],
    ) -> Found:
        """Run the model on an image once it is read; then `place` gives its slot back. `refine` follows.

        Args:
            reading: waits for the slot, and decodes the image.
            query: what to find.
            place: whose slot is used. Its rate learns how that ended.
            deadline_s: of the model's answer, on the clock of `time.monotonic`.
            log_ids: fields for log lines about the request.

        Raises what `reading`, the runner and the decoders raise.
        """
        outcome: Outcome = "failed"
        try:
            read = await reading
            outcome = "late"
            found = await self._find_with_preview(read, query, min(deadline_s, place.deadline_s), log_ids)
            outcome = "done"
        except InferenceFailed:
            outcome = "done"  # the model has worked for it
            raise
        finally:
            place.leave(outcome)
        return found

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

    def _views(self, file: ImageFile, sha256: str, query: Query) -> list[View]:
        """The whole image first; without pixels."""
        size = viewed_size((file.width, file.height), file.orientation)
        side_px = self._runner.known_status.input_side_px or max(size)
        tiles = tile_windows(*size, query.options.tiles, side_px)
        if not tiles:
            image = DecodedImage(None, *size, key=sha256)
            return [View(image, dict(enumerate(query.prompts)))]
        views = []
        for window in (Window(0, 0, *size), *tiles):
            key = f"{sha256}-{window.left}-{window.top}-{window.width}-{window.height}"
            image = DecodedImage(None, window.width, window.height, key=key)
            prompts = prompts_in(window, size, query.prompts)
            if prompts:
                views.append(View(image, prompts, window))
        return views

    async def _find_with_preview(
        self, read: ReadImage, query: Query, deadline_s: float, log_ids: Mapping[str, str]
    ) -> Found:
        """Run the model, and decode the preview of an overlay meanwhile."""
        preview: asyncio.Task[Pixels] | None = None
        if query.options.asks_for("overlay"):
            assert read.file is not None
            preview = asyncio.create_task(self._preview(read.file))
        try:
            found = await self._find(read, query, deadline_s, log_ids)
            return found if preview is None else replace(found, preview=await preview)
        finally:
            if preview is not None:
                preview.cancel()
                # Of two errors the model's is raised; asyncio logs one that nobody has read.
                await asyncio.gather(preview, return_exceptions=True)

    async def _find(
        self, read: ReadImage, query: Query, deadline_s: float, log_ids: Mapping[str, str]
    ) -> Found:
        found = await self._run(read.views, query, deadline_s, log_ids)
        missing = [view for view in read.views if view.key not in found]
        if missing:
            assert read.file is not None
            with_pixels = await self._with_pixels(missing, read.file)
            found |= await self._run(with_pixels, query, deadline_s, log_ids)
        if len(read.views) == 1:
            return Found(*found[read.views[0].key])
        # Calls that shared a pass have its time, to the last digit.
        inference_ms = sum({inference_ms for _, inference_ms in found.values()})
        results = [with_masks(found[view.key][0]) for view in read.views]
        with stage("merge_tiles"):
            merged = await asyncio.to_thread(_merge, read.views, results)
        return Found(merged, inference_ms, tiles=len(read.views) - 1)

    async def _run(
        self, views: Sequence[View], query: Query, deadline_s: float, log_ids: Mapping[str, str]
    ) -> dict[str, tuple[Results, float]]:
        """The answer for each view by its key, without those whose features are not held."""
        turns = asyncio.Semaphore(VIEWS_AT_ONCE)

        async def run(view: View) -> tuple[Results, float] | None:
            is_read = False
            try:
                async with turns:
                    answer = await self._runner.segment(
                        view.image,
                        list(view.prompts.values()),
                        deadline_s,
                        with_masks=query.options.needs_masks,
                        log_ids=dict(log_ids),
                    )
                is_read = True
            except FeaturesNotHeld:
                return None
            else:
                return answer
            finally:
                # After an error the runner may still read them.
                view.image.close(is_read=is_read)

        with stage("segment"):
            calls = [asyncio.create_task(run(view)) for view in views]
            try:
                answers = await asyncio.gather(*calls)
            finally:
                await _end(calls)
                for view in views:
                    view.image.close(is_read=False)  # of calls that did not begin
        return {view.key: answer for view, answer in zip(views, answers, strict=True) if answer is not None}

    async def _with_pixels(self, views: list[View], file: ImageFile) -> list[View]:
        with stage("decode"):
            windows = [view.window for view in views if view.window is not None]
            if windows:
                images = await self._decoders.decode_windows(file, windows)
            else:
                images = [await self._decoders.decode(file, self._runner.max_stored_px)]
        return [
            replace(view, image=replace(image, key=view.key))
            for view, image in zip(views, images, strict=True)
        ]

    async def _preview(self, file: ImageFile) -> Pixels:
        with stage("preview"):
            return await self._decoders.preview(file, PREVIEW_SIDE_PX)


def _merge(views: Sequence[View], results: Sequence[list[PredictResult]]) -> list[PredictResult]:
    """The result of each prompt, from those of the whole image, which is first, and of its tiles."""
    of_tiles: dict[int, list[tuple[Window, PredictResult]]] = {index: [] for index in views[0].prompts}
    for view, found in zip(views[1:], results[1:], strict=True):
        assert view.window is not None
        for index, result in zip(view.prompts, found, strict=True):
            of_tiles[index].append((view.window, result))
    return [merge(whole, of_tiles[index]) for index, whole in zip(views[0].prompts, results[0], strict=True)]


async def _end(calls: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel those that have not ended, and wait for all."""
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


def with_masks(results: Results) -> list[PredictResult]:
    """The results of a call that asked for each instance's mask."""
    return cast("list[PredictResult]", results)


def sha256_of(data: bytes) -> str:
    """In hexadecimal."""
    return hashlib.sha256(data).hexdigest()
