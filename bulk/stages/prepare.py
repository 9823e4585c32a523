"""The first stage: reads a shard's pictures and decodes them to the model's squares. Knows no torch."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from bulk.errors import PictureError
from bulk.objects import open_objects, read_uri
from bulk.plan import PlanReader
from bulk.stages.background import yield_to_others
from bulk.stages.blocks import PictureState, block_of, shard_of
from sam3_runner.errors import UnsupportedImage
from sam3_runner.images.decoders import ImageDecoders
from sam3_runner.images.read import read_image_file

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from bulk.plan import Plan
    from bulk.settings import Run
    from bulk.sources import Picture
    from bulk.stages.blocks import Block
    from sam3_runner.images.image_file import ImageFile

PICTURES_AT_ONCE = 8
"""Being fetched or decoded in one process: bounds its memory to so many files of the largest size."""


class Prepare:
    """Shards in, blocks of squares out.

    Files are decoded in processes of `sam3_runner/images/decoders.py`: one that crashes its decoder, or takes
    too much memory, is one picture's error.

    Args:
        run: what to do.
        plan: of the run.
        decoders: processes that decode.
    """

    def __init__(self, run: Run, plan: Plan, decoders: int = 1) -> None:
        if run.background:
            yield_to_others()
        self._run = run
        self._plan = PlanReader(open_objects(run.folder, max_wait_s=run.max_wait_s), plan)
        self._threads = ThreadPoolExecutor(PICTURES_AT_ONCE, thread_name_prefix="fetch")
        # Decoders belong to an event loop; Ray calls this object from a thread without one.
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="decode", daemon=True).start()
        self._decoders = ImageDecoders(side_px=run.side_px, count=decoders)

    def __call__(self, block: Block) -> Block:
        """The squares of a shard."""
        shard = shard_of(block)
        pictures = self._plan.pictures(shard)
        squares = np.zeros((len(pictures), self._run.side_px, self._run.side_px, 3), np.uint8)
        prepared = asyncio.run_coroutine_threadsafe(self._prepare_all(pictures, squares), self._loop)
        return block_of(shard, prepared.result(), squares)

    async def _prepare_all(
        self, pictures: Sequence[Picture], squares: npt.NDArray[np.uint8]
    ) -> list[PictureState]:
        slots = asyncio.Semaphore(PICTURES_AT_ONCE)

        async def prepare(picture: Picture, square: npt.NDArray[np.uint8]) -> PictureState:
            async with slots:
                state = PictureState(picture)
                try:
                    await self._prepare(state, square)
                except PictureError as error:
                    state.error = error
                return state

        return list(await asyncio.gather(*map(prepare, pictures, squares)))

    async def _prepare(self, state: PictureState, square: npt.NDArray[np.uint8]) -> None:
        started_s = time.perf_counter()
        data = await self._loop.run_in_executor(self._threads, self._fetch, state)
        fetched_s = time.perf_counter()
        try:
            await self._decode(
                read_image_file(data, max_pixels=self._run.settings.max_image_pixels), state, square
            )
        except UnsupportedImage as error:
            raise PictureError("UNSUPPORTED_IMAGE", str(error)) from error
        state.timings_ms["fetch"] = (fetched_s - started_s) * 1000
        state.timings_ms["decode"] = (time.perf_counter() - fetched_s) * 1000

    def _fetch(self, state: PictureState) -> bytes:
        data = read_uri(state.picture.image, self._run.settings.max_image_bytes, self._run.max_wait_s)
        state.size_bytes = len(data)
        state.sha256 = hashlib.sha256(data).hexdigest()
        return data

    async def _decode(self, file: ImageFile, state: PictureState, square: npt.NDArray[np.uint8]) -> None:
        decoded = await self._decoders.decode(file, max_stored_px=0)
        try:
            decoded.read_into(square)
        finally:
            decoded.close(is_read=True)
        state.width, state.height = decoded.width, decoded.height
