"""How many items a pass takes, after a larger pass did not fit in the device's memory."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

REDUCED_TIME_S = 300.0
"""A reduced size is used for so long: another process may have filled the memory, and freed it since."""


class FittingSize:
    """The largest size of a pass: `limit`, or less for `REDUCED_TIME_S` after `reduce_to`.

    Args:
        limit: the size while the memory has room.
        clock_s: seconds since any moment.
    """

    def __init__(self, limit: int, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._clock_s = clock_s
        self._reduced = limit
        self._reduced_until_s = 0.0

    @property
    def current(self) -> int:
        """The largest size now."""
        return self._reduced if self._clock_s() < self._reduced_until_s else self._limit

    def reduce_to(self, size: int) -> None:
        """Use `size`, at least 1, for the next `REDUCED_TIME_S`."""
        self._reduced = max(1, size)
        self._reduced_until_s = self._clock_s() + REDUCED_TIME_S
