"""What happens to a server when its processes are killed, its `.env` breaks, or a second one is started."""

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
from processes.lifecycle import HOPELESS
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
)
from tests.tiers import need

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator
    from concurrent.futures import Future
    from pathlib import Path

    from commands.local_server import LocalServer

pytestmark = pytest.mark.server

IN_FLIGHT = 4

SOON_S = 2.0
"""A death is known by then, and every probe answered."""
NOTICED_S = 4.0
"""By then a successor is started."""
LEFT_S = 5.0
"""By then no process is left of a server whose supervisor was killed."""


@dataclass
class Probes:
    """What /health, /readyz and /livez said, one after the other, and the longest that one of them took."""

    server: LocalServer
    slowest_s: float = 0.0
    states: list[str] = field(default_factory=list)

    def ask(self) -> bool:
        """Ask all three; are they good."""
        health = self._get("/health").json()["status"]
        self.states.append(health)
        ready = self._get("/readyz").status_code == httpx.codes.OK
        assert self._get("/livez").status_code == httpx.codes.OK
        return ready and health == "ok"

    def _get(self, path: str) -> httpx.Response:
        asked_s = time.monotonic()
        answer = httpx.get(f"{self.server.url}{path}", timeout=READY_TIMEOUT_S)
        self.slowest_s = max(self.slowest_s, time.monotonic() - asked_s)
        return answer


def wait_until_ready(server: LocalServer) -> None:
    """Wait until it serves."""

    def is_ready() -> bool:
        try:
            return httpx.get(f"{server.url}/readyz", timeout=READY_TIMEOUT_S).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    wait_for(is_ready, bool, READY_TIMEOUT_S)


@dataclass
class Running:
    """A server of this module, and its caller."""

    server: LocalServer
    process: subprocess.Popen[bytes]
    edge: Edge
    key: str


