"""A server whose processes are killed, whose `.env` becomes invalid, or that is started a second time."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import httpx
import psutil
import pytest

from commands.local_server import READY_TIMEOUT_S, STOP_TIMEOUT_S
from processes.lifecycle import EXIT_UNRECOVERABLE
from tests import new_connection
from tests.drawn import scene
from tests.edge import Edge, error_of, png_bytes, wait_for
from tests.faults.clock import Clock
from tests.faults.clock import missing as missing_clock
from tests.server_processes import (
    API_KEY,
    API_WORKER,
    RUNNER,
    changed_environment,
    children_of,
    kill,
    left_after,
    refused_start,
    run_alone,
    runner_of,
    started_server,
    wait_until_all_workers_are_ready,
)
from tests.tiers import need

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator
    from concurrent.futures import Future
    from pathlib import Path

    from commands.local_server import LocalServer

pytestmark = pytest.mark.server

API_WORKERS = 2
"""The default."""
IN_FLIGHT = 4

PROBE_LIMIT_S = 5.0
"""Every probe is answered within this time, and reports a dead runner. On a busy machine: it promises 1 s."""
RESTART_LIMIT_S = 10.0
"""A new process is started within this time. On a busy machine: it takes about a second."""
EXIT_LIMIT_S = 10.0
"""The processes of a killed supervisor end within this time. On a busy machine: they promise 5 s."""


@dataclass
class Probes:
    """The answers of /health, /readyz and /livez in order, and the longest response time."""

    server: LocalServer
    slowest_s: float = 0.0
    states: list[str] = field(default_factory=list)

    def check(self) -> bool:
        """Request all three; returns whether they report a ready server."""
        health = self._get("/health").json()["status"]
        self.states.append(health)
        ready = self._get("/readyz").status_code == httpx.codes.OK
        assert self._get("/livez").status_code == httpx.codes.OK
        return ready and health == "ok"

    def _get(self, path: str) -> httpx.Response:
        asked_s = time.monotonic()
        answer = new_connection.get(f"{self.server.url}{path}", timeout=READY_TIMEOUT_S)
        self.slowest_s = max(self.slowest_s, time.monotonic() - asked_s)
        return answer


def wait_until_ready(server: LocalServer) -> None:
    """Wait until /readyz answers 200."""

    def is_ready() -> bool:
        try:
            return (
                new_connection.get(f"{server.url}/readyz", timeout=READY_TIMEOUT_S).status_code
                == httpx.codes.OK
            )
        except httpx.TransportError:
            return False

    wait_for(is_ready, bool, READY_TIMEOUT_S)


@dataclass
class Running:
    """A running server, its supervisor, and its caller."""

    server: LocalServer
    process: subprocess.Popen[bytes]
    edge: Edge
    key: str


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The demo as in a container, where BentoML itself would restart nothing."""
    folder = tmp_path_factory.mktemp("container")
    with started_server(folder, {"BENTOML_CONTAINERIZED": "True"}) as (server, process), Edge(server) as edge:
        wait_until_ready(server)
        yield Running(server, process, edge, edge.upload(png_bytes(scene(300).image)))


@pytest.fixture
def running(started: Running) -> Running:
    """The demo, with two API workers and a runner that are ready."""
    wait_for(lambda: len(children_of(started.server, API_WORKER)), lambda count: count == API_WORKERS)
    wait_until_all_workers_are_ready(started.server)
    return started


def in_flight(running: Running, callers: ThreadPoolExecutor) -> list[Future[httpx.Response]]:
    """Send one more request; returns it once its task is claimed, and nothing if it was refused."""
    body = running.edge.body(running.key, "circle")
    answer = callers.submit(running.edge.send, body)
    wait_for(lambda: answer.done() or running.edge.row(body["task_id"]), bool)
    return [] if answer.done() else [answer]


