"""The server's start, refused starts, readiness and stop; test_processes.py kills its processes."""

from __future__ import annotations

import re
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest
from PIL import Image

from commands.local_server import READY_TIMEOUT_S, STOP_TIMEOUT_S, LocalServer
from sam3_runner.weights.checkpoint import DEMO_FOLDER
from tests import new_connection
from tests.drawn import scene
from tests.edge import Edge, error_of, png_bytes, wait_for
from tests.server_processes import (
    API_KEY,
    Refusal,
    refused_start,
    started_server,
    wait_until_all_workers_are_ready,
)
from tests.test_ports import unix_sockets

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator
    from pathlib import Path

    from results import Row

pytestmark = pytest.mark.server

SECRET = "hush-hush-0123456789abcdef"

REFUSALS: dict[str, tuple[dict[str, str | None], list[str]]] = {
    "no key": ({"API_SECRET_KEY": None, "SAM3_WEIGHTS_PATH": str(DEMO_FOLDER)}, ["API_SECRET_KEY"]),
    "bad number": (
        {"API_WORKERS": "two", "HF_TOKEN": SECRET},
        ["API_WORKERS must be a whole number from 1 to 64, not 'two'"],
    ),
    "no weights": ({"SAM3_WEIGHTS_PATH": "no/such/folder"}, ["no/such/folder", "SAM3_WEIGHTS_PATH=demo"]),
}
"""One for each time at which a start can be refused; tests/in_process/test_start.py has the others."""


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Refusal]:
    """The result of each start of `REFUSALS`, two at a time."""
    folder = tmp_path_factory.mktemp("refusals")

    def start(case: str) -> Refusal:
        return refused_start(folder / case, REFUSALS[case][0])

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(REFUSALS, pool.map(start, REFUSALS), strict=True))


@pytest.mark.parametrize("case", REFUSALS)
def test_start_is_refused(refusals: dict[str, Refusal], case: str) -> None:
    """A wrong setting ends the start with one sentence that names it and contains no secret."""
    refusal = refusals[case]
    assert refusal.status != 0
    [sentence] = [line for line in refusal.output.splitlines() if "cannot start: " in line]
    for part in REFUSALS[case][1]:
        assert part in sentence
    assert "Traceback" not in refusal.output
    assert SECRET not in refusal.output
    assert API_KEY not in refusal.output


@pytest.mark.parametrize(("host", "family"), [("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)])
def test_port_in_use_is_refused(tmp_path: Path, host: str, family: socket.AddressFamily) -> None:
    """The error names a port that another program uses, before any process is started."""
    try:
        other = socket.create_server((host, 0), family=family)
    except OSError as error:
        pytest.skip(f"no {host} on this machine: {error.strerror}")
    with other:
        port = other.getsockname()[1]
        refusal = refused_start(tmp_path, {}, "--host", host, "--port", str(port))
    assert refusal.status != 0
    [sentence] = [line for line in refusal.output.splitlines() if "cannot start: " in line]
    assert sentence.startswith(
        f"cannot start: port {port} of {host} cannot be used (Address already in use): "
    )
    assert "--port" in sentence
    assert "Traceback" not in refusal.output
    assert "initialized" not in refusal.output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ("--host", "203.0.113.1"),
            "cannot be used (Cannot assign requested address): name an address of this",
        ),
        (("--port", "70000"), "cannot start: --port (or BENTOML_PORT) must be at most 65535, not 70000"),
    ],
)
def test_invalid_address_is_refused(tmp_path: Path, arguments: tuple[str, str], sentence: str) -> None:
    """The error names an address of another machine, or a port that does not exist."""
    refusal = refused_start(tmp_path, {}, *arguments)
    assert refusal.status != 0
    assert sentence in refusal.output
    assert "Traceback" not in refusal.output


def get(server: LocalServer, path: str) -> httpx.Response | None:
    """The answer, or None while the server does not listen."""
    try:
        return new_connection.get(f"{server.url}{path}", headers=server.headers, timeout=10)
    except httpx.TransportError:
        return None


def check_not_loaded(edge: Edge, body: dict[str, Any], response: httpx.Response) -> None:
    """The caller gets 503 with Retry-After, and its row stays pending."""
    assert error_of(response)[:2] == (503, "MODEL_NOT_LOADED")
    assert int(response.headers["Retry-After"]) >= 1
    row = edge.row(body["task_id"])
    assert row is not None
    assert (row.status, row.metadata) == ("pending", {})


@dataclass
class Start:
    """A ready server, and what a caller observed between its start and then."""

    server: LocalServer
    process: subprocess.Popen[bytes]
    edge: Edge
    key: str
    states: list[str] = field(default_factory=list)
    unready: list[httpx.Response] = field(default_factory=list)
    refused: list[tuple[dict[str, Any], httpx.Response]] = field(default_factory=list)

    def watch(self) -> None:
        """Send requests until the server is ready."""
        while (readyz := get(self.server, "/readyz")) is None or readyz.status_code != httpx.codes.OK:
            if readyz is not None:
                self.unready.append(readyz)
            health = get(self.server, "/health")
            if health is None or health.json()["status"] == "ok":
                continue
            self.states.append(health.json()["status"])
            body = self.edge.body(self.key, "circle")
            self.edge.insert_row(body)
            response = self.edge.send(body)
            if response.status_code != httpx.codes.OK:
                self.refused.append((body, response))