@pytest.fixture(scope="module", params=["machine", "container"])
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The demo on a machine and as in a container; in the end it must stop well, whatever was killed."""
    container = {"BENTOML_CONTAINERIZED": "True"} if request.param == "container" else {}
    folder = tmp_path_factory.mktemp(request.param)
    with started_server(folder, container) as (server, process), Edge(server) as edge:
        wait_until_ready(server)
        yield Running(server, process, edge, edge.upload(png_bytes(scene(300).image)))
        children = psutil.Process(server.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_TIMEOUT_S) == 0
        assert left_after(children, LEFT_S) == []


def in_flight(running: Running, callers: ThreadPoolExecutor) -> list[Future[httpx.Response]]:
    """One more call whose task is claimed; none where an API worker refused it that never met the runner."""
    body = running.edge.body(running.key, "circle")
    answer = callers.submit(running.edge.send, body)
    wait_for(lambda: answer.done() or running.edge.row(body["task_id"]), bool)
    return [] if answer.done() else [answer]


def test_runner_is_killed(running: Running) -> None:
    """Calls in flight end at once, probes tell the truth at once, and the successor serves."""
    runner = runner_of(running.server)
    with ThreadPoolExecutor(IN_FLIGHT) as callers:
        met = callers.map(lambda _: running.edge.ask(running.key, "circle").status_code, range(IN_FLIGHT))
        assert set(met) == {httpx.codes.OK}
        runner.suspend()  # so that the calls wait in it
        answers: list[Future[httpx.Response]] = []
        wait_for(lambda: answers.extend(in_flight(running, callers)), lambda _: len(answers) == IN_FLIGHT)
        probes = Probes(running.server)
        assert probes.ask(), "a runner that is only busy is believed"
        kill(runner)
        killed_s = time.monotonic()
        wait_for(probes.ask, lambda good: not good)
        assert time.monotonic() - killed_s < SOON_S
        refused = running.edge.ask(running.key, "circle")
        assert time.monotonic() - killed_s < 2 * SOON_S
        failures = [error_of(answer.result(SOON_S)) for answer in answers]
    assert {failure[:2] for failure in [*failures, error_of(refused)]} == {(503, "MODEL_NOT_LOADED")}
    assert any("the model's process stopped while it worked" in failure[2] for failure in failures)
    wait_for(probes.ask, bool)
    assert probes.slowest_s < SOON_S
    assert "error" not in probes.states
    assert probes.states.index("loading") < len(probes.states) - 1
    assert "ok" not in probes.states[probes.states.index("loading") : -1]
    assert runner_of(running.server).pid != runner.pid
    assert running.edge.ask(running.key, "circle").status_code == httpx.codes.OK


def test_api_worker_is_killed(running: Running) -> None:
    """Another one is started within seconds, and the other one serves on."""
    wait_until_ready(running.server)
    first, second = children_of(running.server, API_WORKER)
    started = running.server.log_path.read_text().count(f"Service {API_WORKER} initialized")
    kill(first)
    killed_s = time.monotonic()
    wait_for(lambda: len(children_of(running.server, API_WORKER)), lambda count: count == 2)
    assert time.monotonic() - killed_s < NOTICED_S
    ended = f"process {first.pid} (service) ended with status -9"
    wait_for(lambda: ended in running.server.log_path.read_text(), bool)
    assert second in children_of(running.server, API_WORKER)
    wait_for(
        lambda: running.server.log_path.read_text().count(f"Service {API_WORKER} initialized"),
        lambda count: count == started + 1,
    )
    for _ in range(8):  # a new connection each: both workers
        assert httpx.get(f"{running.server.url}/health").json()["status"] == "ok"


def test_second_server_is_refused(running: Running) -> None:
    """On the same DATA_DIR it ends with a sentence, before it has touched a file that serves the first."""
    wait_until_ready(running.server)
    folder = running.server.data_dir
    before = stamps(folder)
    refusal = refused_start(folder, {"BENTOML_HOME": str(folder.parent / "other-home")})
    assert refusal.status != 0
    [sentence] = [line for line in refusal.output.splitlines() if "cannot start: " in line]
    assert f"DATA_DIR {folder} is in use by another server (pid {running.server.pid})" in sentence
    assert "Traceback" not in refusal.output
    assert stamps(folder) == before
    assert running.edge.ask(running.key, "circle").status_code == httpx.codes.OK


def stamps(folder: Path) -> dict[str, int]:
    """When each file was changed that lies in the folder itself; SQLite's own and the log go on changing."""
    moving = {"server.log", "bentoml"}
    return {
        path.name: path.stat().st_mtime_ns
        for path in folder.iterdir()
        if path.name not in moving and not path.name.endswith(("-shm", "-wal", ".sqlite"))
    }


def test_stop_after_a_death(tmp_path: Path) -> None:
    """A signal to stop that comes while a process is started anew is obeyed."""
    with started_server(tmp_path / "data", {"API_WORKERS": "1"}) as (server, process):
        wait_until_ready(server)
        runner = runner_of(server)
        kill(runner)
        wait_for(lambda: children_of(server, RUNNER), lambda found: found and found[0].pid != runner.pid)
        children = psutil.Process(server.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_TIMEOUT_S) == 0
        assert left_after(children, LEFT_S) == []


def test_supervisor_is_killed(tmp_path: Path) -> None:
    """Its processes leave soon, whatever they do, and the folder is free for the next server at once."""
    with started_server(tmp_path / "data", {"API_WORKERS": "1"}) as (server, process), Edge(server) as edge:
        wait_until_ready(server)
        children = psutil.Process(server.pid).children(recursive=True)
        key = edge.upload(png_bytes(scene(300).image))
        assert edge.ask(key, "circle").status_code == httpx.codes.OK
        runner_of(server).suspend()  # a call that never ends
        body = edge.body(key, "circle")
        with ThreadPoolExecutor(1) as callers:
            callers.submit(edge.send, body)
            wait_for(lambda: edge.row(body["task_id"]), bool)
            kill(process)
            killed_s = time.monotonic()
            [suspended] = [child for child in children if child.status() == psutil.STATUS_STOPPED]
            suspended.resume()
            with started_server(tmp_path / "data", {}) as (successor, _):
                assert left_after(children, killed_s + LEFT_S - time.monotonic()) == []
                wait_until_ready(successor)


