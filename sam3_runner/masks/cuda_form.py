"""Mask logits to bits by three CUDA kernels: `kernels.cu`.

The results are those of `torch_form.py`, to the bit. The first kernel finds the positive part of all masks.
The second one upsamples, thresholds and packs the windows of a chunk, of any sizes, and finds area and
rectangle of each. Upsampled logits stay in registers: the device's memory holds the mask grids and the bits.
The third one unites the windows of each image, for callers who do not need each mask.
"""

from __future__ import annotations

import ctypes
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from sam3_runner.masks.nvrtc import Kernels
from sam3_runner.masks.windows import (
    BYTE_PX,
    DrawnMask,
    Ranges,
    Rectangle,
    Size,
    United,
    Window,
    drawn_mask,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

SOURCE = Path(__file__).with_name("kernels.cu")
RANGE_THREADS = 1024
DRAW_THREADS = 256
BLOCK_BYTES = 8 * DRAW_THREADS
"""Bytes that a block draws: BYTES_PER_THREAD of the source for each thread."""

STATS = 5
"""Values of a window that the kernel finds."""

CHUNK_BYTES = 16 * 1024 * 1024
"""Bits of a chunk, unless one window has more; up to three chunks are in memory at once, on each side."""


class MaskKernels:
    """The kernels on one GPU. Raises `KernelsUnavailable`."""

    def __init__(self, device: torch.device) -> None:
        self._kernels = Kernels(SOURCE, ("find_ranges", "draw", "unite"), device)

    def find_ranges(self, mask_logits: Tensor) -> Ranges:
        """The positive part of each mask (K, h, w) fp32; blocks until the device has found it."""
        masks, rows, columns = mask_logits.shape
        found = torch.empty(masks, 5, dtype=torch.int32, pin_memory=True)
        if masks:
            self._kernels.launch(
                "find_ranges",
                (masks, 1),
                RANGE_THREADS,
                ctypes.c_void_p(mask_logits.data_ptr()),
                ctypes.c_int(rows),
                ctypes.c_int(columns),
                ctypes.c_void_p(found.data_ptr()),  # The device writes to pinned memory directly.
            )
            torch.cuda.current_stream(mask_logits.device).synchronize()
        values = found.numpy().astype(np.int64)
        return Ranges(values[:, 0], values[:, 1], values[:, 2], values[:, 3], values[:, 4] > 0)

    def draw(self, mask_logits: Tensor, windows: list[Window]) -> Iterator[tuple[int, DrawnMask]]:
        """The masks of `windows`; the device draws the next chunk while the caller takes those of one."""
        parameters, chunks = _plan(windows)
        on_device = torch.from_numpy(parameters).to(mask_logits.device, non_blocking=True)
        waiting: _Drawing | None = None
        for chunk in chunks:
            drawn = self._start(mask_logits, on_device, chunk)
            started = _Drawing(chunk, *_to_host(drawn))
            if waiting:
                yield from waiting.masks()
            waiting = started
        if waiting:
            yield from waiting.masks()

    def unite(
        self, mask_logits: Tensor, windows: list[Window], image_of: Sequence[int], sizes: Sequence[Size]
    ) -> United:
        """As `torch_form.unite`, in one transfer for all masks."""
        parameters, chunks = _plan(windows)
        device = mask_logits.device
        masks_bytes = [size.height * -(-size.width // BYTE_PX) for size in sizes]
        *starts, end = accumulate(masks_bytes, initial=0)
        places = torch.tensor(
            [
                (starts[image_of[window.mask]], -(-sizes[image_of[window.mask]].width // BYTE_PX))
                for window in windows
            ],
            dtype=torch.int64,
        ).to(device, non_blocking=True)
        on_device = torch.from_numpy(parameters).to(device, non_blocking=True)
        # After the areas, which are 4 bytes each: so both are aligned to words.
        areas_bytes = 4 * len(windows)
        found = torch.zeros(areas_bytes + -(-end // 4) * 4, dtype=torch.uint8, device=device)
        areas = found[:areas_bytes].view(torch.int32)
        for chunk in chunks:
            drawn = self._start(mask_logits, on_device, chunk)
            count = len(chunk.windows)
            stats = drawn[: 4 * STATS * count].view(torch.int32).view(count, STATS)
            areas[chunk.first : chunk.first + count] = stats[:, 0]
            self._kernels.launch(
                "unite",
                (-(-chunk.largest // BLOCK_BYTES), count),
                DRAW_THREADS,
                ctypes.c_void_p(on_device[chunk.first :].data_ptr()),
                ctypes.c_void_p(places[chunk.first :].data_ptr()),
                ctypes.c_void_p(drawn.data_ptr() + 4 * STATS * count),
                ctypes.c_void_p(found.data_ptr() + areas_bytes),
            )
        on_host, arrived = _to_host(found)
        arrived.synchronize()
        values = on_host.numpy()
        areas_px = values[:areas_bytes].view(np.int32).tolist()
        united = values[areas_bytes:]
        return United(
            {window.mask: area for window, area in zip(windows, areas_px, strict=True)},
            [
                united[start : start + size_bytes].reshape(size.height, -1).copy()
                for start, size_bytes, size in zip(starts, masks_bytes, sizes, strict=True)
            ],
        )

    def _start(self, mask_logits: Tensor, parameters: Tensor, chunk: _Chunk) -> Tensor:
        """Draw a chunk; the stats and bits of its windows, (bytes,) uint8 on the device."""
        _, rows, columns = mask_logits.shape
        count = len(chunk.windows)
        stats_bytes = 4 * STATS * count
        drawn = torch.zeros(stats_bytes + chunk.size, dtype=torch.uint8, device=mask_logits.device)
        self._kernels.launch(
            "draw",
            (-(-chunk.largest // BLOCK_BYTES), count),
            DRAW_THREADS,
            ctypes.c_void_p(mask_logits.data_ptr()),
            ctypes.c_int(rows),
            ctypes.c_int(columns),
            ctypes.c_void_p(parameters[chunk.first :].data_ptr()),
            ctypes.c_void_p(drawn.data_ptr()),
            ctypes.c_void_p(drawn.data_ptr() + stats_bytes),
        )
        return drawn


def _to_host(found: Tensor) -> tuple[Tensor, torch.cuda.Event]:
    """A copy in pinned memory, and the event of its arrival."""
    on_host = torch.empty(found.shape, dtype=torch.uint8, pin_memory=True)
    on_host.copy_(found, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()
    return on_host, arrived


class _Chunk(NamedTuple):
    """Windows that are drawn together: their bytes, those of the largest, and the number of the first one."""

    windows: list[Window]
    first: int
    size: int
    largest: int


def _plan(windows: list[Window]) -> tuple[np.ndarray[tuple[int, int], np.dtype[np.int32]], list[_Chunk]]:
    """The kernel's `windows`, (N, 9) int32, and the chunks."""
    parameters, scales = [], []
    chunks: list[_Chunk] = []
    first, size, largest = 0, 0, 0
    for number, (mask, rows, columns) in enumerate(windows):
        row_bytes = columns.px // BYTE_PX
        window_bytes = rows.px * row_bytes
        if number > first and size + window_bytes > CHUNK_BYTES:
            chunks.append(_Chunk(windows[first:number], first, size, largest))
            first, size, largest = number, 0, 0
        parameters.append((mask, rows.start, rows.px, columns.start, row_bytes, columns.size, size))
        scales.append((rows.cells / rows.size, columns.cells / columns.size))
        size, largest = size + window_bytes, max(largest, window_bytes)
    if windows:
        chunks.append(_Chunk(windows[first:], first, size, largest))
    whole = np.array(parameters, dtype=np.int32).reshape(-1, 7)
    bits_of_scales = np.array(scales, dtype=np.float32).reshape(-1, 2).view(np.int32)
    return np.concatenate([whole, bits_of_scales], axis=1), chunks


class _Drawing(NamedTuple):
    """A chunk on its way to the host."""

    chunk: _Chunk
    drawn: Tensor
    arrived: torch.cuda.Event

    def masks(self) -> Iterator[tuple[int, DrawnMask]]:
        """Number and mask of each window, once they have arrived."""
        self.arrived.synchronize()
        windows = self.chunk.windows
        drawn = self.drawn.numpy()
        start = 4 * STATS * len(windows)
        stats = drawn[:start].view(np.int32).reshape(-1, STATS).tolist()
        for window, (area_px, above_end, bottom, before_end, right) in zip(windows, stats, strict=True):
            height, width = window.rows.px, window.columns.px
            end = start + height * width // BYTE_PX
            bits = drawn[start:end].reshape(height, width // BYTE_PX)
            inside = Rectangle(height - above_end, bottom, width - before_end, right)
            yield window.mask, drawn_mask(window, area_px, inside, [bits])
            start = end
