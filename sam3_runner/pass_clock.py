"""When the stages of a pass of the model ran."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from sam3_runner.metrics import StageTime

if TYPE_CHECKING:
    from collections.abc import Iterator


class PassClock:
    """The times of one pass. On a GPU they are the GPU's own, since the host runs ahead of it.

    Args:
        device: of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, float | torch.cuda.Event, float | torch.cuda.Event]] = []
        self._began_s = time.monotonic()
        self._began = self._mark()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Note when the block begins and ends; waits for nothing."""
        begin = self._mark()
        yield
        self._marks.append((name, begin, self._mark()))

    def times(self) -> list[StageTime]:
        """The stages, once the pass is over; waits for what the GPU has still to do."""
        return [
            StageTime(name, self._began_s + self._since(begin), self._began_s + self._since(end))
            for name, begin, end in self._marks
        ]

    def _mark(self) -> float | torch.cuda.Event:
        if not self._on_gpu:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _since(self, mark: float | torch.cuda.Event) -> float:
        if isinstance(mark, float):
            return mark - self._began_s
        assert isinstance(self._began, torch.cuda.Event)
        mark.synchronize()
        elapsed_ms: float = self._began.elapsed_time(mark)
        return elapsed_ms / 1000