def test_supervisor_is_killed_early(tmp_path: Path) -> None:
    """Processes that are only being started when the supervisor dies leave too."""
    with started_server(tmp_path / "data", {}) as (server, process):
        wait_for(lambda: len(children_of(server, API_WORKER)), lambda count: count == 2)
        children = psutil.Process(server.pid).children(recursive=True)
        kill(process)
        assert left_after(children, READY_TIMEOUT_S) == []


@pytest.mark.parametrize("after", ["NO_SUCH_SETTING=1\n", f"API_SECRET_KEY={'x' * 20}\n"])
def test_env_file_breaks(tmp_path: Path, after: str) -> None:
    """Processes that are started anew have the settings that were checked, whatever .env says by then."""
    env_file = tmp_path / "my.env"
    env_file.write_text(f"API_SECRET_KEY={API_KEY}\nAPI_WORKERS=1\nMAX_BODY_BYTES=2048\n")
    changes = {"API_SECRET_KEY": None, "ENV_FILE": str(env_file)}
    with started_server(tmp_path / "data", changes) as (server, _), Edge(server) as edge:
        wait_until_ready(server)
        env_file.write_text(after)
        old = [*children_of(server, API_WORKER), runner_of(server)]
        for process in old:
            kill(process)
        wait_until_ready(server)
        assert {child.pid for child in children_of(server, API_WORKER)}.isdisjoint({old[0].pid})
        assert edge.ask(png_bytes(scene(300).image), "circle").status_code == httpx.codes.OK
        info = f"{server.url}/api/v1/model/info"
        assert error_of(httpx.get(info))[:2] == (401, "AUTH_REQUIRED")
        assert error_of(httpx.get(info, headers={"X-API-Key": "x" * 20}))[:2] == (401, "AUTH_INVALID")
        large = edge.http.post("/api/v1/predict", content=b" " * 3000)
        assert error_of(large)[:2] == (413, "FILE_TOO_LARGE")


@pytest.mark.parametrize("service", [API_WORKER, RUNNER])
def test_no_process_serves_on_defaults(tmp_path: Path, service: str) -> None:
    """A process whose settings are wrong ends with the sentence, though the module may be imported so."""
    environment = changed_environment(tmp_path, {"API_SECRET_KEY": None, "API_WORKERS": "two"})
    ended = run_alone(service, environment | {"TMPDIR": os.fspath(tmp_path)})
    assert ended.status == HOPELESS
    assert "cannot serve: API_WORKERS must be a whole number" in ended.output
    assert "Traceback" not in ended.output


@pytest.mark.parametrize("offset_s", [-3600, 600])
def test_clock_that_is_set_delays_no_restart(tmp_path: Path, offset_s: int) -> None:
    """A wall clock that is set an hour back, or ahead, delays neither a restart nor a task."""
    need(missing_clock())
    clock = Clock(tmp_path, "server")
    settings = {**clock.environment(), "API_WORKERS": "1"}
    with started_server(tmp_path / "data", settings) as (server, _), Edge(server) as edge:
        wait_until_ready(server)
        with clock.wrong_by(offset_s):
            for _ in range(2):  # a look that was due when the clock was set may see the first death
                runner = runner_of(server)
                kill(runner)
                wait_for(lambda: {child.pid for child in children_of(server, RUNNER)} - {runner.pid}, bool)  # noqa: B023
            wait_until_ready(server)
            assert edge.ask(scene(300).image, scene(300).names[0]).status_code == httpx.codes.OK
