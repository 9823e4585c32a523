"""CUDA graphs: a function of tensors, recorded once for each number of rows and replayed in one launch.

Launching the thousands of kernels of a pass one by one takes longer than running them.
"""

from __future__ import annotations

import logging
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from sam3_runner.inference.device_errors import is_out_of_memory, release_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor

logger = logging.getLogger(__name__)

MAX_SPARE_ROWS = 1 / 8
"""Share of a graph's rows that may be spare."""
WARM_UP_RUNS = 2
"""Before a recording: compiling, choosing kernels and allocating workspaces cannot be recorded."""


class GraphedFunction:
    """A function of tensors with a common number of rows, as one CUDA graph a number of rows.

    A call with other numbers of rows runs the next larger graph, with rows of zeros. The returned tensors
    belong to the graph: its next call overwrites them.

    Args:
        function: of tensors (N, ...); returns a tensor, or a tuple or dataclass of such, with N rows. It must
            not synchronise with the host.
        example: returns inputs of one row, on the device; their shapes and dtypes are those of all calls.
        sizes: numbers of rows to record. One that does not fit into the GPU's memory is left out.
        pool: of `torch.cuda.graph_pool_handle`. Functions that never run at the same time share one: the
            memory of their intermediate values then counts once. What they return stays apart.

    Raises:
        RuntimeError: torch's, of a full memory: not even one row fits.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        example: Callable[[], tuple[Tensor, ...]],
        sizes: Iterable[int],
        pool: Any,
    ) -> None:
        examples = example()
        self._recordings: dict[int, _Recording] = {}
        # The largest first: the others then use parts of its memory.
        for size in sorted(sizes, reverse=True):
            try:
                self._recordings[size] = _Recording(function, examples, size, pool)
                continue
            except RuntimeError as error:
                if size == 1 or not is_out_of_memory(error):
                    raise
            # Outside of the handler, whose error holds the tensors of the failed pass.
            release_memory()
            logger.warning("the GPU's memory is too full for passes of %d: they are split", size)
        self.max_rows = max(self._recordings)

    def parts(self, rows: int) -> list[int]:
        """Numbers of rows whose calls take `rows` in the least time, each other than those before it.

        A graph takes the time of all its rows, also if some are spare: 5 rows are 4 and 1. Few spare rows
        cost less than one more call. As long as the parts differ, a call leaves the results of those before.
        """
        return split_rows(min(rows, self.max_rows), sorted(self._recordings))

    def __call__(self, *inputs: Tensor) -> Any:
        """The function of at most `max_rows` rows; inputs may be in pinned memory of the host."""
        rows = len(inputs[0])
        size = min(size for size in self._recordings if size >= rows)
        return first_rows(self._recordings[size].replay(inputs, rows), rows)


def split_rows(rows: int, sizes: Sequence[int]) -> list[int]:
    """Parts of `rows`, at most the largest of the ascending `sizes`; each runs as a graph of its own size."""
    larger = min(size for size in sizes if size >= rows)
    if larger - rows <= larger * MAX_SPARE_ROWS:
        return [rows]
    smaller = max(size for size in sizes if size < rows)
    rest = split_rows(rows - smaller, sizes)
    # Where a size between is left out, the rest may need the same graph, which overwrites its results.
    return [smaller, *rest] if min(size for size in sizes if size >= rest[0]) < smaller else [rows]


class _Recording:
    """One graph with its inputs and outputs."""

    def __init__(
        self, function: Callable[..., Any], examples: tuple[Tensor, ...], size: int, pool: Any
    ) -> None:
        self._inputs = [_zeros(size, each) for each in examples]
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_RUNS):
                function(*self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._outputs = function(*self._inputs)

    def replay(self, inputs: tuple[Tensor, ...], rows: int) -> Any:
        for own, given in zip(self._inputs, inputs, strict=True):
            own[:rows].copy_(given, non_blocking=True)
            if rows < len(own):
                own[rows:].zero_()
        self._graph.replay()
        return self._outputs


def _zeros(size: int, example: Tensor) -> Tensor:
    """Zeros of `size` rows in the dtype and layout of `example`: feature maps have their channels last."""
    if example.ndim == 4 and example.is_contiguous(memory_format=torch.channels_last):
        channels, height, width = example.shape[1:]
        return example.new_zeros(size, height, width, channels).permute(0, 3, 1, 2)
    return example.new_zeros(size, *example.shape[1:])


def first_rows(value: Any, rows: int) -> Any:
    """The first rows of a tensor, or of each tensor in a tuple or dataclass."""
    if isinstance(value, torch.Tensor):
        return value[:rows]
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{each.name: first_rows(getattr(value, each.name), rows) for each in fields(value)}
        )
    return tuple(first_rows(each, rows) for each in value)
