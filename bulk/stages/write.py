"""The last stage: stores a shard's masks, then its rows, which make it done."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from bulk.objects import open_objects
from bulk.plan import PARQUET, rows_file
from bulk.rows import TimingsMs, error_row, found_row, write_part
from bulk.stages.background import yield_to_others
from bulk.stages.blocks import ShardOutcome, outcome_block, shard_of, states_of
from outputs.mask_png import encode_png
from outputs.refinement import refine
from sam3_runner.instances import packed_union

if TYPE_CHECKING:
    from bulk.rows import PictureRow
    from bulk.settings import Run
    from bulk.stages.blocks import Block, PictureState

WRITES_AT_ONCE = 8
PNG = "image/png"


class Write:
    """Blocks of results in, one row a shard out: a `ShardOutcome`.

    Args:
        run: what to do.
    """

    def __init__(self, run: Run) -> None:
        if run.background:
            yield_to_others()
        self._run = run
        self._folder = open_objects(run.folder, run.max_wait_s)
        self._threads = ThreadPoolExecutor(WRITES_AT_ONCE, thread_name_prefix="write")

    def __call__(self, block: Block) -> Block:
        """Store a shard, unless it is stored already."""
        shard = shard_of(block)
        rows = list(self._threads.map(self._finish, states_of(block)))
        self._folder.create(rows_file(shard), write_part(rows), PARQUET)
        return outcome_block(ShardOutcome.of(rows))

    def _finish(self, state: PictureState) -> PictureRow:
        """The row of a picture, whose masks are stored."""
        settings = self._run.settings
        key = None if state.sha256 is None else settings.picture_key(state.sha256)
        if state.error is not None:
            return error_row(
                state.picture.image,
                state.error,
                timings_ms=TimingsMs(**state.timings_ms),
                model_sha256=settings.weights_sha256,
                finished_at=datetime.now(UTC),
                image_bytes=state.size_bytes,
                image_sha256=state.sha256,
                key=key,
            )
        assert state.size_bytes is not None
        assert state.sha256 is not None
        assert key is not None
        started_s = time.perf_counter()
        results = refine(state.results, settings.refinement)
        row = found_row(
            state.picture.image,
            results,
            image_bytes=state.size_bytes,
            image_sha256=state.sha256,
            key=key,
            timings_ms=TimingsMs(),
            model_sha256=settings.weights_sha256,
            finished_at=datetime.now(UTC),
        )
        if not settings.write_masks:
            row = replace(row, prompts=tuple(replace(prompt, mask=None) for prompt in row.prompts))
        for prompt, result in zip(row.prompts, results, strict=True):
            if prompt.mask is not None:
                # A mask that exists already has this content: its name is that of content and settings.
                png = encode_png(packed_union([result]), result.image_width)
                self._folder.create(prompt.mask, png, PNG)
        encode_ms = (time.perf_counter() - started_s) * 1000
        return replace(row, timings_ms=TimingsMs(**state.timings_ms, encode=encode_ms))
