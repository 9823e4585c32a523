"""A server with two runners: both work, one dies and comes back, and a stop waits for both."""

from __future__ import annotations

import itertools
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest

from commands.local_server import READY_TIMEOUT_S, LocalServer, ServerFailedError, local_server
from tests import new_connection
from tests.drawn import scene
from tests.edge import Edge, error_of, png_bytes, wait_for
from tests.server_processes import (
    LOST_GPUS_FILE,
    RUNNER,
    children_of,
    kill,
    left_after,
    runner_of,
    started_server,
)
from tests.test_metrics import total

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.server

RUNNERS = (RUNNER, "sam3_runner_1")
CALLERS = 4
SEEDS = itertools.count(300)
SETTINGS = {"GPUS": "2", "API_WORKERS": "1"}
"""One worker, which knows of all requests: with two, a request may be sent to the runner that hangs."""
STOP_LIMIT_S = 30.0
"""Much less than a runner waits for processes that do not end."""


@pytest.fixture(scope="module")
def started(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[LocalServer, subprocess.Popen[bytes]]]:
    """A server with two runners on the CPU and one API worker, and its supervisor."""
    with started_server(tmp_path_factory.mktemp("runners"), SETTINGS) as (server, process):
        wait_for(lambda: _are_ready(server), bool, READY_TIMEOUT_S)
        yield server, process


def _are_ready(server: LocalServer) -> bool:
    try:
        return states(server) == ["ok", "ok"]
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def edge(started: tuple[LocalServer, subprocess.Popen[bytes]]) -> Iterator[Edge]:
    """A caller of `started`."""
    with Edge(started[0]) as caller:
        yield caller


def new_image(edge: Edge) -> str:
    """The key of an image that no runner has had, so that any may get it."""
    return edge.upload(png_bytes(scene(next(SEEDS)).image))


def states(server: LocalServer) -> list[str]:
    """The runners' states, as /health has them."""
    return [runner["state"] for runner in new_connection.get(f"{server.url}/health").json()["runners"]]


def calls_of(server: LocalServer, runner: str) -> float:
    """How many requests a runner has answered."""
    return total(server, "bentoml_service_request_total", runner_name=runner, endpoint="/segment")


def in_progress(server: LocalServer, runner: str) -> float:
    """How many requests a runner is answering."""
    return total(server, "bentoml_service_request_in_progress", runner_name=runner, endpoint="/segment")


def test_both_runners_work(edge: Edge) -> None:
    """Concurrent requests go to both runners, and all are answered."""
    keys = [new_image(edge) for _ in range(4 * CALLERS)]
    before = [calls_of(edge.server, runner) for runner in RUNNERS]
    with ThreadPoolExecutor(CALLERS) as callers:
        answers = list(callers.map(lambda key: edge.ask(key, "circle").status_code, keys))
    assert set(answers) == {httpx.codes.OK}
    after = [calls_of(edge.server, runner) for runner in RUNNERS]
    assert sum(after) - sum(before) == len(answers)
    assert min(now - then for now, then in zip(after, before, strict=True)) >= CALLERS
    assert total(edge.server, "sam3_model_ready") == len(RUNNERS)


def test_killed_runner_takes_no_task_with_it(edge: Edge) -> None:
    """The requests of a runner that dies are kept and done; the other one answers meanwhile; it returns."""
    server, second = edge.server, RUNNERS[1]
    [dying] = children_of(server, second)
    living = runner_of(server)
    bodies = [edge.body(new_image(edge), "circle") for _ in range(2 * CALLERS)]
    decoded = total(server, "sam3_stage_seconds_count", stage="decode")
    with ThreadPoolExecutor(len(bodies)) as callers, suspended(dying):  # so that it holds what it gets
        for body in bodies:
            edge.insert_row(body)
        calls = [callers.submit(edge.send, body) for body in bodies]
        wait_for(
            lambda: total(server, "sam3_stage_seconds_count", stage="decode"),
            lambda count: count == decoded + len(bodies),
        )
        # Until the living runner has answered, the next request may be sent to the suspended one.
        wait_for(lambda: in_progress(server, RUNNER), lambda count: count == 0)
        assert edge.ask(new_image(edge), "circle").status_code == httpx.codes.OK
        attempts = [attempt_of(edge, body) for body in bodies]
        kill(dying)
        answers = [call.result() for call in calls]
    kept = [index for index, answer in enumerate(answers) if answer.status_code != httpx.codes.OK]
    assert 0 < len(kept) < len(bodies)
    for index in kept:
        status, code, message = error_of(answers[index])
        assert (status, code) == (503, "MODEL_NOT_LOADED")
        assert "the model's process stopped while it worked; the task is kept" in message
    # The other one answers while this one starts.
    wait_for(lambda: states(server), lambda found: found == ["ok", "loading"])
    assert new_connection.get(f"{server.url}/readyz").status_code == httpx.codes.OK
    assert edge.ask(new_image(edge), "circle").status_code == httpx.codes.OK
    for body, attempt_id in zip(bodies, attempts, strict=True):
        row = edge.settled_row(body["task_id"])
        assert (row.status, row.attempt_id) == ("done", attempt_id)
    wait_for(lambda: states(server), lambda found: found == ["ok", "ok"], READY_TIMEOUT_S)
    assert [runner.pid for runner in children_of(server, second)] != [dying.pid]
    assert runner_of(server).pid == living.pid
    test_both_runners_work(edge)


