"""Which pictures of a run a report shows, and their overlays.

The choice depends on the rows alone, not on their order, so that a report that is made again shows the same.
"""

from __future__ import annotations

import asyncio
import hashlib
from bisect import insort
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

from bulk.errors import PictureError
from outputs.coco_rle import mask_crop
from outputs.overlay import overlay_jpeg
from sam3_runner.errors import UnsupportedImage
from sam3_runner.images.decoders import ImageDecoders
from sam3_runner.images.image_file import DEFAULT_MAX_PIXELS
from sam3_runner.images.read import read_image_file
from sam3_runner.instances import Instance, PredictResult

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bulk.rows import PictureRow

    ReadPicture = Callable[[str], bytes]
    """The bytes of a picture by its full URI; raises `PictureError`."""

SAMPLES = 12
NOTHING_FOUND = "nothing found"
"""Why one of them is shown."""
KEPT = 2 * SAMPLES
"""Of each kind: more than are shown, for those that another kind shows or that cannot be read any more."""
SIDES_PX = (640, 480, 320, 160)
"""Longest side of an overlay: the first one at which its file is small enough."""
MAX_JPEG_BYTES = 150_000
"""Twelve of them, in base64, are 2.4 MB."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture that a report shows.

    Attributes:
        why: why it was chosen.
        jpeg: its overlay.
    """

    row: PictureRow
    why: str
    jpeg: bytes


class Samples:
    """Chooses pictures of a run while its rows pass: constant memory."""

    def __init__(self) -> None:
        self._kinds = [
            _Kind("most instances", 4, lambda row: -len(row.instances)),
            _Kind("lowest scores", 3, lambda row: min(each.score for each in row.instances)),
            _Kind(NOTHING_FOUND, 1, lambda _: 0.0),
            _Kind("drawn at random", SAMPLES, lambda _: 0.0),
        ]

    def add(self, row: PictureRow) -> None:
        """Consider a picture."""
        if row.status != "done":
            return
        most, lowest, nothing, any_ = self._kinds
        for kind in (most, lowest, any_) if row.instances else (nothing, any_):
            kind.add(row)

    def draw(self, read_picture: ReadPicture) -> list[Sample]:
        """At most `SAMPLES` pictures with their overlays, no picture twice.

        A picture that is gone, or that has changed since the run, is left out; another takes its place.
        """
        # The caller's thread may have an event loop of its own, as in a notebook.
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(asyncio.run, self._draw(read_picture)).result()

    async def _draw(self, read_picture: ReadPicture) -> list[Sample]:
        decoders = ImageDecoders(side_px=SIDES_PX[0], count=1)
        drawn: list[Sample] = []
        seen: set[str] = set()
        try:
            for kind in self._kinds:
                wanted = min(len(drawn) + kind.count, SAMPLES)
                for row in kind:
                    if len(drawn) == wanted:
                        break
                    if row.image in seen:
                        continue
                    seen.add(row.image)
                    jpeg = await _overlay(row, read_picture, decoders)
                    if jpeg is not None:
                        drawn.append(Sample(row, kind.why, jpeg))
        finally:
            await decoders.close()
        return drawn


class _Kind:
    """The pictures with the lowest rank; of equal ones those with the lowest digest, as if drawn at random.

    Args:
        why: the kind's name.
        count: how many a report shows.
        rank: of a row.
    """

    def __init__(self, why: str, count: int, rank: Callable[[PictureRow], float]) -> None:
        self.why = why
        self.count = count
        self._rank = rank
        self._best: list[tuple[float, str, PictureRow]] = []

    def add(self, row: PictureRow) -> None:
        insort(self._best, (self._rank(row), _digest(row.image), row), key=lambda each: each[:2])
        del self._best[KEPT:]

    def __iter__(self) -> Iterator[PictureRow]:
        return (row for _, _, row in self._best)


def results_of(row: PictureRow) -> list[PredictResult]:
    """The results that a row was made of; `query` of an instance is its number in its prompt."""
    assert row.width is not None
    assert row.height is not None
    results = []
    for prompt in row.prompts:
        found = [each for each in row.instances if each.prompt == prompt.prompt]
        instances = [
            Instance(each.score, each.box, each.area_px, number, mask_crop(each.coco_rle))
            for number, each in enumerate(found)
        ]
        results.append(PredictResult(prompt.prompt, prompt.presence, row.width, row.height, instances))
    return results


async def _overlay(row: PictureRow, read_picture: ReadPicture, decoders: ImageDecoders) -> bytes | None:
    """The overlay of a picture; None where it cannot be drawn any more."""
    try:
        content = read_picture(row.image)
    except PictureError:
        return None
    if hashlib.sha256(content).hexdigest() != row.image_sha256:
        return None
    try:
        file = read_image_file(content, max_pixels=DEFAULT_MAX_PIXELS)
        pixels = await decoders.preview(file, SIDES_PX[0])
    except UnsupportedImage:
        return None
    return _small_jpeg(Image.fromarray(pixels), results_of(row))


def _small_jpeg(preview: Image.Image, results: Sequence[PredictResult]) -> bytes:
    """The overlay, on a smaller preview if its file is too large; at the last size it is not."""
    jpeg = overlay_jpeg(preview, results)
    for side_px in SIDES_PX[1:]:
        if len(jpeg) <= MAX_JPEG_BYTES:
            break
        preview.thumbnail((side_px, side_px))
        jpeg = overlay_jpeg(preview, results)
    return jpeg


def _digest(image: str) -> str:
    return hashlib.sha256(image.encode()).hexdigest()