def test_killed_runner_is_reported_and_restarted(running: Running) -> None:
    """Requests in flight fail soon, the probes report the death soon, and a new runner serves."""
    runner = runner_of(running.server)
    with ThreadPoolExecutor(IN_FLIGHT) as callers:
        first = callers.map(lambda _: running.edge.ask(running.key, "circle").status_code, range(IN_FLIGHT))
        assert set(first) == {httpx.codes.OK}
        runner.suspend()  # so that it holds the requests
        answers: list[Future[httpx.Response]] = []
        wait_for(lambda: answers.extend(in_flight(running, callers)), lambda _: len(answers) == IN_FLIGHT)
        probes = Probes(running.server)
        assert probes.check(), "a busy runner still counts as ready"
        kill(runner)
        killed_s = time.monotonic()
        wait_for(probes.check, lambda ready: not ready)
        assert time.monotonic() - killed_s < PROBE_LIMIT_S
        refused = running.edge.ask(running.key, "circle")
        assert time.monotonic() - killed_s < 2 * PROBE_LIMIT_S
        failures = [error_of(answer.result(PROBE_LIMIT_S)) for answer in answers]
    assert {failure[:2] for failure in [*failures, error_of(refused)]} == {(503, "MODEL_NOT_LOADED")}
    assert any("the model's process stopped while it worked" in failure[2] for failure in failures)
    wait_for(probes.check, bool)
    assert probes.slowest_s < PROBE_LIMIT_S
    assert "error" not in probes.states
    assert probes.states.index("loading") < len(probes.states) - 1
    assert "ok" not in probes.states[probes.states.index("loading") : -1]
    assert runner_of(running.server).pid != runner.pid
    assert running.edge.ask(running.key, "circle").status_code == httpx.codes.OK


def test_killed_api_worker_is_restarted(running: Running) -> None:
    """A new API worker is started within seconds, and the other one keeps serving."""
    first, second = children_of(running.server, API_WORKER)
    initialized = running.server.log_path.read_text().count(f"Service {API_WORKER} initialized")
    kill(first)
    killed_s = time.monotonic()
    wait_for(lambda: len(children_of(running.server, API_WORKER)), lambda count: count == 2)
    assert time.monotonic() - killed_s < RESTART_LIMIT_S
    ended = f"process {first.pid} (service) ended with status -9"
    wait_for(lambda: ended in running.server.log_path.read_text(), bool)
    assert second in children_of(running.server, API_WORKER)
    wait_for(
        lambda: running.server.log_path.read_text().count(f"Service {API_WORKER} initialized"),
        lambda count: count == initialized + 1,
    )
    for _ in range(8):  # new connections, so that both workers answer
        assert new_connection.get(f"{running.server.url}/health").json()["status"] == "ok"


def test_second_server_on_the_same_folder_is_refused(running: Running) -> None:
    """A second server on one DATA_DIR ends with one sentence, and changes no file of the first."""
    folder = running.server.data_dir
    before = modification_times(folder)
    refusal = refused_start(folder, {"BENTOML_HOME": str(folder.parent / "other-home")})
    assert refusal.status != 0
    [sentence] = [line for line in refusal.output.splitlines() if "cannot start: " in line]
    assert f"DATA_DIR {folder} is in use by another server (pid {running.server.pid})" in sentence
    assert "Traceback" not in refusal.output
    assert modification_times(folder) == before
    assert running.edge.ask(running.key, "circle").status_code == httpx.codes.OK


def modification_times(folder: Path) -> dict[str, int]:
    """Modification times in ns of the folder's files, without the log and SQLite's files, which change."""
    changing = {"server.log", "bentoml"}
    return {
        path.name: path.stat().st_mtime_ns
        for path in folder.iterdir()
        if path.name not in changing and not path.name.endswith(("-shm", "-wal", ".sqlite"))
    }


def test_stop_during_a_restart_works(running: Running) -> None:
    """SIGTERM while a process is being restarted stops the server, which no test uses after this one."""
    kill_runner(running.server)
    children = psutil.Process(running.server.pid).children(recursive=True)
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(STOP_TIMEOUT_S) == 0
    assert left_after(children, EXIT_LIMIT_S) == []


def kill_runner(server: LocalServer) -> None:
    """Kill it, and wait for its successor."""
    runner = runner_of(server)
    kill(runner)
    wait_for(lambda: {child.pid for child in children_of(server, RUNNER)} - {runner.pid}, bool)