@contextmanager
def suspended(process: psutil.Process) -> Iterator[None]:
    """The process stands still until the end of the block, or until it is killed."""
    process.suspend()
    try:
        yield
    finally:
        with suppress(psutil.NoSuchProcess):
            process.resume()


def attempt_of(edge: Edge, body: dict[str, Any]) -> str | None:
    row = edge.row(body["task_id"])
    assert row is not None
    return row.attempt_id


def test_stop_lets_requests_of_both_runners_end(
    started: tuple[LocalServer, subprocess.Popen[bytes]], edge: Edge
) -> None:
    """At a stop the runners outlive the API workers, and do not wait for each other.

    No test of this server comes after this one.
    """
    server, process = started
    key = new_image(edge)
    runners = [child for name in RUNNERS for child in children_of(server, name)]
    children = psutil.Process(server.pid).children(recursive=True)
    bodies = [edge.body(key, "circle") for _ in range(CALLERS)]
    decoded = total(server, "sam3_stage_seconds_count", stage="decode")
    for runner in runners:
        runner.suspend()  # so that the requests are in progress at the stop
    with ThreadPoolExecutor(CALLERS) as callers:
        for body in bodies:
            edge.insert_row(body)
        calls = [callers.submit(edge.send, body) for body in bodies]
        wait_for(
            lambda: total(server, "sam3_stage_seconds_count", stage="decode"),
            lambda count: count == decoded + len(bodies),
        )
        process.send_signal(signal.SIGTERM)
        for runner in runners:
            runner.resume()
        assert {call.result().status_code for call in calls} == {httpx.codes.OK}
    assert process.wait(STOP_LIMIT_S) == 0
    assert left_after(children, STOP_LIMIT_S) == []


FAILING = "tests.failing_service:SegmentationService"


def test_runner_that_cannot_come_back_does_not_end_the_server(tmp_path: Path) -> None:
    """A runner whose GPU is lost stays away and is reported; the other one serves, and is still restarted."""
    lost = tmp_path / "lost"
    settings = {"GPUS": "2", "API_WORKERS": "1", LOST_GPUS_FILE: str(lost)}
    with local_server(tmp_path / "data", settings, service=FAILING) as server, Edge(server) as edge:
        wait_for(lambda: states(server), lambda found: found == ["ok", "ok"], READY_TIMEOUT_S)
        lost.write_text("1")
        [second] = children_of(server, RUNNERS[1])
        kill(second)
        wait_for(lambda: states(server), lambda found: found == ["ok", "error"], READY_TIMEOUT_S)
        health = new_connection.get(f"{server.url}/health").json()
        assert health["status"] == "ok"
        assert health["runners"][1]["detail"].startswith("the model's process has ended for good")
        key = edge.upload(png_bytes(scene(300).image))
        assert edge.ask(key, "circle").status_code == httpx.codes.OK
        first = runner_of(server)
        kill(first)
        wait_for(lambda: states(server), lambda found: found == ["loading", "error"])
        wait_for(lambda: states(server), lambda found: found == ["ok", "error"], READY_TIMEOUT_S)
        assert edge.ask(key, "circle").status_code == httpx.codes.OK
        log = server.log_path.read_text()
        assert children_of(server, RUNNERS[1]) == []
    assert "the model cannot be loaded: the GPU is lost" in log
    assert "(service_sam3_runner_1) has ended for good; the others like it serve on" in log


def test_server_ends_without_any_model(tmp_path: Path) -> None:
    """Where no runner can load the model, the server ends with a sentence, as it does with one runner."""
    lost = tmp_path / "lost"
    lost.write_text("0 1")
    settings = {"GPUS": "2", "API_WORKERS": "1", LOST_GPUS_FILE: str(lost)}
    with (
        pytest.raises(
            ServerFailedError, match=r"cannot serve: process \d+ \(service_sam3_runner_\d\) has ended"
        ),
        local_server(tmp_path / "data", settings, service=FAILING),
    ):
        pass
