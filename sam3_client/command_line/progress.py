"""Shows on stderr how far a run is: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Protocol, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

if TYPE_CHECKING:
    from types import TracebackType

    from rich.progress import Task

LINE_INTERVAL_S = 10.0


class Report(Protocol):
    """What a run tells while it goes on."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def advance(self) -> None:
        """One more picture is done or has failed."""

    def say(self, line: str) -> None:
        """Show a line."""


def report_of(total: int) -> Report:
    """What suits stderr."""
    console = Console(stderr=True, highlight=False)
    return _Bar(console, total) if console.is_terminal else _Lines(total)


def shown(text: str) -> str:
    """A name or message from elsewhere, without what could control a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.1f}/s")


class _Bar:
    def __init__(self, console: Console, total: int) -> None:
        columns = (TextColumn("pictures"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console)
        self._task = self._progress.add_task("", total=total)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def advance(self) -> None:
        self._progress.advance(self._task)

    def say(self, line: str) -> None:
        self._progress.console.print(Text(line))


class _Lines:
    def __init__(self, total: int) -> None:
        self._total = total
        self._count = 0
        self._start_s = self._last_s = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def advance(self) -> None:
        self._count += 1
        now_s = time.monotonic()
        if now_s - self._last_s >= LINE_INTERVAL_S or self._count == self._total:
            self._last_s = now_s
            rate = self._count / max(now_s - self._start_s, 1e-3)
            left_s = (self._total - self._count) / rate
            self.say(f"{self._count} of {self._total} pictures, {rate:.1f}/s, {left_s:.0f} s left")

    def say(self, line: str) -> None:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
