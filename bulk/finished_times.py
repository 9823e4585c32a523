"""When the pictures of a run were finished: counts in equal intervals, in bounded memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datetime import datetime

WIDTHS_S = (1, 5, 15, 30, 60, 300, 900, 3600, 21_600, 86_400)
"""Of the intervals. Each divides the next one, so that counts can be added up."""
MAX_INTERVALS = 1000
INTERVAL_SHARDS = 4
PAUSE_S = 600
PAUSE_SHARDS = 10
PAUSE_INTERVALS = 10
"""A time without pictures is a pause, not a low rate, when it is as long as all of these."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """A time in which the run worked.

    Attributes:
        start_s: of its first interval, in s since 1970, UTC.
        width_s: of an interval.
        counts: pictures that were finished in each interval.
    """

    start_s: int
    width_s: int
    counts: list[int]

    @property
    def end_s(self) -> int:
        """Of its last interval."""
        return self.start_s + self.width_s * len(self.counts)


class FinishedTimes:
    """Counts pictures by the time when they were finished.

    Intervals become wider when there are more than `MAX_INTERVALS` that have pictures. The order in which
    times are added makes no difference.
    """

    def __init__(self) -> None:
        self.width_s = WIDTHS_S[0]
        self.counts: Counter[int] = Counter()
        """By the number of the interval: its start divided by its width."""
        self.first: datetime | None = None
        self.last: datetime | None = None

    def add(self, time: datetime) -> None:
        """Count a picture."""
        self.first = time if self.first is None else min(self.first, time)
        self.last = time if self.last is None else max(self.last, time)
        self.counts[int(time.timestamp()) // self.width_s] += 1
        while len(self.counts) > MAX_INTERVALS and self.width_s < WIDTHS_S[-1]:
            width_s = WIDTHS_S[WIDTHS_S.index(self.width_s) + 1]
            self.counts, self.width_s = self._in_intervals(width_s), width_s

    @property
    def pictures(self) -> int:
        """All that were counted."""
        return self.counts.total()

    @property
    def worked_s(self) -> float:
        """From the first picture to the last, without the pauses."""
        if self.first is None or self.last is None:
            return 0.0
        spans = _spans(self.counts, self.width_s, self._pause_s)
        paused = sum(after.start - before.stop for before, after in pairwise(spans))
        return (self.last - self.first).total_seconds() - paused * self.width_s

    def stretches(self, max_intervals: int) -> list[Stretch]:
        """What is between the pauses, in the narrowest intervals of which there are at most `max_intervals`.

        Several shards end in an interval: in narrower ones a chart would show when each ends, and no rate.
        """
        for width_s in WIDTHS_S[WIDTHS_S.index(self.width_s) :]:
            counts = self._in_intervals(width_s)
            spans = _spans(counts, width_s, self._pause_s)
            if sum(map(len, spans)) <= max_intervals and width_s >= INTERVAL_SHARDS * self._shard_s:
                break
        return [Stretch(span.start * width_s, width_s, [counts[number] for number in span]) for span in spans]

    @property
    def _shard_s(self) -> float:
        """Time from one shard's end to the next one's: the median distance of intervals with pictures."""
        distances = [after - before for before, after in pairwise(sorted(self.counts))]
        return median(distances or [0]) * self.width_s

    @property
    def _pause_s(self) -> float:
        return max(PAUSE_S, PAUSE_SHARDS * self._shard_s)

    def _in_intervals(self, width_s: int) -> Counter[int]:
        wider: Counter[int] = Counter()
        for number, count in self.counts.items():
            wider[number * self.width_s // width_s] += count
        return wider


def _spans(counts: Counter[int], width_s: int, pause_s: float) -> list[range]:
    """The numbers of the intervals between the pauses."""
    longest = max(pause_s // width_s, PAUSE_INTERVALS)
    numbers = sorted(counts)
    ends = [index for index, (one, other) in enumerate(pairwise(numbers), 1) if other - one > longest]
    bounds = pairwise([0, *ends, len(numbers)])
    return [range(numbers[start], numbers[end - 1] + 1) for start, end in bounds if start < end]
