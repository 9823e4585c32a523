"""Many concurrent callers, callers that disconnect, and an overloaded server."""

from __future__ import annotations

import asyncio
import re
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from commands.local_server import LocalServer, local_server
from tests import new_connection
from tests.drawn import scene
from tests.edge import PREDICT, SERVER_TIMEOUT_S, Edge, error_of, png_bytes, wait_for
from tests.image_files import with_new_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from results import Row

pytestmark = pytest.mark.server

CALLERS = 200
SEEDS = range(200, 206)
SIZES = ((336, 336), (500, 336), (336, 420))
BATCH_BUCKET = re.compile(r'^sam3_batch_requests_bucket\{.*?le="([^"]+)".*?\} (\S+)$', re.MULTILINE)


def send_together(
    server: LocalServer,
    bodies: Sequence[dict[str, Any]],
    *,
    connections: int = CALLERS,
    headers: Mapping[str, str] | None = None,
) -> list[httpx.Response]:
    """Send all requests concurrently, each on a new connection."""

    async def run() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=0)
        async with httpx.AsyncClient(
            base_url=server.url,
            headers=server.headers | dict(headers or {}),
            timeout=2 * SERVER_TIMEOUT_S,
            limits=limits,
        ) as client:
            return await asyncio.gather(*(client.post(PREDICT, json=body) for body in bodies))

    return asyncio.run(run())


def batches(server: LocalServer) -> tuple[float, float]:
    """Number of the model's batches so far: of one request, and of any size."""
    buckets = dict(BATCH_BUCKET.findall(new_connection.get(f"{server.url}/metrics").text))
    return float(buckets["1.0"]), float(buckets["+Inf"])


def check_same(answer: dict[str, Any], alone: dict[str, Any]) -> None:
    """Check for the same instances, within a pixel."""
    assert (answer["labels"], len(answer["instances"])) == (alone["labels"], len(alone["instances"]))
    for one, other in zip(answer["instances"], alone["instances"], strict=True):
        assert one["box"] == pytest.approx(other["box"], abs=1.0)
        assert one["score"] == pytest.approx(other["score"], abs=0.01)


def test_two_hundred_concurrent_requests(edge: Edge) -> None:
    """200 concurrent requests get the same answers as single ones, and run in common batches."""
    cases = []
    for index, seed in enumerate(SEEDS):
        drawn = scene(seed, *SIZES[index % len(SIZES)])
        key = edge.upload(png_bytes(drawn.image))
        cases += [(key, prompt) for prompt in (drawn.names[0], drawn.absent)]
    alone = [edge.answer(key, prompt) for key, prompt in cases]
    assert any(answer["instances"] for answer in alone)
    bodies = [edge.body(*cases[index % len(cases)]) for index in range(CALLERS)]
    for body in bodies:
        edge.insert_row(body)
    single_before, all_before = batches(edge.server)
    responses = send_together(edge.server, bodies)
    single_after, all_after = batches(edge.server)
    for index, (body, response) in enumerate(zip(bodies, responses, strict=True)):
        assert response.status_code == httpx.codes.OK, response.text
        answer = response.json()
        assert answer["task_id"] == body["task_id"]
        check_same(answer, alone[index % len(cases)])
        row = edge.row(body["task_id"])
        assert row is not None
        assert (row.status, row.mask_url) == ("done", answer["mask_url"])
    passes, singles = all_after - all_before, single_after - single_before
    assert 0 < passes < CALLERS / 2
    assert singles < passes / 2


def test_concurrent_requests_for_one_task_do_its_work_once(edge: Edge) -> None:
    """Of twenty concurrent requests for one task one does the work; the others get 409 or its answer."""
    drawn = scene(200)
    body = edge.body(edge.upload(png_bytes(drawn.image)), drawn.names[0])
    responses = send_together(edge.server, [body] * 20)
    good = [response.json() for response in responses if response.status_code == httpx.codes.OK]
    assert good
    assert all(answer == good[0] for answer in good)
    for response in responses:
        if response.status_code != httpx.codes.OK:
            assert error_of(response)[:2] == (409, "TASK_IN_PROGRESS")
    assert len(edge.masks(body["task_id"])) == 1


def test_task_is_done_after_the_caller_disconnects(edge: Edge) -> None:
    """If the caller disconnects after the claim, the row still ends as done."""
    drawn = scene(201)
    key = edge.upload(png_bytes(drawn.image))
    bodies = [edge.body(key, drawn.names[0]) for _ in range(8)]
    for body in bodies:
        edge.insert_row(body)
        with edge.begin(body):
            # From the claim on, the server finishes the task.
            wait_for(lambda: edge.row(body["task_id"]), lambda row: row and row.status != "pending")  # noqa: B023
    alone = edge.answer(key, drawn.names[0])
    for body in bodies:
        row = edge.settled_row(body["task_id"])
        assert row.status == "done"
        assert row.labels == alone["labels"]
        assert len(edge.masks(body["task_id"])) == 1


def test_bad_image_does_not_affect_other_requests(edge: Edge) -> None:
    """Among concurrent requests only those with a bad image fail."""
    drawn = scene(202)
    good = edge.upload(png_bytes(drawn.image))
    bad = edge.upload(png_bytes(drawn.image)[:1000])
    bodies = [edge.body(bad if index % 5 == 2 else good, drawn.names[0]) for index in range(40)]
    responses = send_together(edge.server, bodies)
    alone = edge.answer(good, drawn.names[0])
    for body, response in zip(bodies, responses, strict=True):
        if body["image_url"] == bad:
            assert error_of(response)[:2] == (415, "UNSUPPORTED_IMAGE")
            assert edge.settled_row(body["task_id"]).status == "error"
        else:
            check_same(response.json(), alone)


