"""Records faults with their times, and violations."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Note:
    """The start or end of a fault, or of a part of the run."""

    at_s: float
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{clock_time(self.at_s)} {self.kind}{': ' if self.text else ''}{self.text}"


@dataclass(frozen=True, slots=True)
class Violation:
    """A violated invariant, with its task if it concerns one."""

    invariant: str
    text: str
    task_id: str | None = None


class FaultLog:
    """The faults of a run; safe for use by several threads.

    Attributes:
        notes: all notes, in order.
        violations: found by threads during the faults.
        last_fault_s: monotonic time when the last fault ended.
        first_of_round: index of the first note of this round.
    """

    def __init__(self) -> None:
        self.notes: list[Note] = []
        self.violations: list[Violation] = []
        self.last_fault_s = time.monotonic()
        self.first_of_round = 0
        self._lock = threading.Lock()

    def fault(self, kind: str, text: str = "") -> None:
        """Record the start or end of a fault."""
        with self._lock:
            self.notes.append(Note(time.time(), kind, text))
            self.last_fault_s = time.monotonic()

    def begin_round(self) -> None:
        """Start a new round."""
        self.first_of_round = len(self.notes)

    def violated(self, invariant: str, text: str, task_id: str | None = None) -> None:
        """Record a violation."""
        with self._lock:
            self.violations.append(Violation(invariant, f"{clock_time(time.time())} {text}", task_id))

    def counts(self) -> Counter[str]:
        """Number of faults of each kind."""
        return Counter(note.kind for note in self.notes if not note.kind.startswith("("))


def rng_for(seed: int, *names: object) -> random.Random:
    """The random generator of one part of a run, independent of the other parts."""
    return random.Random(f"{seed}/{'/'.join(map(str, names))}")  # noqa: S311 - not a secret


def clock_time(at_s: float) -> str:
    """A Unix time in the format of the servers' logs, with tenths of a second."""
    return time.strftime("%H:%M:%S", time.localtime(at_s)) + f".{int(at_s * 10) % 10}"
