"""The features of images that were encoded lately."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

import torch

from sam3_runner.inference.device_errors import is_out_of_memory
from sam3_runner.metrics import FEATURE_BYTES, FEATURE_EVICTIONS, FEATURES
from sam3_runner.network.model import ImageFeatures

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor


class ImageRow(NamedTuple):
    """One image of a batch of features."""

    batch: ImageFeatures
    row: int


class FeatureCache:
    """Features by the key of their image; those that were not used for the longest time make room.

    Args:
        max_bytes: of all features; 0: none are kept.
        copies: whether a later pass overwrites the features that a pass returns.
    """

    def __init__(self, max_bytes: int, *, copies: bool) -> None:
        self._max_bytes = max_bytes
        self._copies = copies
        self._bytes = 0
        self._rows: OrderedDict[str, ImageRow] = OrderedDict()

    def __contains__(self, key: str | None) -> bool:
        return key in self._rows

    def find(self, key: str | None) -> ImageRow | None:
        """The image with this key; None where it is not held."""
        if key is None or key not in self._rows:
            return None
        self._rows.move_to_end(key)
        return self._rows[key]

    def keep(self, key: str | None, encoded: ImageRow) -> ImageRow:
        """Keep an image that a pass has encoded, if there is room; returns the one to use from now on."""
        kept_bytes = _bytes_of(encoded)
        if key is None or kept_bytes > self._max_bytes:
            return encoded
        while self._bytes + kept_bytes > self._max_bytes:
            self._remove_oldest()
            FEATURE_EVICTIONS.inc()
        # A view would hold the features of the whole batch in memory.
        if self._copies or len(encoded.batch.attended) > 1:
            try:
                encoded = ImageRow(_map(encoded.batch, lambda each: _row(each, encoded.row).clone()), 0)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                return encoded
        self._rows[key] = encoded
        self._bytes += kept_bytes
        FEATURE_BYTES.set(self._bytes)
        return encoded

    def remove(self, key: str | None) -> None:
        """Let go of the image with this key, if it is held."""
        if key is not None and key in self._rows:
            self._rows.move_to_end(key, last=False)
            self._remove_oldest()

    def clear(self) -> bool:
        """Let go of all features. Returns whether there were any."""
        was_used = bool(self._rows)
        while self._rows:
            self._remove_oldest()
        return was_used

    def _remove_oldest(self) -> None:
        _, removed = self._rows.popitem(last=False)
        self._bytes -= _bytes_of(removed)
        FEATURE_BYTES.set(self._bytes)


def count_features(*, hits: int, misses: int) -> None:
    """Count the images of a pass."""
    FEATURES.labels("hit").inc(hits)
    FEATURES.labels("miss").inc(misses)


def gather(images: Sequence[ImageRow], part: Callable[[ImageFeatures], Tensor]) -> Tensor:
    """One part of the features of images, (N, ...); a view where that is possible."""
    batch = images[0].batch
    if all(image.batch is batch for image in images):
        return rows_of(part(batch), [image.row for image in images])
    return torch.cat([_row(part(image.batch), image.row) for image in images])


def rows_of(tensor: Tensor, rows: list[int]) -> Tensor:
    """The given rows of a tensor (N, ...); a view where they follow each other, or are one.

    Rows of feature maps (N, D, h, w) keep their channels last.
    """
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return tensor[rows[0] : rows[0] + len(rows)]
    if len(tensor) == 1:
        return tensor.expand(len(rows), *tensor.shape[1:])
    index = torch.tensor(rows).to(tensor.device, non_blocking=True)
    if tensor.ndim == 4:
        return tensor.movedim(1, 3).index_select(0, index).movedim(3, 1)
    return tensor.index_select(0, index)


def _row(tensor: Tensor, row: int) -> Tensor:
    return tensor[row : row + 1]


def _bytes_of(image: ImageRow) -> int:
    tensors = (*image.batch.finer, image.batch.attended, image.batch.geometry_token, image.batch.coarse)
    return sum(each[0].nbytes for each in tensors)


def _map(features: ImageFeatures, change: Callable[[Tensor], Tensor]) -> ImageFeatures:
    return ImageFeatures(
        finer=tuple(map(change, features.finer)),
        attended=change(features.attended),
        geometry_token=change(features.geometry_token),
        coarse=change(features.coarse),
    )
