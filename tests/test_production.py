"""APP_ENV=production: the paths that need a key, and the log."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import httpx
import pytest

from commands.local_server import local_server
from sam3_client import Client, DirectApiOff
from tests import new_connection
from tests.drawn import scene
from tests.edge import PREDICT, Edge, error_of, png_bytes, wait_for
from tests.server_processes import API_WORKER, children_of, kill, refused_start, runner_of
from tests.test_bad_input import PREFLIGHT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from commands.local_server import LocalServer

pytestmark = pytest.mark.server

ALLOWED_ORIGINS = ("https://app.example.com", "http://localhost:5173")
PRODUCTION = {
    "APP_ENV": "production",
    "EMBEDDED_PARTS": "storage,results",
    "API_WORKERS": "2",
    "ALLOWED_ORIGINS": ", ".join(ALLOWED_ORIGINS),
}
CLOSED = ("/", "/docs.json", "/schema.json", "/static_content/swagger-ui.css", "/metrics")
PROBES = ("/health", "/livez", "/healthz", "/readyz")


@pytest.fixture(scope="module")
def production(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """A server with APP_ENV=production and embedded parts."""
    with local_server(tmp_path_factory.mktemp("production"), PRODUCTION) as running:
        yield running


@pytest.mark.parametrize("path", [*CLOSED, "/nothing", "/static_content/nothing", "//metrics", "/playground"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS"])
def test_every_path_but_the_probes_needs_a_key(production: LocalServer, method: str, path: str) -> None:
    """Without a key every path but the probes answers 401, even unknown ones."""
    response = new_connection.request(method, f"{production.url}{path}")
    assert response.status_code == httpx.codes.UNAUTHORIZED
    if method != "HEAD":
        wanted = "the header X-API-Key or Authorization: Bearer is missing"
        assert error_of(response) == (401, "AUTH_REQUIRED", wanted)


@pytest.mark.parametrize("path", CLOSED)
def test_key_gives_access_in_both_headers(production: LocalServer, path: str) -> None:
    """A key in either header gives access to the metrics and the documentation."""
    for headers in (production.headers, {"Authorization": f"Bearer {production.api_key}"}):
        assert new_connection.get(f"{production.url}{path}", headers=headers).status_code == httpx.codes.OK


@pytest.mark.parametrize("path", ["/playground", "/playground/app.js"])
def test_playground_is_absent(production: LocalServer, path: str) -> None:
    """Without DIRECT_API there is no playground: with a key its paths are unknown ones."""
    refused = new_connection.get(f"{production.url}{path}", headers=production.headers)
    assert error_of(refused)[:2] == (404, "NOT_FOUND")


@pytest.mark.parametrize("path", PROBES)
def test_probes_need_no_key(production: LocalServer, path: str) -> None:
    """The probes answer without a key."""
    assert new_connection.get(f"{production.url}{path}").status_code == httpx.codes.OK


def test_client_says_that_direct_requests_are_off(production: LocalServer) -> None:
    """Where images are not taken directly, the Python client names the setting."""
    with (
        Client(production.url, production.api_key) as client,
        pytest.raises(DirectApiOff, match="start it with DIRECT_API=true") as refused,
    ):
        client.segment(scene(101).image, "circle")
    assert refused.value.code == "NOT_FOUND"


def events(server: LocalServer) -> list[dict[str, Any]]:
    """The events of the server's log; every line must be one JSON object."""
    return [json.loads(line) for line in server.log_path.read_text().splitlines()]


def test_events_of_a_request_have_its_ids(production: LocalServer) -> None:
    """An event has the ids of its request and its task, and no private data."""
    request_id, task_id = str(uuid4()), str(uuid4())
    with Edge(production, "user-of-the-log") as edge:
        body = edge.body(edge.upload(png_bytes(scene(101).image), "private-image"), "circle", task_id)
        edge.insert_row(body)
        edge.http.headers.update({"X-Request-ID": request_id, "User-Agent": "private-agent"})
        with _rows_locked(production):
            assert edge.send(body).status_code == httpx.codes.BAD_GATEWAY
        assert edge.settled_row(task_id).status == "done"
        gone = body | {"image_url": "uploads/user-of-the-log/private-gone", "task_id": str(uuid4())}
        assert edge.send(gone).status_code == httpx.codes.NOT_FOUND
    about = wait_for(
        lambda: [event for event in events(production) if event.get("request_id") == request_id],
        lambda found: {"status", "task_id"} <= {name for event in found for name in event},
    )
    [access] = [event for event in about if event.get("status") == httpx.codes.BAD_GATEWAY]
    assert (access["method"], access["path"]) == ("POST", PREDICT)
    assert isinstance(access["duration_ms"], int)
    assert task_id in {event.get("task_id") for event in about}
    text = production.log_path.read_text()
    for private in ("user-of-the-log", "private-image", "private-gone", "circle", "private-agent"):
        assert private not in text


