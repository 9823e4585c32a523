"""Tasks on the real server whose model's process dies: kept, begun again, done once, or given up."""

from __future__ import annotations

import contextlib
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Any, Self

import httpx
import psutil
import pytest

from commands.local_server import ROOT, LocalServer, clean_environment, local_server
from tests.drawn import scene
from tests.edge import PREDICT, Edge, error_of, png_bytes, wait_for
from tests.server_processes import API_KEY, runner_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.server

RESTARTS_TIMEOUT_S = 240.0
"""For a few starts of the model's process, one after another, on a busy machine."""


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    """The caller of a server whose processes may be killed."""
    with local_server(tmp_path_factory.mktemp("kept"), {"API_WORKERS": "2"}) as server, Edge(server) as edge:
        yield edge


def wait_until_ready(edge: Edge) -> None:
    """Until both API workers know that the model is there."""

    def states() -> set[str]:
        # A new connection each: either worker may get it.
        return {httpx.get(f"{edge.server.url}/health").json()["status"] for _ in range(12)}

    wait_for(states, lambda found: found == {"ok"}, timeout_s=RESTARTS_TIMEOUT_S)


def on_file(server: LocalServer, what: str) -> list[tuple[Any, ...]]:
    """What the server's file of attempts says."""
    with closing(sqlite3.connect(f"file:{server.data_dir}/outbox.sqlite?mode=ro", uri=True)) as db:
        return db.execute(f"SELECT {what}").fetchall()


def is_at_work(server: LocalServer, task_id: str) -> bool:
    return bool(on_file(server, f"1 FROM attempts WHERE task_id = '{task_id}' AND begun IN (1, 3)"))


def hang_up(edge: Edge, body: dict[str, Any]) -> None:
    """Send a request, and be gone before there is an answer."""
    with contextlib.suppress(httpx.ReadTimeout):
        httpx.post(f"{edge.server.url}{PREDICT}", json=body, headers=edge.server.headers, timeout=0.5)


def test_tasks_of_a_dead_runner_are_done_without_their_callers(edge: Edge) -> None:
    """Tasks whose callers hung up stay ours when the runner dies, and are done by the same attempts."""
    key = edge.upload(png_bytes(scene(600).image))
    bodies = [edge.body(key, scene(600).names[0]) for _ in range(6)]
    wait_until_ready(edge)
    runner = runner_of(edge.server)
    runner.suspend()  # the tasks are at work when it dies
    with ThreadPoolExecutor(len(bodies)) as callers:
        list(callers.map(lambda body: hang_up(edge, body), bodies))
    wait_for(lambda: [is_at_work(edge.server, body["task_id"]) for body in bodies], all)
    attempts = {body["task_id"]: edge.row(body["task_id"]).attempt_id for body in bodies}  # type: ignore[union-attr]
    runner.kill()
    for task_id, attempt_id in attempts.items():
        row = edge.settled_row(task_id, RESTARTS_TIMEOUT_S)
        assert (row.status, row.attempt_id, row.labels) == ("done", attempt_id, [scene(600).names[0]])
    wait_for(lambda: on_file(edge.server, "count(*) FROM attempts"), lambda left: left == [(0,)])


RUNNER_WORKS_S = 0.03
"""CPU time by which one sees that the runner works; an image takes it three times as much or more."""


class Killer:
    """Kills the model's process whenever the work on one task begins."""

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

    def _is_with(self, runner: psutil.Process) -> bool:
        """Wait until the runner works: before that the task's image is decoded elsewhere."""
        before_s = runner.cpu_times().user
        while is_at_work(self._server, self._task_id):
            if runner.cpu_times().user > before_s + RUNNER_WORKS_S:
                return True
            time.sleep(0.002)
        return False

    def _watch(self) -> None:
        while not self._stopped.wait(0.001):
            if is_at_work(self._server, self._task_id):
                with contextlib.suppress(psutil.NoSuchProcess, ValueError):
                    runner = runner_of(self._server)
                    if not self._is_with(runner):
                        continue
                    runner.send_signal(signal.SIGKILL)
                    self.kills += 1
                # Until the server has noticed.
                wait_for(lambda: is_at_work(self._server, self._task_id), lambda at_work: not at_work)


