"""Mask logits to bits by torch's operations: on a CPU, and on a GPU where the kernels cannot be compiled.

Windows of similar size form a chunk, which is bounded in memory. A chunk is upsampled, thresholded and packed
to bits on the device.
"""

from __future__ import annotations

from itertools import chain, groupby, pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

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

    from sam3_runner.instances import Mask, PackedMask


class ChunkLimits(NamedTuple):
    """How windows are put into chunks.

    Attributes:
        max_values: fp32 values of a chunk in each of two tensors; taller windows are split. A chunk takes
            about 12 bytes a value.
        spare_values: a window joins a chunk if the padding of all to one size stays below. More padding takes
            longer than the kernel launches of one more chunk.
    """

    max_values: int
    spare_values: int


CHUNK_LIMITS = {
    "cpu": ChunkLimits(max_values=512 * 1024, spare_values=128 * 1024),
    "cuda": ChunkLimits(max_values=64 * 1024 * 1024, spare_values=16 * 1024 * 1024),
}
"""By device. On a CPU a chunk fits its cache, and launching a kernel costs little."""

BIT_VALUES = torch.tensor([[128], [64], [32], [16], [8], [4], [2], [1]], dtype=torch.uint8)
"""Values of a byte's bits by px."""


def find_ranges(mask_logits: Tensor) -> Ranges:
    """The positive part of each mask (K, h, w) fp32; blocks until the device has found it."""
    positive = mask_logits.clone().gt_(0)  # fp32: comparing to bool and `any` are slow on a CPU.
    masks = mask_logits.flatten(1)
    found = [
        positive.amax(dim=2),
        positive.amax(dim=1),
        masks.amin(1, keepdim=True),
        masks.amax(1, keepdim=True),
    ]
    read = torch.cat(found, dim=1).cpu().numpy()
    rows, columns = read[:, : mask_logits.shape[1]] > 0, read[:, mask_logits.shape[1] : -2] > 0
    return Ranges(*_ends(rows), *_ends(columns), np.isfinite(read[:, -2:]).all(axis=1))


def _ends(positive: Mask) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """First and last true value of each row of (K, n) bool; n and -1 if there is none."""
    cells, any_positive = positive.shape[1], positive.any(axis=1)
    first, last = positive.argmax(axis=1), cells - 1 - positive[:, ::-1].argmax(axis=1)
    return np.where(any_positive, first, cells), np.where(any_positive, last, -1)


def draw(mask_logits: Tensor, windows: list[Window]) -> Iterator[tuple[int, DrawnMask]]:
    """The masks of `windows`, in any order."""
    parts = _parts(mask_logits, windows)
    for mask, bands in groupby(parts, key=lambda part: part.window.mask):
        yield mask, _joined(list(bands))


