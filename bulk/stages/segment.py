"""The second stage: decoders, and the model on one device. The only stage that loads torch."""

from __future__ import annotations

import asyncio
import io
import os
import sys
import threading
import time
from typing import TYPE_CHECKING, cast

from PIL import Image

from bulk.errors import ClusterUnavailable, ModelUnavailable, PictureError
from bulk.stages.background import yield_to_others
from bulk.stages.blocks import block_of, files_of, shard_of, states_of
from bulk.stages.fetch import fetch_file
from sam3_runner.errors import DecoderFailed, ModelNotLoaded, RunnerStopped, UnsupportedImage
from sam3_runner.images.decoders import ImageDecoders
from sam3_runner.images.read import read_image_file
from sam3_runner.prompts import ConceptPrompt
from sam3_runner.serving.engine import Engine, EngineConfig, SegmentRequest
from sam3_runner.serving.scheduler import SWITCH_INTERVAL_S, Scheduler

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bulk.settings import Run
    from bulk.stages.blocks import Block, PictureState
    from sam3_runner.images.decoded import DecodedImage
    from sam3_runner.images.image_file import ImageFile
    from sam3_runner.instances import PredictResult
    from sam3_runner.serving.engine import SegmentOutcome

LOADING_POLL_S = 0.05
NO_DEADLINE_S = float("inf")
DEVICE_LOST_EXIT_CODE = 3


class Segment:
    """Blocks of files in, blocks of results out. Loads the model once. Safe for threads.

    Files are decoded in processes of `sam3_runner/images/decoders.py`: one that crashes its decoder, or takes
    too much memory, is one picture's error. Pixels go from there to the device as in the server's runner.

    Args:
        run: what to do.
        decoders: processes that decode.

    Attributes:
        BLOCKS_AT_ONCE: calls at once, so that the device computes while another block is read or handed on.

    Raises:
        ModelUnavailable: the model cannot be loaded.
        ClusterUnavailable: pictures cannot be decoded here.
    """

    BLOCKS_AT_ONCE = 2

    def __init__(self, run: Run, decoders: int) -> None:
        if run.background:
            yield_to_others()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._run = run
        threshold = run.settings.score_threshold
        self._prompts = [ConceptPrompt(text, score_threshold=threshold) for text in run.settings.prompts]
        self._engine = Engine(
            EngineConfig(
                run.weights_path,
                run.device,
                cpu_threads=1,
                max_batch=run.max_batch,
                max_feature_bytes=0,
            )
        )
        # Nothing but a new process mends a device that has failed: Ray starts it, and runs the block again.
        self._engine.start(on_device_lost=lambda: os._exit(DEVICE_LOST_EXIT_CODE))
        self._wait_until_ready()
        # No caller waits for a picture with few prompts: a batch has all prompts of its pictures.
        max_pairs = run.max_batch * len(self._prompts)
        self._scheduler = Scheduler(self._engine, run.max_batch, max_pairs=max_pairs, streams=run.streams)
        self._max_stored_px = self._engine.status().max_stored_px
        # Decoders belong to an event loop; Ray calls this object from threads without one.
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="decode", daemon=True).start()
        self._decoders = ImageDecoders(side_px=run.side_px, count=decoders)
        self._own_file = _own_file()
        asyncio.run_coroutine_threadsafe(self._check_decoders(), self._loop).result()
        # Pictures that are decoded, or wait for the model: they bound the memory.
        self._slots = asyncio.Semaphore(decoders + 2 * run.streams * run.max_batch)

    def _wait_until_ready(self) -> None:
        while not self._engine.ready:
            status = self._engine.status()
            if status.state == "error":
                raise ModelUnavailable(f"the model cannot be loaded: {status.detail}")
            time.sleep(LOADING_POLL_S)

    async def _check_decoders(self) -> None:
        """Decode a picture of our own, so that no other one is blamed for the machine."""
        (await self._own_picture()).close(is_read=True)

    async def _check_model(self) -> None:
        """Segment a picture of our own, for the same reason: the device's memory may be full."""
        decoded = await self._own_picture()
        try:
            outcome = await self._outcome(decoded)
        finally:
            decoded.close(is_read=True)
        if outcome.error is not None:
            raise ClusterUnavailable(f"the model cannot work: {outcome.error}")

    async def _own_picture(self) -> DecodedImage:
        try:
            return await self._decoders.decode(self._own_file, self._max_stored_px)
        except (UnsupportedImage, DecoderFailed, OSError) as error:
            raise ClusterUnavailable(f"a machine cannot decode pictures: {error}") from error

    def __call__(self, block: Block) -> Block:
        """The results of a shard's pictures."""
        states = states_of(block)
        segmented = self._segment_all(states, files_of(block))
        asyncio.run_coroutine_threadsafe(segmented, self._loop).result()
        return block_of(shard_of(block), states)

    async def _segment_all(self, states: Sequence[PictureState], files: Sequence[bytes | None]) -> None:
        # The first error that ends the run is raised as it is, and no group of them.
        await asyncio.gather(
            *(
                self._segment(state, data)
                for state, data in zip(states, files, strict=True)
                if state.error is None
            )
        )

    async def _segment(self, state: PictureState, data: bytes | None) -> None:
        """Add the results of a picture to its state, or its error."""
        async with self._slots:
            try:
                if data is None:
                    data = await asyncio.to_thread(fetch_file, self._run, state)
                decoded = await self._decode(state, data)
                try:
                    await self._infer(state, decoded)
                finally:
                    decoded.close(is_read=True)
            except PictureError as error:
                state.error = error

    async def _decode(self, state: PictureState, data: bytes) -> DecodedImage:
        started_s = time.perf_counter()
        try:
            file = read_image_file(data, max_pixels=self._run.settings.max_image_pixels)
            decoded = await self._decoders.decode(file, self._max_stored_px)
        except UnsupportedImage as error:
            raise PictureError("UNSUPPORTED_IMAGE", str(error)) from error
        except DecoderFailed as error:
            await self._check_decoders()
            raise PictureError("UNSUPPORTED_IMAGE", str(error)) from error
        except OSError as error:  # of this machine: processes, memory or descriptors
            raise ClusterUnavailable(f"a machine cannot decode pictures: {error}") from error
        state.timings_ms["decode"] = (time.perf_counter() - started_s) * 1000
        return decoded

    async def _infer(self, state: PictureState, decoded: DecodedImage) -> None:
        outcome = await self._outcome(decoded)
        if isinstance(outcome.error, RunnerStopped | ModelNotLoaded):
            raise ClusterUnavailable(f"the model cannot work: {outcome.error}")
        if outcome.error is not None:
            await self._check_model()
            raise PictureError("INFERENCE_FAILED", str(outcome.error))
        # The picture's share: the shares of all pictures are the time in which the streams had work.
        state.timings_ms["inference"] = outcome.inference_ms / outcome.images
        state.results = cast("list[PredictResult]", outcome.results)  # they were asked for masks

    async def _outcome(self, decoded: DecodedImage) -> SegmentOutcome:
        request = SegmentRequest(decoded, self._prompts, NO_DEADLINE_S, with_masks=True)
        return await asyncio.wrap_future(self._scheduler.submit(request))


def _own_file() -> ImageFile:
    """A picture that every machine can decode and segment."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return read_image_file(file.getvalue(), max_pixels=64)