def test_processes_of_a_killed_supervisor_end(tmp_path: Path) -> None:
    """They end soon, even during a request, and the next server can use the folder immediately."""
    with started_server(tmp_path / "data", {"API_WORKERS": "1"}) as (server, process), Edge(server) as edge:
        wait_until_ready(server)
        children = psutil.Process(server.pid).children(recursive=True)
        key = edge.upload(png_bytes(scene(300).image))
        assert edge.ask(key, "circle").status_code == httpx.codes.OK
        runner_of(server).suspend()  # so that the request does not end
        body = edge.body(key, "circle")
        with ThreadPoolExecutor(1) as callers:
            callers.submit(edge.send, body)
            wait_for(lambda: edge.row(body["task_id"]), bool)
            kill(process)
            killed_s = time.monotonic()
            [suspended] = [child for child in children if child.status() == psutil.STATUS_STOPPED]
            suspended.resume()
            with started_server(tmp_path / "data", {"API_WORKERS": "1"}) as (successor, _):
                assert left_after(children, killed_s + EXIT_LIMIT_S - time.monotonic()) == []
                wait_until_ready(successor)


def test_starting_processes_of_a_killed_supervisor_end(tmp_path: Path) -> None:
    """Processes that are still starting when the supervisor is killed end too."""
    with started_server(tmp_path / "data", {}) as (server, process):
        wait_for(lambda: len(children_of(server, API_WORKER)), lambda count: count == 2)
        children = psutil.Process(server.pid).children(recursive=True)
        kill(process)
        assert left_after(children, READY_TIMEOUT_S) == []


def test_restarted_processes_keep_the_checked_settings(tmp_path: Path) -> None:
    """Restarted processes use the settings that were checked at the start, even if .env has changed."""
    env_file = tmp_path / "my.env"
    env_file.write_text(f"API_SECRET_KEY={API_KEY}\nAPI_WORKERS=1\nMAX_BODY_BYTES=2048\n")
    changes = {"API_SECRET_KEY": None, "ENV_FILE": str(env_file)}
    with started_server(tmp_path / "data", changes) as (server, _), Edge(server) as edge:
        wait_until_ready(server)
        for wrong in ("NO_SUCH_SETTING=1\n", f"API_SECRET_KEY={'x' * 20}\n"):
            env_file.write_text(wrong)
            old = [*children_of(server, API_WORKER), runner_of(server)]
            for process in old:
                kill(process)
            wait_until_ready(server)
            assert {child.pid for child in children_of(server, API_WORKER)}.isdisjoint({old[0].pid})
            check_settings(edge)


def check_settings(edge: Edge) -> None:
    """The server does a task, knows the key of its start and no other, and limits the body."""
    assert edge.ask(png_bytes(scene(300).image), "circle").status_code == httpx.codes.OK
    info = f"{edge.server.url}/api/v1/model/info"
    assert error_of(new_connection.get(info))[:2] == (401, "AUTH_REQUIRED")
    wrong = {"X-API-Key": "x" * 20}
    assert error_of(new_connection.get(info, headers=wrong))[:2] == (401, "AUTH_INVALID")
    large = edge.http.post("/api/v1/predict", content=b" " * 3000)
    assert error_of(large)[:2] == (413, "FILE_TOO_LARGE")


@pytest.mark.parametrize("service", [API_WORKER, RUNNER])
def test_process_with_wrong_settings_ends(tmp_path: Path, service: str) -> None:
    """A process with wrong settings ends with an error message, instead of serving on defaults."""
    environment = changed_environment(tmp_path, {"API_SECRET_KEY": None, "API_WORKERS": "two"})
    ended = run_alone(service, environment | {"TMPDIR": os.fspath(tmp_path)})
    assert ended.status == EXIT_UNRECOVERABLE
    assert "cannot serve: API_WORKERS must be a whole number" in ended.output
    assert "Traceback" not in ended.output


def test_changed_clock_delays_no_restart(tmp_path: Path) -> None:
    """A wall clock that is set back or forward delays neither a restart nor a task."""
    need(missing_clock())
    clock = Clock(tmp_path, "server")
    settings = {**clock.environment(), "API_WORKERS": "1"}
    with started_server(tmp_path / "data", settings) as (server, _), Edge(server) as edge:
        wait_until_ready(server)
        for offset_s in (-3600, 600):
            with clock.wrong_by(offset_s):
                for _ in range(2):  # a check that was scheduled before the change may see the first death
                    kill_runner(server)
                wait_until_ready(server)
                assert edge.ask(scene(300).image, scene(300).names[0]).status_code == httpx.codes.OK
