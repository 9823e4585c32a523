"""The second stage: the model on one device. The only stage that loads torch."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, cast

from bulk.errors import ModelUnavailable, PictureError
from bulk.stages.background import yield_to_others
from bulk.stages.blocks import block_of, shard_of, squares_of, states_of
from sam3_runner.images.decoded import DecodedImage
from sam3_runner.prompts import ConceptPrompt
from sam3_runner.serving.engine import Engine, EngineConfig, SegmentRequest

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from bulk.settings import Run
    from bulk.stages.blocks import Block, PictureState
    from sam3_runner.instances import PredictResult

LOADING_POLL_S = 0.05
NO_DEADLINE_S = float("inf")
DEVICE_LOST_EXIT_CODE = 3


class Segment:
    """Blocks of squares in, blocks of results out. Loads the model once. Safe for threads.

    Args:
        run: what to do.

    Raises:
        ModelUnavailable: the model cannot be loaded.

    Attributes:
        BLOCKS_AT_ONCE: calls at once, so that the device computes while another block is read or handed on.
    """

    BLOCKS_AT_ONCE = 2

    def __init__(self, run: Run) -> None:
        if run.background:
            yield_to_others()
        self._run = run
        threshold = run.settings.score_threshold
        self._prompts = [ConceptPrompt(text, score_threshold=threshold) for text in run.settings.prompts]
        self._streams = threading.Semaphore(run.streams)
        # One more than streams: the next batch is moved to the device meanwhile.
        self._threads = ThreadPoolExecutor(run.streams + 1, thread_name_prefix="segment")
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

    def _wait_until_ready(self) -> None:
        while not self._engine.ready:
            status = self._engine.status()
            if status.state == "error":
                raise ModelUnavailable(f"the model cannot be loaded: {status.detail}")
            time.sleep(LOADING_POLL_S)

    def __call__(self, block: Block) -> Block:
        """The block of a shard with the results of its pictures, without their squares."""
        states = states_of(block)
        todo = [
            (state, square)
            for state, square in zip(states, squares_of(block), strict=True)
            if state.error is None
        ]
        size = self._run.max_batch
        batches = [todo[start : start + size] for start in range(0, len(todo), size)]
        for _ in self._threads.map(self._segment, batches):
            pass  # what a thread raises is raised here
        return block_of(shard_of(block), states)

    def _segment(self, batch: list[tuple[PictureState, npt.NDArray[np.uint8]]]) -> None:
        """Add the results of a batch to its states."""
        staged = [
            self._engine.stage(
                SegmentRequest(
                    DecodedImage(square, state.width or 0, state.height or 0),
                    self._prompts,
                    NO_DEADLINE_S,
                    with_masks=True,
                )
            )
            for state, square in batch
        ]
        requests = [each for each in staged if isinstance(each, SegmentRequest)]
        with self._streams:
            started_s = time.perf_counter()
            outcomes = iter(self._engine.segment(requests))
            elapsed_ms = (time.perf_counter() - started_s) * 1000
        for (state, _), each in zip(batch, staged, strict=True):
            outcome = next(outcomes) if isinstance(each, SegmentRequest) else each
            # The picture's share: the shares of all pictures are the time in which the streams had work.
            state.timings_ms["inference"] = elapsed_ms / len(batch)
            if outcome.error is not None:
                state.error = PictureError("INFERENCE_FAILED", str(outcome.error))
            else:
                assert outcome.results is not None
                state.results = cast("list[PredictResult]", outcome.results)  # they were asked for masks
