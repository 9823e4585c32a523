"""The metrics of /metrics, and that callers cannot add series."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING
from uuid import uuid4

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from direct_form import PATH as DIRECT
from playground import FILES_LABEL
from playground import PATH as PLAYGROUND
from sam3_runner.metrics import STAGES
from tests import new_connection
from tests.drawn import scene
from tests.edge import PREDICT, Edge, png_bytes, wait_for
from tests.image_files import with_new_bytes
from tests.server_processes import API_WORKER, children_of, kill, started_server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from commands.local_server import LocalServer

pytestmark = pytest.mark.server

PAGE = {PLAYGROUND, FILES_LABEL}
OURS = {"/health", PREDICT, "/api/v1/predict/batch", "/api/v1/model/info", DIRECT, *PAGE}
BENTOML = {"/", "/docs.json", "/schema.json", "/livez", "/readyz", "/healthz", "/static_content/"}
RUNNER = {"/segment", "/status"}
ALL = OURS | BENTOML | RUNNER | {"other"}


def scrape(server: LocalServer) -> str:
    return new_connection.get(f"{server.url}/metrics", timeout=60).raise_for_status().text


def samples(server: LocalServer, name: str) -> list[tuple[dict[str, str], float]]:
    """Labels and value of each series of this name."""
    return [
        (sample.labels, sample.value)
        for family in text_string_to_metric_families(scrape(server))
        for sample in family.samples
        if sample.name == name
    ]


def total(server: LocalServer, name: str, **labels: str) -> float:
    """The sum of the series with these labels."""
    return sum(value for found, value in samples(server, name) if labels.items() <= found.items())


def test_unknown_paths_add_no_series(server: LocalServer) -> None:
    """Unknown paths and methods do not increase the size of /metrics."""
    with httpx.Client(base_url=server.url) as client:

        def request(count: int) -> None:
            for _ in range(count):
                client.get(f"/{uuid4()}")
                client.get(f"/api/v1/{uuid4()}", headers=server.headers)
                client.get(f"/static_content/{uuid4()}")
                client.request("PROPFIND", f"/health/{uuid4()}")

        request(10)  # so that both API workers have served each kind
        before = scrape(server)
        request(100)
        after = scrape(server)
    assert len(after.splitlines()) <= len(before.splitlines()) + 60  # at most one more status
    endpoints = {
        sample.labels["endpoint"]
        for family in text_string_to_metric_families(after)
        for sample in family.samples
        if "endpoint" in sample.labels
    }
    assert endpoints <= ALL
    assert total(server, "bentoml_service_request_total", endpoint="other") >= 300


def test_requests_are_counted_by_route_and_status(server: LocalServer, edge: Edge) -> None:
    """/metrics has the requests of a route by status, their durations, and the runner's batches."""
    count = "bentoml_service_request_total"
    duration = "bentoml_service_request_duration_seconds_count"
    batches = "bentoml_service_adaptive_batch_size_count"
    good = {"endpoint": PREDICT, "http_response_code": "200", "runner_name": "sam3"}
    refused = {"endpoint": PREDICT, "http_response_code": "401", "runner_name": "sam3"}
    before = [total(server, count, **good), total(server, count, **refused), total(server, duration, **good)]
    batches_before = total(server, batches)
    edge.answer(png_bytes(scene(100).image), "circle")
    new_connection.post(f"{server.url}{PREDICT}", json={})
    after = [total(server, count, **good), total(server, count, **refused), total(server, duration, **good)]
    assert after == [value + 1 for value in before]
    assert total(server, batches) > batches_before


def test_every_stage_of_a_task_is_measured(server: LocalServer, edge: Edge) -> None:
    """A task on a new picture adds one to each stage, including the runner's, and to the caches' counts.

    Tiles are images of their own, and so tested apart.
    """

    def counted() -> dict[str, float]:
        stages = {stage: total(server, "sam3_stage_seconds_count", stage=stage) for stage in STAGES}
        texts = {cache: total(server, "sam3_texts_total", cache=cache) for cache in ("hit", "miss")}
        return stages | texts | {"features": total(server, "sam3_features_total", cache="miss")}

    image = png_bytes(scene(100).image)
    edge.answer(image, "circle")
    before = counted()
    prompts = ["circle", f"number {uuid4().int % 10**6}"]
    edge.answer(with_new_bytes(image), prompts, outputs=["mask", "overlay"], min_area=1)
    after = {name: count + 1 for name, count in before.items()}
    assert counted() == after | {"merge_tiles": before["merge_tiles"]}
    edge.answer(image, "circle", tiles=2)
    assert counted()["merge_tiles"] == after["merge_tiles"]


def test_tasks_are_counted_by_outcome(server: LocalServer, edge: Edge) -> None:
    """A task counts as done, its repeat as replayed, and a failed one as error with its code."""

    def counted() -> list[float]:
        ends = [("done", ""), ("replayed", ""), ("error", "IMAGE_NOT_FOUND")]
        return [total(server, "sam3_tasks_total", outcome=outcome, code=code) for outcome, code in ends]

    before = counted()
    body = edge.body(edge.upload(png_bytes(scene(100).image)), "circle")
    for _ in range(2):
        assert edge.send(body).status_code == httpx.codes.OK
    assert edge.ask("uploads/user-1/gone", "circle").status_code == httpx.codes.NOT_FOUND
    assert counted() == [count + 1 for count in before]


def test_gauges_of_an_idle_server(server: LocalServer) -> None:
    """On an idle server the model is ready, and no task is in flight, waits or was given up."""
    assert total(server, "sam3_model_ready") == 1
    for name in ("sam3_tasks_in_flight", "sam3_tasks_waiting", "sam3_tasks_given_up", "sam3_outbox_depth"):
        assert samples(server, name)
        wait_for(partial(total, server, name), lambda count: count == 0)


def test_requests_of_a_killed_worker_are_not_in_progress(tmp_path: Path) -> None:
    """Requests that were in progress in a killed process are no longer counted."""
    name = "bentoml_service_request_in_progress"
    with started_server(tmp_path, {"API_WORKERS": "1"}) as (server, _), Edge(server) as edge:
        wait_for(lambda: _is_ready(server), bool)
        [worker] = children_of(server, API_WORKER)
        body = edge.body(edge.upload(png_bytes(scene(100).image)), "circle")

        def half_a_body() -> Iterator[bytes]:
            yield b"{"
            assert total(server, name, endpoint=PREDICT) == 1
            kill(worker)
            yield b"}"

        with pytest.raises(httpx.TransportError):
            new_connection.post(f"{server.url}{PREDICT}", content=half_a_body(), headers=server.headers)
        wait_for(lambda: _is_ready(server), bool)
        assert total(server, name, endpoint=PREDICT) == 0
        assert edge.send(body).status_code == httpx.codes.OK


def _is_ready(server: LocalServer) -> bool:
    try:
        return new_connection.get(f"{server.url}/readyz", timeout=60).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False
