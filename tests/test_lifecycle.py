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
from sam3_runner.checkpoint import DEMO_FOLDER
from tests.drawn import scene
from tests.edge import Edge, error_of, png_bytes, wait_for
from tests.server_processes import (
    API_KEY,
    Refusal,
    refused_start,
    started_server,
    wait_until_all_workers_are_ready,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from results import Row

pytestmark = pytest.mark.server

SECRET = "hush-hush-0123456789abcdef"

R2 = {
    "R2_ENDPOINT": "https://acc0.r2.cloudflarestorage.com",
    "R2_ACCESS_KEY_ID": SECRET,
    "R2_SECRET_ACCESS_KEY": SECRET,
}
SUPABASE = {"SUPABASE_URL": "https://abcd.supabase.co", "SUPABASE_SERVICE_KEY": SECRET}

REFUSALS: dict[str, tuple[dict[str, str | None], list[str]]] = {
    "no key": ({"API_SECRET_KEY": None, "SAM3_WEIGHTS_PATH": str(DEMO_FOLDER)}, ["API_SECRET_KEY"]),
    "short key": ({"API_SECRET_KEY": f"{SECRET},short"}, ["API_SECRET_KEY", "16"]),
    "half of R2": (R2 | {"R2_ENDPOINT": None}, ["R2_ENDPOINT missing", "R2_SECRET_ACCESS_KEY"]),
    "placeholder": (
        {**R2, "R2_ENDPOINT": "https://<ACCOUNT>.r2.cloudflarestorage.com"},
        ["R2_ENDPOINT still has the placeholder <ACCOUNT>"],
    ),
    "half of Supabase": ({"SUPABASE_SERVICE_KEY": SECRET}, ["SUPABASE_URL missing", "SUPABASE_SERVICE_KEY"]),
    "misspelt name": ({"R2_ENDPONT": SECRET}, ["R2_ENDPONT", "did you mean R2_ENDPOINT?"]),
    "bad number": (
        {"API_WORKERS": "two", "HF_TOKEN": SECRET},
        ["API_WORKERS must be a whole number from 1 to 64, not 'two'"],
    ),
    "zero workers": ({"API_WORKERS": "0"}, ["API_WORKERS must be a whole number from 1 to 64, not '0'"]),
    "bad origin": ({"ALLOWED_ORIGINS": "*"}, ["ALLOWED_ORIGINS", "https://app.example.com"]),
    "no weights": ({"SAM3_WEIGHTS_PATH": "no/such/folder"}, ["no/such/folder", "SAM3_WEIGHTS_PATH=demo"]),
    "embedded in production": (
        {"APP_ENV": "production"},
        ["R2_ENDPOINT", "APP_ENV=production", "EMBEDDED_PARTS"],
    ),
}


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


def test_file_in_utf16_is_refused(tmp_path: Path) -> None:
    """A .env in UTF-16, which Windows calls Unicode, is refused; the message names the file."""
    env_file = tmp_path / "my.env"
    env_file.write_text("API_WORKERS=1\n", encoding="utf-16")
    refusal = refused_start(tmp_path, {"ENV_FILE": str(env_file)})
    assert refusal.status != 0
    assert f"cannot start: ENV_FILE {env_file} is in UTF-16" in refusal.output
    assert "Traceback" not in refusal.output


def test_file_in_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    """If a file has the name of a folder below DATA_DIR, the error names the variable and the path."""
    (tmp_path / "storage").write_text("a file")
    refusal = refused_start(tmp_path, {})
    assert refusal.status != 0
    assert f"cannot start: DATA_DIR: {tmp_path / 'storage'} is not a folder: move it away" in refusal.output


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


def test_start_without_a_tokenizer_is_refused(broken_checkpoint: Path, tmp_path: Path) -> None:
    """The error names the file that is missing in the folder of weights."""
    (broken_checkpoint / "tokenizer.json").unlink()
    refusal = refused_start(tmp_path, {"SAM3_WEIGHTS_PATH": str(broken_checkpoint)})
    assert refusal.status != 0
    assert f"cannot start: SAM3_WEIGHTS_PATH: {broken_checkpoint} holds no tokenizer.json" in refusal.output


def get(server: LocalServer, path: str) -> httpx.Response | None:
    """The answer, or None while the server does not listen."""
    try:
        return httpx.get(f"{server.url}{path}", headers=server.headers, timeout=10)
    except httpx.TransportError:
        return None


def is_ready(server: LocalServer) -> bool:
    answer = get(server, "/readyz")
    return answer is not None and answer.status_code == httpx.codes.OK


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
    edge: Edge
    key: str
    states: list[str] = field(default_factory=list)
    refused: list[tuple[dict[str, Any], httpx.Response]] = field(default_factory=list)

    def watch(self) -> None:
        """Send requests until the server is ready."""
        while not is_ready(self.server):
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
    with started_server(folder, {"API_SECRET_KEY": None}) as (keyless, _):
        [api_key] = wait_for(lambda: printed_keys(keyless.log_path), bool)
        server = replace(keyless, api_key=api_key)
        with Edge(server) as edge:
            observed = Start(server, edge, edge.upload(png_bytes(scene(300).image)))
            watcher = threading.Thread(target=observed.watch, daemon=True)
            watcher.start()
            watcher.join(READY_TIMEOUT_S)
            assert not watcher.is_alive(), server.log_path.read_text()
            yield observed


@dataclass(frozen=True)
class Stop:
    """The end of a server that was stopped while it worked."""

    status: int
    left: list[psutil.Process]
    answers: list[httpx.Response]
    rows: list[Row]


@pytest.fixture(scope="module")
def stop(tmp_path_factory: pytest.TempPathFactory) -> Stop:
    """A server that gets SIGTERM once eight tasks are claimed whose images take long to decode."""
    with started_server(tmp_path_factory.mktemp("stop"), {}) as (server, process), Edge(server) as edge:
        wait_until_all_workers_are_ready(server)
        children = psutil.Process(server.pid).children(recursive=True)
        large = edge.upload(png_bytes(Image.new("RGB", (7000, 6500), (90, 120, 60)), compress_level=1))
        bodies = [edge.body(large, "circle") for _ in range(8)]
        with ThreadPoolExecutor(len(bodies)) as callers:
            answers = [callers.submit(edge.send, body) for body in bodies]
            for body in bodies:
                wait_for(lambda: edge.row(body["task_id"]), bool)  # noqa: B023 - the claim inserts the row
            process.send_signal(signal.SIGTERM)
            status = process.wait(STOP_TIMEOUT_S)
            left = psutil.wait_procs(children, timeout=10)[1]
            rows = [edge.row(body["task_id"]) for body in bodies]
            return Stop(status, left, [answer.result() for answer in answers], [row for row in rows if row])


def test_callers_get_503_while_the_weights_load(start: Start) -> None:
    """While the weights load, callers get 503 with Retry-After; then the server serves immediately."""
    assert set(start.states) <= {"loading"}
    assert start.refused
    for body, response in start.refused:
        check_not_loaded(start.edge, body, response)
    for _ in range(4):  # both API workers
        assert start.edge.ask(start.key, "circle").status_code == httpx.codes.OK


def test_demo_generates_one_key_for_all_workers(start: Start) -> None:
    """The demo without API_SECRET_KEY prints a random key once; every worker accepts it and no other."""
    assert len(printed_keys(start.server.log_path)) == 1
    url = f"{start.server.url}/api/v1/model/info"
    for _ in range(12):  # new connections, so that both workers answer
        assert httpx.get(url, headers=start.server.headers).status_code == httpx.codes.OK
        assert error_of(httpx.get(url, headers={"X-API-Key": API_KEY}))[:2] == (401, "AUTH_INVALID")
        assert error_of(httpx.get(url, headers={"X-API-Key": ""}))[:2] == (401, "AUTH_INVALID")


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
