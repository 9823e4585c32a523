"""Tasks on the real server whose runner dies: they are kept, retried, done once, or given up."""

from __future__ import annotations

import contextlib
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any, Self

import httpx
import psutil
import pytest

from commands.local_server import ROOT, LocalServer, clean_environment, local_server
from tests.drawn import scene
from tests.edge import Edge, error_of, png_bytes, wait_for
from tests.image_files import with_new_bytes
from tests.server_processes import API_KEY, runner_of, wait_until_all_workers_are_ready

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

pytestmark = pytest.mark.server

RESTARTS_TIMEOUT_S = 240.0
"""For several restarts of the runner, on a busy machine."""


@pytest.fixture(scope="module")
def shared_edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    """The caller of a server whose processes may be killed."""
    with local_server(tmp_path_factory.mktemp("kept"), {"API_WORKERS": "2"}) as server, Edge(server) as edge:
        yield edge


@pytest.fixture
def edge(shared_edge: Edge) -> Edge:
    """The caller, once both API workers report a loaded model."""
    wait_until_ready(shared_edge)
    return shared_edge


def wait_until_ready(edge: Edge) -> None:
    wait_until_all_workers_are_ready(edge.server, RESTARTS_TIMEOUT_S)


def select(server: LocalServer, query: str) -> list[tuple[Any, ...]]:
    """Run `SELECT {query}` on the server's outbox file."""
    with closing(sqlite3.connect(f"file:{server.data_dir}/outbox.sqlite?mode=ro", uri=True)) as db:
        return db.execute(f"SELECT {query}").fetchall()


def is_in_progress(server: LocalServer, task_id: str) -> bool:
    return bool(select(server, f"1 FROM attempts WHERE task_id = '{task_id}' AND begun IN (1, 3)"))


def send_and_disconnect(edge: Edge, bodies: Sequence[dict[str, Any]]) -> None:
    """Send requests, and disconnect once all tasks are in progress."""
    with contextlib.ExitStack() as connections:
        for body in bodies:
            connections.enter_context(edge.begin(body))
        wait_for(lambda: [is_in_progress(edge.server, body["task_id"]) for body in bodies], all)


def test_tasks_of_a_dead_runner_are_done_without_their_callers(edge: Edge) -> None:
    """If the callers disconnect and the runner dies, the same attempts still do the tasks."""
    key = edge.upload(png_bytes(scene(600).image))
    bodies = [edge.body(key, scene(600).names[0]) for _ in range(6)]
    runner = runner_of(edge.server)
    runner.suspend()  # so that it dies during the tasks
    send_and_disconnect(edge, bodies)
    attempts = {body["task_id"]: edge.row(body["task_id"]).attempt_id for body in bodies}  # type: ignore[union-attr]
    runner.kill()
    for task_id, attempt_id in attempts.items():
        row = edge.settled_row(task_id, RESTARTS_TIMEOUT_S)
        assert (row.status, row.attempt_id, row.labels) == ("done", attempt_id, [scene(600).names[0]])
    wait_for(lambda: select(edge.server, "count(*) FROM attempts"), lambda left: left == [(0,)])


RUNNER_BUSY_S = 0.03
"""CPU time after which the runner is working; an image takes at least three times as much."""


class Killer:
    """Kills the runner each time it starts to work on one task."""

    def __init__(self, server: LocalServer, task_id: str) -> None:
        self._server = server
        self._task_id = task_id
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="killer")
        self.kills = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _wait_until_busy(self, runner: psutil.Process) -> bool:
        """Wait until the runner works, after the image was decoded; False if the task ends before."""
        before_s = runner.cpu_times().user
        while is_in_progress(self._server, self._task_id):
            if runner.cpu_times().user > before_s + RUNNER_BUSY_S:
                return True
            time.sleep(0.002)
        return False

    def _watch(self) -> None:
        while not self._stopped.wait(0.001):
            if is_in_progress(self._server, self._task_id):
                with contextlib.suppress(psutil.NoSuchProcess, ValueError):
                    runner = runner_of(self._server)
                    if not self._wait_until_busy(runner):
                        continue
                    runner.send_signal(signal.SIGKILL)
                    self.kills += 1
                # Wait until the server has detected the death.
                wait_for(lambda: is_in_progress(self._server, self._task_id), lambda busy: not busy)


def test_only_the_task_that_kills_the_runner_is_given_up(edge: Edge) -> None:
    """A task that kills the runner ends as error after it killed it three times alone; others are done."""
    drawn = scene(601)
    # An image each: for one whose features are held the runner is not busy for long enough.
    keys = [edge.upload(with_new_bytes(png_bytes(drawn.image))) for _ in range(5)]
    bodies = poison, *others = [edge.body(key, drawn.names[0]) for key in keys]
    runner = runner_of(edge.server)
    runner.suspend()  # so that all tasks are in progress before it dies
    send_and_disconnect(edge, bodies)
    with Killer(edge.server, poison["task_id"]) as killer:
        runner.resume()
        row = edge.settled_row(poison["task_id"], RESTARTS_TIMEOUT_S)
        assert row.status == "error"
        assert "stopped 3 times while it worked on this task alone" in str(row.metadata["error_message"])
        # The first kill hits all tasks; a second one may hit another task that the runner works on.
        assert killer.kills in {4, 5}
        for body in others:
            assert edge.settled_row(body["task_id"], RESTARTS_TIMEOUT_S).status == "done"
        wait_until_ready(edge)
        kills = killer.kills
        status, code, message = error_of(edge.send(poison))
        assert (status, code, message) == (500, "INFERENCE_FAILED", row.metadata["error_message"])
        assert edge.row(poison["task_id"]) == row
        assert killer.kills == kills
    assert poison["task_id"] in given_up_tasks(edge.server).stdout
    assert given_up_tasks(edge.server, others[0]["task_id"]).returncode == 1
    # After the operator's command the same task, with the same image, is tried again.
    allowed = given_up_tasks(edge.server, poison["task_id"])
    assert (allowed.returncode, allowed.stderr) == (0, "")
    assert edge.send(poison).status_code == httpx.codes.OK


def given_up_tasks(server: LocalServer, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the operator's command for a running server."""
    return subprocess.run(
        [sys.executable, "-m", "commands.given_up_tasks", *arguments],
        cwd=ROOT,
        env=clean_environment(server.data_dir, API_KEY),
        check=False,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(("arguments", "status"), [([], 1), (["no-uuid"], 2)])
def test_operators_command_refuses_wrong_arguments(tmp_path: Path, arguments: list[str], status: int) -> None:
    """A wrong folder or a wrong id gives an error message."""
    server = LocalServer("", API_KEY, tmp_path, tmp_path, 0, 0.0)
    ended = given_up_tasks(server, *arguments)
    assert ended.returncode == status
    assert "DATA_DIR" in ended.stderr or "invalid UUID value" in ended.stderr
    assert "Traceback" not in ended.stderr