def unite(
    mask_logits: Tensor, windows: list[Window], image_of: Sequence[int], sizes: Sequence[Size]
) -> United:
    """The union of the masks of each image.

    Args:
        mask_logits: (K, h, w) fp32.
        windows: of the masks that are not empty.
        image_of: of each mask, the index of its image in `sizes`.
        sizes: of the images.
    """
    masks = [np.zeros((size.height, -(-size.width // BYTE_PX)), dtype=np.uint8) for size in sizes]
    areas_px = {}
    for mask, (area_px, crop) in draw(mask_logits, windows):
        masks[image_of[mask]][crop.packed_window] |= crop.packed()
        areas_px[mask] = area_px
    return United(areas_px, masks)


def _joined(bands: list[_Part]) -> DrawnMask:
    """The mask of the bands of a window."""
    column_px = np.sum([band.column_px for band in bands], axis=0)
    columns = np.flatnonzero(column_px)
    rows = np.flatnonzero(np.concatenate([band.rows for band in bands]))
    edges = (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1) if len(rows) else (0, 0, 0, 0)
    inside = Rectangle(*map(int, edges))
    return drawn_mask(bands[0].window, int(column_px.sum()), inside, [band.bits for band in bands])


class _Extent(NamedTuple):
    """The size to which the windows of a chunk are padded, in px and in cells of the mask grid."""

    rows: int = 0
    columns: int = 0
    row_cells: int = 0
    column_cells: int = 0

    def including(self, window: Window) -> _Extent:
        """The least extent that also contains `window`."""
        rows, columns = window.rows, window.columns
        size = (rows.px, columns.px, rows.last - rows.first + 1, columns.last - columns.first + 1)
        return _Extent(*map(max, self, size))

    @property
    def values(self) -> int:
        """fp32 values of one window: its px, and its upsampled rows."""
        return self.rows * (self.columns + self.column_cells)


class _Chunk(NamedTuple):
    """Windows that are upsampled together."""

    windows: list[Window]
    extent: _Extent


def _chunks(windows: list[Window], limits: ChunkLimits) -> Iterator[_Chunk]:
    """Windows of similar size, the tallest first; the bands of one mask follow each other."""
    tallest_first = sorted(windows, key=lambda window: (-window.rows.px, -window.columns.px))
    chunk: list[Window] = []
    extent, used = _Extent(), 0
    for window in chain.from_iterable(_bands(each, limits.max_values) for each in tallest_first):
        values = _Extent().including(window).values
        common = extent.including(window)
        padded = common.values * (len(chunk) + 1)
        if chunk and (padded > limits.max_values or padded - used - values > limits.spare_values):
            yield _Chunk(chunk, extent)
            chunk, common, used = [], _Extent().including(window), 0
        chunk.append(window)
        extent, used = common, used + values
    if chunk:
        yield _Chunk(chunk, extent)


def _bands(window: Window, max_values: int) -> Iterator[Window]:
    """The window in bands of rows, of `max_values` each at most unless one row has more."""
    axis = window.rows
    bands = min(axis.px, -(-_Extent().including(window).values // max_values))
    edges = [axis.start + axis.px * band // bands for band in range(bands + 1)]
    for start, end in pairwise(edges):
        # One cell more at each end than these positions need: the device computes them in fp32.
        above = int((start + 0.5) * axis.cells / axis.size - 0.5) - 1
        below = int((end - 0.5) * axis.cells / axis.size - 0.5) + 2
        first, last = (min(max(cell, axis.first), axis.last) for cell in (above, below))
        yield window._replace(rows=axis._replace(start=start, end=end, first=first, last=last))


class _Part(NamedTuple):
    """A window after upsampling, on the host.

    Attributes:
        column_px: positive px of each column, (columns,) int32.
        rows: 0 for a row without a positive px, (rows,) uint8.
        bits: (rows, columns / 8) uint8, the first px in the highest bit.
    """

    window: Window
    column_px: npt.NDArray[np.int32]
    rows: PackedMask
    bits: PackedMask


def _parts(mask_logits: Tensor, windows: list[Window]) -> Iterator[_Part]:
    """The upsampled windows; the device computes the next chunk while the caller uses the parts of one."""
    device = mask_logits.device
    chunks = list(_chunks(windows, CHUNK_LIMITS[device.type]))
    parameters = _parameters([window for chunk in chunks for window in chunk.windows])
    upsampling = _Upsampling(mask_logits, torch.from_numpy(parameters).to(device, non_blocking=True))
    waiting: _Transfer | None = None
    first = 0
    for chunk in chunks:
        started = upsampling.start(chunk, first)
        first += len(chunk.windows)
        if waiting:
            yield from waiting.parts()
        waiting = started
    if waiting:
        yield from waiting.parts()


def _parameters(windows: list[Window]) -> npt.NDArray[np.float32]:
    """What the device needs to know of N windows, (6, 2, N, 1): six values, of rows and of columns.

    All are whole numbers below 2^24, which fp32 holds exactly, but for the scale.
    """
    values = [
        [
            (window.mask, axis.start, min(axis.end, axis.size), axis.cells / axis.size, axis.first, axis.last)
            for axis in (window.rows, window.columns)
        ]
        for window in windows
    ]
    return np.array(values, dtype=np.float32).reshape(-1, 2, 6).transpose(2, 1, 0)[..., None].copy()


class _Upsampling:
    """Upsamples windows of mask logits.

    Args:
        mask_logits: (K, h, w) fp32.
        parameters: see `_parameters`, on the device.
    """

    def __init__(self, mask_logits: Tensor, parameters: Tensor) -> None:
        self._logits = mask_logits.contiguous().flatten()
        self._row_stride = mask_logits.shape[2]
        self._mask_stride = mask_logits.shape[1] * mask_logits.shape[2]
        self._parameters = parameters
        self._bit_values = BIT_VALUES.to(mask_logits.device, non_blocking=True)

    def start(self, chunk: _Chunk, first: int) -> _Transfer:
        """Compute a chunk whose first window is number `first` of the parameters; does not wait for it."""
        parameters = self._parameters[:, :, first : first + len(chunk.windows)].unbind()
        positive = self._upsample(parameters, chunk.extent).gt_(0).to(torch.bool)
        return _transfer(chunk, self._pack(positive, chunk))

    def _upsample(self, parameters: tuple[Tensor, ...], extent: _Extent) -> Tensor:
        """Logits (N x columns, rows): rows are upsampled first, then columns; NaN outside the image.

        The rows come last, so that upsampling the columns, the larger part, copies whole rows of memory.
        """
        cells, weights = _positions(parameters, max(extent.rows, extent.columns))
        above, below = cells[:, 0, :, None, : extent.rows].expand(-1, -1, extent.column_cells, -1)
        block = self._block(parameters, extent)
        rows = block.gather(2, above).lerp_(block.gather(2, below), weights[0, :, None, : extent.rows])
        windows = torch.arange(len(rows), device=rows.device)[:, None]
        left, right = (cells[:, 1, :, : extent.columns] + windows * extent.column_cells).flatten(1)
        rows = rows.flatten(0, 1)
        weight = weights[1, :, : extent.columns].reshape(-1, 1)
        return rows.index_select(0, left).lerp_(rows.index_select(0, right), weight)

    def _block(self, parameters: tuple[Tensor, ...], extent: _Extent) -> Tensor:
        """The cells of each window, transposed: (N, column cells, row cells)."""
        mask, _, _, _, first, last = parameters
        cells = torch.arange(max(extent.row_cells, extent.column_cells), device=mask.device)
        row, column = torch.minimum(first + cells, last).long()
        row = row * self._row_stride + mask[0].long() * self._mask_stride
        index = column[:, : extent.column_cells, None] + row[:, None, : extent.row_cells]
        return self._logits.index_select(0, index.flatten()).view(index.shape)

    def _pack(self, positive: Tensor, chunk: _Chunk) -> Tensor:
        """The chunk's parts as bytes: `column_px` of all windows, then `rows`, then `bits`."""
        count, extent = len(chunk.windows), chunk.extent
        row_bytes = extent.columns // BYTE_PX
        sizes = _sizes(chunk)
        packed = torch.empty(sum(sizes), dtype=torch.uint8, device=positive.device)
        column_px, rows, bits = packed.split_with_sizes(sizes)
        torch.sum(positive, dim=1, dtype=torch.int32, out=column_px.view(torch.int32))
        values = positive.view(torch.uint8).view(count * row_bytes, BYTE_PX, extent.rows)
        columns = values.mul_(self._bit_values).sum(1, dtype=torch.uint8).view(count, row_bytes, extent.rows)
        torch.amax(columns, dim=1, out=rows.view(count, extent.rows))
        bits.view(count, extent.rows, row_bytes).copy_(columns.transpose(1, 2))
        return packed


def _positions(parameters: tuple[Tensor, ...], length: int) -> tuple[Tensor, Tensor]:
    """Where the px of each window lie on the mask grid, as `F.interpolate` computes it.

    Returns:
        The cells before and after each px, counted from the window's first: (2, 2, N, length) int64, the
        second dimension being rows and columns. The weight of the cell after: (2, N, length) fp32, NaN
        outside the window.
    """
    _, start, stop, scale, first, last = parameters
    px = start + torch.arange(length, device=start.device)
    position = px.add(0.5).mul_(scale).sub_(0.5).clamp_(min=0.0)
    above = position.floor()
    cells = torch.stack([above, above + 1]).clamp_(first, last).sub_(first).long()
    return cells, position.sub_(above).masked_fill_(px >= stop, torch.nan)


def _sizes(chunk: _Chunk) -> list[int]:
    """Bytes of `column_px`, `rows` and `bits` of all windows of a chunk."""
    count, extent = len(chunk.windows), chunk.extent
    return [4 * count * extent.columns, count * extent.rows, count * extent.rows * extent.columns // BYTE_PX]


class _Transfer(NamedTuple):
    """A chunk on its way to the host; `arrived` is None if it is there."""

    chunk: _Chunk
    packed: Tensor
    arrived: torch.cuda.Event | None

    def parts(self) -> Iterator[_Part]:
        """The parts of the chunk, once it has arrived."""
        if self.arrived:
            self.arrived.synchronize()
        windows, extent = self.chunk
        column_px, rows, bits = (part.numpy() for part in self.packed.split_with_sizes(_sizes(self.chunk)))
        column_px = column_px.view(np.int32).reshape(len(windows), extent.columns)
        rows = rows.reshape(len(windows), extent.rows)
        bits = bits.reshape(len(windows), extent.rows, -1)
        for row, window in enumerate(windows):
            height, width = window.rows.px, window.columns.px
            yield _Part(
                window, column_px[row, :width], rows[row, :height], bits[row, :height, : width // BYTE_PX]
            )


def _transfer(chunk: _Chunk, packed: Tensor) -> _Transfer:
    if packed.device.type == "cpu":
        return _Transfer(chunk, packed, None)
    on_host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
    on_host.copy_(packed, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()
    return _Transfer(chunk, on_host, arrived)
