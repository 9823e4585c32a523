"""Kills processes of a container while it works on tasks, and checks that no task is lost.

    python -m tests.deploy.container_kills --kills 50

Needs root, podman, debootstrap and bubblewrap; builds the image first.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import httpx

from tests.deploy.containers import built_image, container
from tests.drawn import scene
from tests.edge import Edge, png_bytes, wait_for
from tests.server_processes import API_WORKER, RUNNER, children_of, is_decoder, kill

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import psutil

    from tests.deploy.containers import Container, Image

KINDS = ("runner", "API worker", "decoder", "container")
CALLERS = 4
SETTLE_S = 180.0
"""After the last kill; tasks that were killed several times are done one at a time."""


@dataclass(frozen=True, slots=True)
class Kill:
    """One kill, and the time until the next answer."""

    kind: str
    recovery_s: float


@dataclass(slots=True)
class Report:
    """The result of a run.

    Attributes:
        kills: in order.
        tasks: number of tasks that were sent.
        lost: tasks that were not done at the end, with the status of their row.
    """

    kills: list[Kill] = field(default_factory=list)
    tasks: int = 0
    lost: list[tuple[str, str]] = field(default_factory=list)


def kill_and_watch(
    image: Image, folder: Path, *, kills: int, seed: int, on_kill: Callable[[Kill], None] = lambda _: None
) -> Report:
    """Run the image, send tasks continuously, and kill processes of each kind in turn.

    Args:
        image: the image to run.
        folder: of the container, see `container`.
        kills: number of kills.
        seed: of the random choice of processes and times.
        on_kill: called with each kill once the container answers again.
    """
    rng, report = random.Random(seed), Report()  # noqa: S311 - not a secret
    with ExitStack() as stack:
        started = stack.enter_context(container(image, folder, {}))
        callers = Callers()
        for number in range(kills):
            kind = KINDS[number % len(KINDS)]
            with callers.calling(started):
                # So that the kill happens during the work.
                callers.wait_for_answers(3)
                time.sleep(rng.uniform(0.0, 0.3))
                killed_s = time.monotonic()
                if kind == "container":
                    os.kill(started.server.pid, signal.SIGKILL)
                else:
                    kill(rng.choice(_processes(started, kind)))
            if kind == "container":
                stack.close()
                started = stack.enter_context(container(image, folder, {}))
            _wait_for_an_answer(started)
            report.kills.append(Kill(kind, time.monotonic() - killed_s))
            on_kill(report.kills[-1])
        report.tasks = len(callers.bodies)
        report.lost = list(_not_done(started, callers.bodies))
    return report


def _processes(started: Container, kind: str) -> list[psutil.Process]:
    """The running processes of one kind, at least one."""
    workers = children_of(started.server, API_WORKER)
    if kind == "runner":
        return children_of(started.server, RUNNER)
    if kind == "API worker":
        return workers
    return [child for worker in workers for child in worker.children() if is_decoder(child)]


def _wait_for_an_answer(started: Container) -> None:
    """Wait until a new task is answered with 200."""
    with Edge(started.server) as edge:

        def status() -> int | None:
            try:
                return edge.ask(png_bytes(scene(1).image), "circle").status_code
            except httpx.TransportError:
                return None

        wait_for(status, lambda code: code == httpx.codes.OK)


def _not_done(started: Container, bodies: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Send pending tasks again, as the Edge does; wait for all tasks, and yield those that are not done."""
    with Edge(started.server) as edge:
        for body in bodies:
            row = edge.row(body["task_id"])
            if row and row.status == "pending":
                edge.send(body)
        for body in bodies:
            row = edge.settled_row(body["task_id"], SETTLE_S)
            if row.status != "done":
                yield body["task_id"], f"{row.status}: {row.metadata.get('error')}"


class Callers:
    """Several callers that send one task after another.

    Attributes:
        bodies: the tasks that were sent.
        answered: number of tasks that were answered with 200.
    """

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.answered = 0
        self._lock = threading.Lock()

    @contextmanager
    def calling(self, started: Container) -> Iterator[None]:
        """Send tasks to a container until the end of the block."""
        ended = threading.Event()
        with ExitStack() as stack:
            pool = stack.enter_context(ThreadPoolExecutor(CALLERS))
            edges = [stack.enter_context(Edge(started.server)) for _ in range(CALLERS)]
            calls = [pool.submit(self.call, edge, ended) for edge in edges]
            try:
                yield
            finally:
                ended.set()
                for call in calls:
                    call.result()

    def wait_for_answers(self, count: int) -> None:
        """Wait until `count` more tasks are answered with 200."""
        wanted = self.answered + count
        wait_for(lambda: self.answered, lambda answered: answered >= wanted)

    def call(self, edge: Edge, ended: threading.Event) -> None:
        """Send tasks until `ended`."""
        while not ended.is_set():
            number = len(self.bodies)
            body = edge.body(edge.upload(png_bytes(scene(number % 20).image)), "circle")
            edge.insert_row(body)
            with self._lock:
                self.bodies.append(body)
            try:
                answer = edge.send(body)
            except httpx.TransportError:
                continue  # the process was killed; the row has the outcome
            with self._lock:
                self.answered += answer.status_code == httpx.codes.OK


def main() -> None:
    """Build the image, kill processes, and print the report."""
    parser = argparse.ArgumentParser(
        description="Kill processes of a container, and check that no task is lost."
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, built_image(Path(name)) as image:
        folder = Path(name) / "container"
        report = kill_and_watch(image, folder, kills=options.kills, seed=options.seed, on_kill=_print)
    sys.stdout.write(describe(report))


def _print(killed: Kill) -> None:
    sys.stdout.write(f"{killed.kind} killed, answers again after {killed.recovery_s:.1f} s\n")
    sys.stdout.flush()


def describe(report: Report) -> str:
    """The report as text: one line for each kind of kill, and one for each lost task."""
    lines = [f"{report.tasks} tasks, {len(report.kills)} kills, {len(report.lost)} tasks lost"]
    for kind in KINDS:
        times_s = [kill.recovery_s for kill in report.kills if kill.kind == kind]
        if times_s:
            lines.append(
                f"  {kind}: {len(times_s)} kills, answers again after {median(times_s):.1f} s,"
                f" at most {max(times_s):.1f} s"
            )
    lines += [f"  lost: {task_id}, {state}" for task_id, state in report.lost]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
