"""Encodes all instances of an answer as one PNG, whose px are the numbers of the instances."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from outputs.png import BAND_PX, UP, grey_png

if TYPE_CHECKING:
    from collections.abc import Sequence

    from outputs.png import Rows
    from sam3_runner.instances import Instance, PredictResult

MAX_INSTANCES = 2**16 - 1
"""A px has 16 bits at most, and 0 is no instance."""
MAX_INSTANCES_OF_8_BITS = 2**8 - 1


class TooManyInstances(ValueError):
    """A label map cannot number so many instances."""

    def __init__(self, count: int) -> None:
        super().__init__(
            f"a label map numbers at most {MAX_INSTANCES} instances, and there are {count}; "
            "raise the score threshold, or ask for fewer prompts"
        )
        self.count = count


def label_map_png(results: Sequence[PredictResult]) -> bytes:
    """PNG of one grey channel at the image's size: each px is the number of an instance, or 0.

    Instances are numbered from 1 through all results, in their order. A px has 8 bits up to 255 instances,
    16 beyond. Where instances overlap, the px has the one with the highest score; of equal scores the one
    with the lowest number. It needs a byte of memory per px, or two, and one for the largest mask.

    Args:
        results: of one image; at least one.

    Raises:
        TooManyInstances: there are more than 65,535.
    """
    stack = bottom_to_top(results)
    if len(stack) > MAX_INSTANCES:
        raise TooManyInstances(len(stack))
    kind = np.dtype(np.uint8) if len(stack) <= MAX_INSTANCES_OF_8_BITS else np.dtype(">u2")
    width, height = results[0].image_width, results[0].image_height
    rows = np.zeros((height, 1 + width * kind.itemsize), np.uint8)
    numbers = rows[:, 1:].view(kind)
    for number, instance in stack:
        np.copyto(numbers[instance.mask.window], number, where=instance.mask.array(), casting="unsafe")
    _filter(rows)
    return grey_png(rows, width, bit_depth=8 * kind.itemsize)


def bottom_to_top(results: Sequence[PredictResult]) -> list[tuple[int, Instance]]:
    """All instances with their numbers, in the order in which they are painted over one another."""
    numbered = list(enumerate((instance for result in results for instance in result.instances), start=1))
    return sorted(numbered, key=lambda item: (item[1].score, -item[0]))


def _filter(rows: Rows) -> None:
    """Filter the rows in place: type 2 (up), but type 0 where a row and the one above are empty."""
    is_set = rows.any(axis=1)
    rows[:, 0] = np.where(is_set, UP, 0)
    rows[1:, 0] |= rows[:-1, 0]
    band_rows = -(-BAND_PX // rows.shape[1])
    # From the bottom: a row is subtracted from the one below before it is changed itself.
    for bottom in range(len(rows), 1, -band_rows):
        top = max(1, bottom - band_rows)
        rows[top:bottom, 1:] -= rows[top - 1 : bottom - 1, 1:]
