"""From results to the forms of an answer: files to store, and masks inside the answer.

The work is done in threads; of large images and of many instances one after another.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

from contract import CocoRle
from outputs.coco import coco_document
from outputs.coco_rle import coco_rle
from outputs.instance_png import instance_png
from outputs.label_map import label_map_png
from outputs.mask_png import encode_png
from outputs.polygons import polygons
from sam3_runner.instances import packed_union
from sam3_runner.metrics import stage
from segmentation import with_masks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from contract.options import TaskOptions
    from sam3_runner.instances import Instance, PredictResult, Results
    from segmentation import Found, Pixels

LARGE_MASK_PX = 2**24
"""Larger masks are encoded one at a time in a worker: each needs 1.3 bytes a pixel and the file."""
MAX_INLINE_BYTES = 4 * 2**20
"""Of all masks inside one answer, as JSON: more are left out. As polygons they take 0.1 s of the event loop
twice, for the stored answer and for the HTTP one; as RLE 6 ms and less (4.8 and 4.1 MiB, 2 x AMD EPYC)."""

UNION = "union"


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A file of a result.

    Attributes:
        name: of it in the answer: a number of a prompt, `union`, `instance-N`, or an output.
        suffix: of its key; the content type follows from it.
    """

    name: str
    content: bytes
    suffix: str = "png"


def numbered(results: Sequence[PredictResult]) -> Iterator[tuple[int, Instance]]:
    """All instances with their numbers in the answer, from 1."""
    return enumerate(chain.from_iterable(result.instances for result in results), 1)


class Renderer:
    """Renders the results of one API worker."""

    def __init__(self) -> None:
        self._large_mask = asyncio.Lock()
        # One core of a worker at most is busy with further forms, which may take seconds.
        self._further_form = asyncio.Lock()

    async def files(self, found: Found, options: TaskOptions, file_name: str) -> list[OutputFile]:
        """The masks of the prompts and their union, then the files that the options ask for.

        Args:
            found: refined.
            options: of the task.
            file_name: of the image, for COCO.
        """
        results = found.results
        masks = {str(index): cast("Results", [result]) for index, result in enumerate(results)}
        if len(results) > 1:
            masks[UNION] = results
        with stage("encode_masks"):
            pngs = await self.pngs(list(masks.values()))
        files = [OutputFile(name, png) for name, png in zip(masks, pngs, strict=True)]
        if options.needs_files:
            with stage("render"):
                async with self._further_form:
                    files += await _further_files(found, options, file_name)
        return files

    async def segmentations(self, results: Results, options: TaskOptions) -> list[Any] | None:
        """The mask of each instance for the answer, in the order of the numbers; None: none, or too many."""
        if options.segmentation is None:
            return None
        with stage("render"):
            async with self._further_form:
                return await _inline_masks(with_masks(results), options)

    async def pngs(self, masks: Sequence[Results]) -> list[bytes]:
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


async def _further_files(found: Found, options: TaskOptions, file_name: str) -> list[OutputFile]:
    results = with_masks(found.results)
    files = []
    if options.asks_for("instances"):
        for number, instance in numbered(results):
            # A call each: a request that ends meanwhile ends the work.
            png = await asyncio.to_thread(instance_png, instance.mask)
            files.append(OutputFile(f"instance-{number}", png))
    if options.asks_for("label_map"):
        files.append(OutputFile("label_map", await asyncio.to_thread(label_map_png, results)))
    if options.asks_for("overlay"):
        assert found.preview is not None
        jpeg = await asyncio.to_thread(_overlay, found.preview, results)
        files.append(OutputFile("overlay", jpeg, "jpg"))
    if options.asks_for("coco"):
        document = await asyncio.to_thread(_coco_json, results, file_name)
        files.append(OutputFile("coco", document, "json"))
    return files


def _overlay(preview: Pixels, results: Sequence[PredictResult]) -> bytes:
    from PIL import Image  # noqa: PLC0415 - only for overlays: API workers decode no image

    from outputs.overlay import overlay_jpeg  # noqa: PLC0415

    return overlay_jpeg(Image.fromarray(preview), results)


def _coco_json(results: Sequence[PredictResult], file_name: str) -> bytes:
    return json.dumps(coco_document(results, file_name=file_name), separators=(",", ":")).encode()


async def _inline_masks(results: Sequence[PredictResult], options: TaskOptions) -> list[Any] | None:
    masks, size_bytes = [], 0
    for result in results:
        for instance in result.instances:
            mask, mask_bytes = await asyncio.to_thread(_inline_mask, instance, result, options)
            masks.append(mask)
            size_bytes += mask_bytes
            if size_bytes > MAX_INLINE_BYTES:
                return None
    return masks


def _inline_mask(instance: Instance, result: PredictResult, options: TaskOptions) -> tuple[Any, int]:
    """The mask for the answer, and the size of its JSON in bytes."""
    if options.segmentation == "coco_rle":
        rle = CocoRle(**coco_rle(instance.mask, result.image_width, result.image_height))
        return rle, len(rle.counts)
    rings = polygons(instance.mask, options.polygon_tolerance)
    return rings, len(json.dumps(rings))
