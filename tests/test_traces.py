"""Traces: the spans of a request in the API worker and the runner are one trace, without private data."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING
from uuid import uuid4

import httpx
import pytest

from commands.local_server import LocalServer, local_server
from tests import new_connection
from tests.drawn import scene
from tests.edge import PREDICT, Edge, png_bytes, wait_for
from tests.image_files import with_new_bytes
from tests.services.collector import Collector, Span, collector

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.server

IN_WORKER = {"claim", "fetch", "decode", "segment", "encode_masks", "store", "settle"}
IN_RUNNER = {"queue", "encode_image", "encode_text", "decode_prompts", "draw_masks"}
SOON = {"OTEL_BSP_SCHEDULE_DELAY": "100"}
"""Spans are exported after 0.1 s instead of 5 s."""


@pytest.fixture(scope="module")
def collected() -> Iterator[Collector]:
    """The collector of the module's server."""
    with collector() as running:
        yield running


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory, collected: Collector) -> Iterator[LocalServer]:
    """A server with two API workers and tracing."""
    changes = {"OTEL_EXPORTER_OTLP_ENDPOINT": collected.endpoint, "LOG_FORMAT": "json"} | SOON
    with local_server(tmp_path_factory.mktemp("traced"), changes) as server:
        yield server


def ask(server: LocalServer, trace_id: str, sampled: str = "01") -> httpx.Response:
    """Send a valid request in the caller's trace, with a new picture and a new prompt."""
    with Edge(server, "user-of-the-trace") as edge:
        edge.http.headers["traceparent"] = f"00-{trace_id}-00f067aa0ba902b7-{sampled}"
        edge.http.headers["User-Agent"] = "private-agent"
        image = edge.upload(with_new_bytes(png_bytes(scene(100).image)), f"private-image-{uuid4()}")
        return edge.ask(image, f"private prompt {uuid4().int % 10**6}")


def spans_of(collected: Collector, trace_id: str) -> list[Span]:
    """Wait for all spans of a successful request's trace; returns them."""
    wanted = {f"POST {PREDICT}"} | IN_WORKER | IN_RUNNER
    return wait_for(
        lambda: collected.of_trace(trace_id), lambda spans: wanted <= {span.name for span in spans}
    )


def test_one_trace_spans_both_processes(traced: LocalServer, collected: Collector) -> None:
    """The API worker's stages are children of the request's span, the runner's of the runner's call."""
    trace_id = uuid4().hex
    assert ask(traced, trace_id).status_code == httpx.codes.OK
    spans = spans_of(collected, trace_id)
    by_name = {span.name: span for span in spans}
    assert len(by_name) == len(spans)
    root = by_name[f"POST {PREDICT}"]
    assert (root.parent_id, root.process) == ("00f067aa0ba902b7", "api_worker")
    assert {by_name[name].parent_id for name in IN_WORKER} == {root.span_id}
    assert {by_name[name].process for name in IN_WORKER} == {"api_worker"}
    assert {by_name[name].parent_id for name in IN_RUNNER} == {by_name["segment"].span_id}
    assert {by_name[name].process for name in IN_RUNNER} == {"runner"}
    for name in IN_RUNNER:
        assert by_name["segment"].begin_ns <= by_name[name].begin_ns
        assert by_name[name].begin_ns <= by_name[name].end_ns <= by_name["segment"].end_ns
    logged = [json.loads(line) for line in traced.log_path.read_text().splitlines()]
    assert trace_id in {event.get("trace_id") for event in logged}


def test_each_request_of_a_batch_has_its_trace(traced: LocalServer, collected: Collector) -> None:
    """Each request of a common batch has the batch's spans in its own trace."""
    trace_ids = [uuid4().hex for _ in range(6)]
    with ThreadPoolExecutor(len(trace_ids)) as callers:
        answers = list(callers.map(lambda trace_id: ask(traced, trace_id), trace_ids))
    assert {answer.status_code for answer in answers} == {200}
    for trace_id in trace_ids:
        names = [span.name for span in spans_of(collected, trace_id)]
        assert len(names) == len(set(names))


def test_callers_sampling_decision_is_respected(traced: LocalServer, collected: Collector) -> None:
    """A request with an unsampled trace has no spans; a request without a trace starts a new one."""
    unsampled, later = uuid4().hex, uuid4().hex
    assert ask(traced, unsampled, sampled="00").status_code == httpx.codes.OK
    with Edge(traced) as edge:
        edge.answer(png_bytes(scene(100).image), "circle")
    assert ask(traced, later).status_code == httpx.codes.OK
    spans_of(collected, later)
    wait_for(
        lambda: [span for span in collected.spans if span.name == f"POST {PREDICT}" and not span.parent_id],
        bool,
    )
    assert collected.of_trace(unsampled) == []


def test_requests_without_a_key_are_not_traced(traced: LocalServer, collected: Collector) -> None:
    """A request without a key and a probe have no spans, even with a traceparent header."""
    unauthenticated, later = uuid4().hex, uuid4().hex
    headers = {"traceparent": f"00-{unauthenticated}-00f067aa0ba902b7-01"}
    assert (
        new_connection.post(f"{traced.url}{PREDICT}", headers=headers).status_code == httpx.codes.UNAUTHORIZED
    )
    assert new_connection.get(f"{traced.url}/health", headers=headers).status_code == httpx.codes.OK
    assert ask(traced, later).status_code == httpx.codes.OK
    spans_of(collected, later)
    assert collected.of_trace(unauthenticated) == []


def test_failed_stage_is_marked_as_error(traced: LocalServer, collected: Collector) -> None:
    """Only the span of the failed stage is an error."""
    trace_id = uuid4().hex
    with Edge(traced, "user-of-the-trace") as edge:
        edge.http.headers["traceparent"] = f"00-{trace_id}-00f067aa0ba902b7-01"
        assert edge.ask("uploads/user-of-the-trace/private-gone", "circle").status_code == 404
    failed = wait_for(lambda: [span for span in collected.of_trace(trace_id) if span.is_error], bool)
    assert [span.name for span in failed] == ["fetch"]


def test_traces_contain_no_private_data(traced: LocalServer, collected: Collector) -> None:
    """The spans contain no user, image, prompt, agent, address or key."""
    trace_id = uuid4().hex
    assert ask(traced, trace_id).status_code == httpx.codes.OK
    spans_of(collected, trace_id)
    sent = collected.raw
    for private in ("user-of-the-trace", "private", "127.0.0.1", traced.api_key):
        assert private.encode() not in sent