@contextmanager
def _rows_locked(server: LocalServer) -> Iterator[None]:
    """Lock the rows, so that the server cannot write them."""
    with closing(sqlite3.connect(server.data_dir / "results.sqlite")) as rows:
        rows.execute("BEGIN EXCLUSIVE")
        yield


def test_only_refused_scrapes_are_logged(production: LocalServer) -> None:
    """A successful scrape is not logged; a refused one is."""
    mark = uuid4().hex
    new_connection.get(
        f"{production.url}/metrics", headers={"X-Request-ID": f"scrape-{mark}", **production.headers}
    )
    new_connection.get(f"{production.url}/metrics", headers={"X-Request-ID": f"refused-{mark}"})
    found = wait_for(
        lambda: [each for each in events(production) if mark in each.get("request_id", "")], bool
    )
    assert [event["request_id"] for event in found] == [f"refused-{mark}"]


@pytest.mark.parametrize(
    ("origin", "is_allowed"),
    [*((origin, True) for origin in ALLOWED_ORIGINS), ("https://evil.example.com", False)],
)
def test_cors_allows_only_the_configured_origins(
    production: LocalServer, origin: str, *, is_allowed: bool
) -> None:
    """Only pages of ALLOWED_ORIGINS may send requests and read the answers, errors included."""
    allowed_origin = origin if is_allowed else None
    with httpx.Client(base_url=production.url) as page:
        preflight = page.options(PREDICT, headers={"Origin": origin} | PREFLIGHT)
        assert (preflight.status_code == httpx.codes.OK) == is_allowed
        assert preflight.headers.get("Access-Control-Allow-Origin") == allowed_origin
        refused = page.post(PREDICT, headers={"Origin": origin})
        assert error_of(refused)[:2] == (401, "AUTH_REQUIRED")
        assert refused.headers.get("Access-Control-Allow-Origin") == allowed_origin
        assert "Access-Control-Allow-Credentials" not in refused.headers


def test_log_is_json(production: LocalServer) -> None:
    """Every process writes one JSON object per event, with its time, level, logger and message.

    No test of this server comes after this one, which kills the runner.
    """
    runner, workers = runner_of(production), children_of(production, API_WORKER)
    kill(runner)
    logged = wait_for(
        lambda: events(production),
        lambda found: any("it is restarted" in each["message"] for each in found),
    )
    for event in logged:
        assert {"time", "level", "logger", "pid", "message"} <= event.keys()
        assert event["time"].endswith("+00:00")
    pids = {production.pid, runner.pid, *(worker.pid for worker in workers)}
    assert pids <= {event["pid"] for event in logged}


def test_refused_start_is_logged_as_json(tmp_path: Path) -> None:
    """The error of a refused start is a JSON event."""
    refusal = refused_start(tmp_path, {"APP_ENV": "production"})
    logged = [json.loads(line) for line in refusal.output.splitlines()]
    assert refusal.status == 1
    assert logged[-1]["message"].startswith("cannot start: R2_ACCESS_KEY_ID")
    assert logged[-1]["level"] == "ERROR"


def test_log_format_overrides_app_env(tmp_path: Path) -> None:
    """LOG_FORMAT sets the format, whatever APP_ENV is."""
    refusal = refused_start(tmp_path, {"APP_ENV": "production", "LOG_FORMAT": "text"})
    assert refusal.output.startswith("cannot start: ")
    refusal = refused_start(tmp_path, {"LOG_FORMAT": "json", "API_WORKERS": "none"})
    assert json.loads(refusal.output.splitlines()[-1])["message"].startswith("cannot start: API_WORKERS")
