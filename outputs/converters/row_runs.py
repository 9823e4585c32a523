"""Run lengths row by row, for the formats that have their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from sam3_runner.instances import MaskCrop


def crop_runs(mask: MaskCrop) -> npt.NDArray[np.int64]:
    """Run lengths inside the crop, row by row; the first is that of px that are not set, maybe 0."""
    flat = mask.array().reshape(-1)
    return np.diff(np.flatnonzero(np.diff(flat, prepend=False)), prepend=0, append=len(flat))


def image_runs(mask: MaskCrop, width: int, height: int) -> npt.NDArray[np.int64]:
    """Run lengths in the whole image, row by row, first that of px that are not set.

    The first and the last may be 0.
    """
    padded = np.pad(mask.array(), ((0, 0), (1, 1)))
    rows, columns = np.nonzero(padded[:, 1:] ^ padded[:, :-1])
    changes, times = np.unique((mask.top + rows) * width + mask.left + columns, return_counts=True)
    # A run that reaches the end of a row may go on in the next one: two changes that are none.
    lengths: npt.NDArray[np.int64] = np.diff(changes[times == 1], prepend=0, append=width * height)
    return lengths
