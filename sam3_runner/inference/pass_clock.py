"""Start and end times of the stages of one forward pass."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from sam3_runner.metrics import StageTime

if TYPE_CHECKING:
    from collections.abc import Iterator


class PassClock:
    """Times of one pass. On a GPU they come from CUDA events, since the host runs ahead of the GPU.

    Args:
        device: of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._stages: list[tuple[str, float | torch.cuda.Event, float | torch.cuda.Event]] = []
        self._start_s = time.monotonic()
        self._start = self._mark()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Record the start and the end of the block; does not block."""
        begin = self._mark()
        yield
        self._stages.append((name, begin, self._mark()))

    def times(self) -> list[StageTime]:
        """The stages, after the pass; blocks until the GPU has finished them."""
        return [
            StageTime(name, self._start_s + self._elapsed_s(begin), self._start_s + self._elapsed_s(end))
            for name, begin, end in self._stages
        ]

    def _mark(self) -> float | torch.cuda.Event:
        if not self._on_gpu:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _elapsed_s(self, mark: float | torch.cuda.Event) -> float:
        if isinstance(mark, float):
            return mark - self._start_s
        assert isinstance(self._start, torch.cuda.Event)
        mark.synchronize()
        elapsed_ms: float = self._start.elapsed_time(mark)
        return elapsed_ms / 1000