def test_task_that_kills_the_runner_is_given_up_alone(edge: Edge) -> None:
    """A task that kills the runner ends as an error after three deaths alone; its neighbours are done."""
    drawn = scene(601)
    key = edge.upload(png_bytes(drawn.image))
    poison, *neighbours = [edge.body(key, drawn.names[0]) for _ in range(5)]
    wait_until_ready(edge)
    with Killer(edge.server, poison["task_id"]) as killer, ThreadPoolExecutor(5) as callers:
        list(callers.map(lambda body: hang_up(edge, body), [poison, *neighbours]))
        row = edge.settled_row(poison["task_id"], RESTARTS_TIMEOUT_S)
        assert row.status == "error"
        assert "stopped 3 times while it worked on this task alone" in str(row.metadata["error_message"])
        # The first is beside its neighbours; another may come while the runner works for one of them.
        assert killer.kills in {4, 5}
        for body in neighbours:
            assert edge.settled_row(body["task_id"], RESTARTS_TIMEOUT_S).status == "done"
        wait_until_ready(edge)
        status, code, message = error_of(edge.send(poison))
        assert (status, code, message) == (500, "INFERENCE_FAILED", row.metadata["error_message"])
        assert edge.row(poison["task_id"]) == row
        assert killer.kills == 4
    assert poison["task_id"] in given_up_tasks(edge.server).stdout
    assert given_up_tasks(edge.server, neighbours[0]["task_id"]).returncode == 1
    # Another picture in the same place is another matter.
    edge.upload(png_bytes(scene(602).image), name=key.rpartition("/")[2])
    assert edge.send(poison).status_code == httpx.codes.OK


def given_up_tasks(server: LocalServer, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The operator's command, beside the running server."""
    return subprocess.run(
        [sys.executable, "-m", "commands.given_up_tasks", *arguments],
        cwd=ROOT,
        env=clean_environment(server.data_dir, API_KEY),
        check=False,
        capture_output=True,
        text=True,
    )


def test_operator_lets_a_given_up_task_be_tried_again(edge: Edge) -> None:
    """After the operator's word the same task, with the same picture, is done."""
    body = edge.body(edge.upload(png_bytes(scene(605).image)), scene(605).names[0])
    wait_until_ready(edge)
    with Killer(edge.server, body["task_id"]):
        hang_up(edge, body)
        assert edge.settled_row(body["task_id"], RESTARTS_TIMEOUT_S).status == "error"
    forgiven = given_up_tasks(edge.server, body["task_id"])
    assert (forgiven.returncode, forgiven.stderr) == (0, "")
    wait_until_ready(edge)
    assert edge.send(body).status_code == httpx.codes.OK


@pytest.mark.parametrize(("arguments", "status"), [([], 1), (["no-uuid"], 2)])
def test_operators_command_explains_itself(tmp_path: Path, arguments: list[str], status: int) -> None:
    """A wrong folder or a wrong id is a sentence."""
    server = LocalServer("", API_KEY, tmp_path, tmp_path, 0, 0.0)
    ended = given_up_tasks(server, *arguments)
    assert ended.returncode == status
    assert "DATA_DIR" in ended.stderr or "invalid UUID value" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_call_in_flight_is_answered_when_the_runner_dies(edge: Edge) -> None:
    """A caller is told at once that its task is kept, and can have the result later."""
    wait_until_ready(edge)
    body = edge.body(edge.upload(png_bytes(scene(603).image)), scene(603).names[0])
    runner = runner_of(edge.server)
    runner.suspend()
    with ThreadPoolExecutor(1) as caller:
        sent = caller.submit(edge.send, body)
        wait_for(lambda: is_at_work(edge.server, body["task_id"]), bool)
        runner.kill()
        killed_s = time.monotonic()
        status, code, message = error_of(sent.result())
        assert time.monotonic() - killed_s < 10, "it has waited for its own timeout"
    assert (status, code) == (503, "MODEL_NOT_LOADED")
    assert "the task is kept" in message
    assert edge.settled_row(body["task_id"], RESTARTS_TIMEOUT_S).status == "done"
    assert edge.send(body).json()["labels"] == [scene(603).names[0]]


def test_damaged_outbox_does_not_stop_the_start(tmp_path: Path) -> None:
    """A server whose file of attempts is damaged starts with an empty one, and says so in its log."""
    (tmp_path / "outbox.sqlite").write_bytes(b"no database" * 100)
    with local_server(tmp_path) as server, Edge(server) as edge:
        assert edge.ask(scene(604).image, scene(604).names[0]).status_code == httpx.codes.OK
        assert "outbox.sqlite is damaged" in server.log_path.read_text()
    assert list(tmp_path.glob("outbox.sqlite.damaged-*"))
