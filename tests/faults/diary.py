"""What was done to the servers and when, and what was found wrong."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Note:
    """One fault, or the start or end of a part of the run."""

    at_s: float
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{clock_time(self.at_s)} {self.kind}{': ' if self.text else ''}{self.text}"


@dataclass(frozen=True, slots=True)
class Violation:
    """An invariant that did not hold, and for which task, if it is one task's."""

    invariant: str
    text: str
    task_id: str | None = None


class Diary:
    """The faults of a run; any thread may write.

    Attributes:
        notes: all, in order.
        violations: what threads found wrong while the faults went on.
        last_fault_s: when the last one was over, by `time.monotonic`.
        first_of_round: where the notes of this round begin.
    """

    def __init__(self) -> None:
        self.notes: list[Note] = []
        self.violations: list[Violation] = []
        self.last_fault_s = time.monotonic()
        self.first_of_round = 0
        self._lock = threading.Lock()

    def fault(self, kind: str, text: str = "") -> None:
        """A fault begins or is over."""
        with self._lock:
            self.notes.append(Note(time.time(), kind, text))
            self.last_fault_s = time.monotonic()

    def begin_round(self) -> None:
        """From here on the notes are the next round's."""
        self.first_of_round = len(self.notes)

    def violated(self, invariant: str, text: str, task_id: str | None = None) -> None:
        """An invariant does not hold."""
        with self._lock:
            self.violations.append(Violation(invariant, f"{clock_time(time.time())} {text}", task_id))

    def counts(self) -> Counter[str]:
        """How often each kind of fault was done."""
        return Counter(note.kind for note in self.notes if not note.kind.startswith("("))


def drawn(seed: int, *names: object) -> random.Random:
    """The stream of one part of a run: the same for the same seed, whatever the other parts draw."""
    return random.Random(f"{seed}/{'/'.join(map(str, names))}")  # noqa: S311 - no secrets


def clock_time(at_s: float) -> str:
    """A Unix time as the servers' logs write it, to the tenth of a second."""
    return time.strftime("%H:%M:%S", time.localtime(at_s)) + f".{int(at_s * 10) % 10}"