def printed_keys(log_path: Path) -> list[str]:
    """The keys that the demo generated and printed."""
    return re.findall(r"X-API-Key for this run is (\w{32,})$", log_path.read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """The demo, started without a key."""
    folder = tmp_path_factory.mktemp("start")
    with started_server(folder, {"API_SECRET_KEY": None}) as (keyless, process):
        [api_key] = wait_for(lambda: printed_keys(keyless.log_path), bool)
        server = replace(keyless, api_key=api_key)
        with Edge(server) as edge:
            observed = Start(server, process, edge, edge.upload(png_bytes(scene(300).image)))
            watcher = threading.Thread(target=observed.watch, daemon=True)
            watcher.start()
            watcher.join(READY_TIMEOUT_S)
            assert not watcher.is_alive(), server.log_path.read_text()
            yield observed


@dataclass(frozen=True)
class Stop:
    """The end of a server that was stopped while it worked.

    Attributes:
        sockets: unix sockets of its processes, before the stop.
    """

    status: int
    left: list[psutil.Process]
    sockets: set[Path]
    answers: list[httpx.Response]
    rows: list[Row]


@pytest.fixture(scope="module")
def stop(start: Start) -> Stop:
    """The same server gets SIGTERM once eight tasks are claimed whose images take long to decode."""
    server, edge = start.server, start.edge
    wait_until_all_workers_are_ready(server)
    children, sockets = psutil.Process(server.pid).children(recursive=True), unix_sockets(server)
    large = edge.upload(png_bytes(Image.new("RGB", (7000, 6500), (90, 120, 60)), compress_level=1))
    bodies = [edge.body(large, "circle") for _ in range(8)]
    with ThreadPoolExecutor(len(bodies)) as callers:
        answers = [callers.submit(edge.send, body) for body in bodies]
        for body in bodies:
            wait_for(lambda: edge.row(body["task_id"]), bool)  # noqa: B023 - the claim inserts the row
        start.process.send_signal(signal.SIGTERM)
        status = start.process.wait(STOP_TIMEOUT_S)
        left = psutil.wait_procs(children, timeout=30)[1]
        rows = [edge.row(body["task_id"]) for body in bodies]
        return Stop(
            status, left, sockets, [answer.result() for answer in answers], [row for row in rows if row]
        )


def test_callers_get_503_while_the_weights_load(start: Start) -> None:
    """While the weights load, callers get 503 with Retry-After; then the server serves immediately."""
    assert set(start.states) <= {"loading"}
    assert start.unready
    for response in start.unready:
        assert error_of(response)[:2] == (503, "MODEL_NOT_LOADED")
        assert response.headers["Retry-After"] == "2"
    assert start.refused
    for body, response in start.refused:
        check_not_loaded(start.edge, body, response)
    for _ in range(4):  # both API workers
        assert start.edge.ask(start.key, "circle").status_code == httpx.codes.OK


def test_demo_prints_where_to_try_it(start: Start) -> None:
    """The demo prints the address of the page, with its port and its key."""
    link = f"{start.server.url}/playground#key={start.server.api_key}\n"
    assert f"embedded demo: try it at {link}" in start.server.log_path.read_text()


def test_demo_generates_one_key_for_all_workers(start: Start) -> None:
    """The demo without API_SECRET_KEY prints a random key once; every worker accepts it and no other."""
    assert len(printed_keys(start.server.log_path)) == 1
    url = f"{start.server.url}/api/v1/model/info"
    for _ in range(12):  # new connections, so that both workers answer
        assert new_connection.get(url, headers=start.server.headers).status_code == httpx.codes.OK
        assert error_of(new_connection.get(url, headers={"X-API-Key": API_KEY}))[:2] == (401, "AUTH_INVALID")
        assert error_of(new_connection.get(url, headers={"X-API-Key": ""}))[:2] == (401, "AUTH_INVALID")


def test_stop_ends_all_processes_and_answers_every_caller(stop: Stop) -> None:
    """After SIGTERM the exit status is 0, no process is left, and every caller has an answer."""
    assert stop.status == 0
    assert stop.left == []
    assert len(stop.rows) == len(stop.answers)


def test_stop_finishes_or_keeps_claimed_tasks(stop: Stop) -> None:
    """After SIGTERM claimed tasks end as done; tasks whose image would wait too long are kept."""
    for row, answer in zip(stop.rows, stop.answers, strict=True):
        if answer.status_code == httpx.codes.OK:
            assert row.status == "done"
        else:
            assert error_of(answer)[:2] == (503, "MODEL_NOT_LOADED")
            assert "the task is kept" in error_of(answer)[2]
            assert row.status == "processing"
    assert "done" in {row.status for row in stop.rows}


def test_stop_ends_no_decoder_under_a_task(start: Start, stop: Stop) -> None:
    """The decoders work until their tasks are done: one that is ended twice would blame its image."""
    assert stop.status == 0
    assert "a decoder process was killed" not in start.server.log_path.read_text()


def test_stop_removes_all_sockets(stop: Stop) -> None:
    """After a stop none of the sockets between the processes is left, nor their folders."""
    assert stop.sockets
    assert [path for path in stop.sockets if path.parent.exists()] == []
