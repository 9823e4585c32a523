"""The stages as one streaming dataset of Ray Data: shards in, their outcomes out as they end."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray.data
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.annotations import RayDeprecationWarning

from bulk.errors import ClusterUnavailable, RunError
from bulk.stages.blocks import SHARD, outcome_of
from bulk.stages.fetch import Fetch
from bulk.stages.segment import Segment
from bulk.stages.write import Write

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bulk.cluster import Sizes
    from bulk.plan import Plan
    from bulk.settings import Run
    from bulk.stages.blocks import Block, ShardOutcome

SHARD_TRIES = 5
"""Of a shard whose process dies by it, such as by a picture that makes the GPU fail."""
WAVE_SHARDS = 10_000
"""Of one dataset: Ray's driver keeps some KB for each block."""


def segment_shards(run: Run, plan: Plan, todo: Sequence[int], sizes: Sizes) -> Iterator[ShardOutcome]:
    """Segment shards, and yield the outcome of each when its rows are stored.

    A process that dies is started anew, and its shard is done again, `SHARD_TRIES` times in all. What it had
    stored stays as it is.

    Args:
        run: what to do.
        plan: of the run.
        todo: the shards.
        sizes: of the stages.

    Raises:
        RunError: a stage has raised it, or Ray has failed.
    """
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what ends the run is raised as well
    for start in range(0, len(todo), WAVE_SHARDS):
        wave = todo[start : start + WAVE_SHARDS]
        try:
            for row in _dataset(run, plan, wave, sizes).iter_rows():
                yield outcome_of(row)
        except RayError as error:
            raise _run_error(error) from error


def _dataset(run: Run, plan: Plan, wave: Sequence[int], sizes: Sizes) -> ray.data.Dataset:
    # Blocks that exist already: a stage that reads would need a CPU of its own, and might never get one.
    shards = ray.data.from_arrow([pa.table({SHARD: [shard]}) for shard in wave])
    files = _stage(shards, Fetch, (run, plan), sizes.fetch, num_cpus=sizes.stage_cpus)
    found = _stage(
        files,
        Segment,
        (run, sizes.decoders),
        sizes.models,
        at_once=Segment.BLOCKS_AT_ONCE,
        num_cpus=sizes.model_cpus,
        num_gpus=sizes.model_gpus,
    )
    return _stage(found, Write, (run,), sizes.write, num_cpus=sizes.stage_cpus)


def _stage(
    dataset: ray.data.Dataset,
    stage: type,
    arguments: tuple[Any, ...],
    processes: int,
    *,
    at_once: int = 1,
    num_cpus: float,
    num_gpus: int | None = None,
) -> ray.data.Dataset:
    """A stage of so many processes, each with `at_once` blocks at work and the next one ready."""
    with warnings.catch_warnings():
        # Ray 2.60 has no other way to bound the tries; 2.64 is to remove this one.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        return dataset.map_batches(
            _started(stage),
            batch_size=1,  # one row a shard
            batch_format="numpy",
            fn_constructor_args=arguments,
            compute=ActorPoolStrategy(
                size=processes,
                max_tasks_in_flight_per_actor=at_once + 1,
                max_concurrent_calls_per_actor=at_once,
                enable_true_multi_threading=at_once > 1,
            ),
            num_cpus=num_cpus,
            num_gpus=num_gpus or None,
            max_task_retries=SHARD_TRIES - 1,
        )


def _started(stage: type) -> type:
    """The stage as Ray starts it: of an error in a constructor Ray would tell its own class alone."""

    class Started:
        def __init__(self, *arguments: Any) -> None:
            self._error: RunError | None = None
            try:
                self._stage = stage(*arguments)
            except RunError as error:
                self._error = error

        def __call__(self, block: Block) -> Block:
            if self._error is not None:
                raise self._error
            result: Block = self._stage(block)
            return result

    # Ray names processes by it.
    Started.__name__ = Started.__qualname__ = stage.__name__
    return Started


def _run_error(error: RayError) -> RunError:
    """The RunError that a stage has raised, or one that says that Ray has failed."""
    # Ray's error is an instance of its cause's class too, with a traceback as its message.
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, RunError):
        return cause
    if isinstance(cause, RayActorError):
        return ClusterUnavailable(
            "Ray has ended, or a process dies each time at the same pictures (the GPU fails, or the memory "
            "is too small: try a smaller --shard-pictures); the same command goes on from here"
        )
    return ClusterUnavailable(f"Ray has failed: {type(error).__name__}")