def test_requests_beyond_max_in_flight_get_429(tmp_path: Path) -> None:
    """Requests beyond MAX_IN_FLIGHT get 429 with Retry-After; the row stays pending, and a retry is done."""
    with local_server(tmp_path, {"MAX_IN_FLIGHT": "1", "API_WORKERS": "1"}) as server, Edge(server) as edge:
        drawn = scene(203)
        key = edge.upload(png_bytes(drawn.image))
        bodies = [edge.body(key, drawn.names[0]) for _ in range(20)]
        for body in bodies:
            edge.insert_row(body)
        responses = send_together(server, bodies)
        statuses = [response.status_code for response in responses]
        assert set(statuses) == {200, 429}
        for body, response in zip(bodies, responses, strict=True):
            if response.status_code == httpx.codes.OK:
                continue
            assert error_of(response)[1] == "OVERLOADED"
            assert int(response.headers["Retry-After"]) >= 1
            row = edge.row(body["task_id"])
            assert row is not None
            assert (row.status, row.metadata) == ("pending", {})
        refused = bodies[statuses.index(429)]
        assert edge.send(refused).status_code == httpx.codes.OK
        assert edge.settled_row(refused["task_id"]).status == "done"


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """A server that runs few requests at once, so that others wait."""
    settings = {
        "API_WORKERS": "1",
        "SAM3_MAX_BATCH": "2",
        # On a slow machine the last of a burst may take longer than the default.
        "REQUEST_TIMEOUT_S": str(SERVER_TIMEOUT_S),
        "DEFAULT_DEADLINE_S": str(SERVER_TIMEOUT_S),
    }
    with local_server(tmp_path_factory.mktemp("narrow"), settings) as server:
        yield server


def test_requests_that_cannot_be_in_time_get_429(narrow: LocalServer) -> None:
    """Of a burst, requests that would miss their deadline get 429, and their rows stay pending."""
    with Edge(narrow) as edge:
        drawn = scene(203)
        key = edge.upload(png_bytes(drawn.image))
        # Measures the rate.
        measured = send_together(narrow, [edge.body(key, drawn.names[0]) for _ in range(40)])
        assert {response.status_code for response in measured} == {200}
        bodies = [edge.body(key, drawn.names[0]) for _ in range(100)]
        for body in bodies:
            edge.insert_row(body)
        responses = send_together(narrow, bodies, headers={"X-Deadline-Ms": "1000"})
        refused = [
            body
            for body, response in zip(bodies, responses, strict=True)
            if response.status_code == httpx.codes.TOO_MANY_REQUESTS
        ]
        assert 0 < len(refused) < len(bodies)
        for response in responses:
            if response.status_code == httpx.codes.TOO_MANY_REQUESTS:
                assert "deadline" in error_of(response)[2]
                assert int(response.headers["Retry-After"]) >= 1
        for body in refused:
            row = edge.row(body["task_id"])
            assert row is not None
            assert row.status == "pending"
        assert edge.send(refused[0]).status_code == httpx.codes.OK


def test_many_requests_of_one_user_do_not_delay_another(narrow: LocalServer) -> None:
    """A user's request is answered while another user's earlier requests still wait."""
    with Edge(narrow) as edge, Edge(narrow, "user-2") as other:
        drawn = scene(203)
        image = png_bytes(drawn.image)
        # Of a picture whose features are held, sixty would be done at once.
        bodies = [edge.body(edge.upload(with_new_bytes(image)), drawn.names[0]) for _ in range(60)]
        for body in bodies:
            edge.insert_row(body)
        with ThreadPoolExecutor(1) as caller:
            burst = caller.submit(send_together, narrow, bodies)
            wait_for(lambda: [edge.row(each["task_id"]) for each in bodies], claimed_all)
            assert other.ask(image, drawn.names[0]).status_code == httpx.codes.OK
            statuses = [row.status for each in bodies if (row := edge.row(each["task_id"]))]
            assert statuses.count("processing") > len(bodies) / 3
            assert {response.status_code for response in burst.result()} == {200}


def claimed_all(rows: Sequence[Row | None]) -> bool:
    return all(row is not None and row.status != "pending" for row in rows)


def test_task_beyond_the_request_timeout_gets_504(tmp_path: Path) -> None:
    """A task that takes longer than REQUEST_TIMEOUT_S gets 504, and its row has the error message."""
    with (
        local_server(tmp_path, {"REQUEST_TIMEOUT_S": "0.001", "API_WORKERS": "1"}) as server,
        Edge(server) as edge,
    ):
        for prompt in ("circle", ["circle", "ring"]):
            body = edge.body(edge.upload(png_bytes(scene(203, 2000, 1500).image)), prompt)
            edge.insert_row(body)
            status, code, message = error_of(edge.send(body))
            assert (status, code) == (504, "DEADLINE_EXCEEDED")
            row = edge.settled_row(body["task_id"])
            assert (row.status, row.metadata.get("error_message")) == ("error", message)
            assert edge.masks(body["task_id"]) == []
