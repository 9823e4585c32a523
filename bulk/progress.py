"""How far a run is: on the terminal, for Prometheus, and in numbers for its summary."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Protocol, Self

from prometheus_client import CollectorRegistry, Gauge, start_http_server
from prometheus_client import Counter as PrometheusCounter
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType

    from bulk.stages.blocks import ShardOutcome

LINE_INTERVAL_S = 10.0
QUIET_S = 60.0
WINDOW_S = 60.0
"""Rate and share are those of the last minute: they include no start, and follow what changes."""


@dataclass(slots=True)
class RunState:
    """What is done of a run.

    Attributes:
        total: pictures of the plan.
        streams: batches that all models together compute at once.
        kept: pictures that were done before.
        done: pictures of this run, error rows included.
        errors: pictures by code.
    """

    total: int
    streams: int
    kept: int = 0
    done: int = 0
    instances: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    _finished: list[tuple[float, ShardOutcome]] = field(default_factory=list)

    def add(self, outcome: ShardOutcome) -> None:
        """Count a shard."""
        now_s = time.monotonic()
        self.done += outcome.pictures
        self.instances += outcome.instances
        self.errors.update(outcome.errors)
        self._finished.append((now_s, outcome))
        while len(self._finished) > 2 and self._finished[1][0] < now_s - WINDOW_S:
            del self._finished[0]

    @property
    def failed(self) -> int:
        """Error rows of this run."""
        return self.errors.total()

    @property
    def rate(self) -> float | None:
        """Pictures a second of the last minute; None before the second shard."""
        return self._per_second([outcome.pictures for _, outcome in self._finished])

    @property
    def busy_share(self) -> float | None:
        """Of the last minute, the share in which a stream had work, the mean over the streams."""
        busy = self._per_second([outcome.inference_s for _, outcome in self._finished])
        return None if busy is None else min(1.0, busy / max(1, self.streams))

    def _per_second(self, values: Sequence[float]) -> float | None:
        """Of the shards after the first one, at whose end the time begins."""
        if len(values) < 2:
            return None
        return sum(values[1:]) / max(time.monotonic() - self._finished[0][0], 1e-3)

    @property
    def left_s(self) -> float | None:
        """Estimated time to the end."""
        return (self.total - self.kept - self.done) / self.rate if self.rate else None


class Display(Protocol):
    """Shows the state of a run, inside its `with`."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def show(self, state: RunState) -> None:
        """The state has changed."""

    def say(self, line: str) -> None:
        """Show a line, such as the step that begins."""


def display_of() -> Display:
    """A bar in a terminal, plain lines elsewhere; on stderr."""
    console = Console(stderr=True, highlight=False)
    return _Bar(console) if console.is_terminal else _Lines()


def line_of(state: RunState) -> str:
    """What a person wants to know."""
    parts = [f"{state.kept + state.done:,} of {state.total:,} pictures"]
    if state.rate is not None:
        parts.append(f"{state.rate:.1f}/s")
    parts.append(f"{state.failed:,} failed")
    if state.busy_share is not None:
        parts.append(f"model busy {state.busy_share:.0%}")
    if state.left_s is not None:
        parts.append(f"{duration(state.left_s)} left")
    return ", ".join(parts)


def duration(time_s: float) -> str:
    """Such as 42 s, 12 min, 3 h 05 min or 9 d 4 h."""
    if time_s < 100:
        return f"{time_s:.0f} s"
    minutes = round(time_s / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"


class _Bar:
    def __init__(self, console: Console) -> None:
        self._progress = Progress(BarColumn(), TextColumn("{task.description}"), console=console)
        self._task = self._progress.add_task("starting", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, state: RunState) -> None:
        self._progress.update(
            self._task, total=state.total, completed=state.kept + state.done, description=line_of(state)
        )

    def say(self, line: str) -> None:
        self._progress.console.print(line, markup=False)


class _Lines:
    def __init__(self) -> None:
        self._shown_s = float("-inf")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def show(self, state: RunState) -> None:
        now_s = time.monotonic()
        if now_s - self._shown_s >= LINE_INTERVAL_S or state.kept + state.done == state.total:
            self._shown_s = now_s
            self.say(line_of(state))

    def say(self, line: str) -> None:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


@contextmanager
def waiting_shown(display: Display, first_s: float = QUIET_S) -> Iterator[Callable[[], None]]:
    """Says, after one minute without a shard, after two, four and so on, that the run waits.

    Yields what is called whenever a shard has ended.
    """
    events = SimpleQueue[bool]()  # whether the block has ended

    def watch() -> None:
        waited_s = 0.0
        while True:
            next_s = max(waited_s, first_s)
            try:
                if events.get(timeout=next_s):
                    return
                waited_s = 0.0
            except Empty:
                waited_s += next_s
                display.say(
                    f"no shard has ended for {duration(waited_s)}: the model or a store is slow or away"
                )

    threading.Thread(target=watch, name="waiting", daemon=True).start()
    try:
        yield lambda: events.put(False)  # noqa: FBT003 - an event
    finally:
        events.put(True)  # noqa: FBT003 - an event


class RunMetrics:
    """The state of a run for Prometheus, on this machine's loopback address.

    Args:
        port: to listen on; None: no metrics. 0: any that is free.

    Raises:
        OSError: the port is taken.
    """

    def __init__(self, port: int | None) -> None:
        registry = CollectorRegistry()
        self._planned = Gauge("sam3_bulk_pictures_planned", "Pictures of the run.", registry=registry)
        self._kept = Gauge("sam3_bulk_pictures_kept", "Done before this command.", registry=registry)
        self._done = PrometheusCounter(
            "sam3_bulk_pictures",
            "Pictures by outcome: done, or the code of the error.",
            ["outcome"],
            registry=registry,
        )
        self._instances = PrometheusCounter("sam3_bulk_instances", "Instances found.", registry=registry)
        self._inference = PrometheusCounter(
            "sam3_bulk_inference_seconds", "Time in which streams computed, their sum.", registry=registry
        )
        self._streams = Gauge("sam3_bulk_streams", "Batches that models compute at once.", registry=registry)
        self._left = Gauge("sam3_bulk_left_seconds", "Estimated time to the end.", registry=registry)
        self.port: int | None = None
        self._server = None
        if port is not None:
            self._server, _ = start_http_server(port, addr="127.0.0.1", registry=registry)
            self.port = self._server.server_port

    def show(self, state: RunState, outcome: ShardOutcome | None = None) -> None:
        """The state has changed, by this shard."""
        self._planned.set(state.total)
        self._kept.set(state.kept)
        self._streams.set(state.streams)
        if state.left_s is not None:
            self._left.set(state.left_s)
        if outcome is None:
            return
        self._done.labels("done").inc(outcome.pictures - sum(outcome.errors.values()))
        for code, pictures in outcome.errors.items():
            self._done.labels(code).inc(pictures)
        self._instances.inc(outcome.instances)
        self._inference.inc(outcome.inference_s)

    def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
