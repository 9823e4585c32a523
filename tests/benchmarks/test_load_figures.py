"""Percentiles and throughput of a load, and differences of a server's metrics."""

from __future__ import annotations

import pytest

from benchmarks.load_client import Outcome
from benchmarks.load_figures import ServerMetrics, figures, timeline


def outcome(due_s: float, latency_ms: float, status: str = "200", *, inference_ms: float = 0.0) -> Outcome:
    """A request that was sent when it was due."""
    return Outcome("one", due_s, due_s, due_s + latency_ms / 1000, status, 2, inference_ms)


def test_percentiles_and_throughput_of_known_latencies() -> None:
    """Latencies of 1 to 100 ms in ten seconds: 10 answers a second, and the percentiles of that row."""
    row = figures([[outcome(number / 100, number) for number in range(1, 101)]], 10.0)
    assert row["n"] == 100
    assert (row["p50_ms"], row["p95_ms"], row["p99_ms"], row["max_ms"]) == (50.5, 95.0, 99.0, 100.0)
    assert row["throughput_per_s"] == 10.0
    assert row["masks_mean"] == 2


def test_ramp_is_not_measured_and_late_answers_are() -> None:
    """The ramp's latencies do not count; answers count for the throughput by when they arrive."""
    ramp_to_ramp = outcome(-1.0, 500)
    ramp_to_measured = outcome(-0.5, 1000)
    late = outcome(1.5, 9000)
    row = figures([[ramp_to_ramp, ramp_to_measured, outcome(0.0, 100), late]], 2.0)
    assert row["n"] == 2
    assert row["max_ms"] == 9000
    assert row["throughput_per_s"] == 1.0


def test_errors_are_counted_by_status_and_have_no_latency() -> None:
    """A refusal is neither throughput nor a fast answer."""
    refused = [outcome(0.1 * number, 1, "429") for number in range(3)]
    row = figures([[*refused, outcome(0.5, 200), outcome(0.6, 1, "ServerDisconnectedError")]], 1.0)
    assert row["errors"] == "429=3 ServerDisconnectedError=1"
    assert (row["n"], row["p50_ms"], row["throughput_per_s"]) == (5, 200.0, 1.0)


def test_no_answer_has_empty_figures() -> None:
    """Without an answer there is no percentile, rather than a zero."""
    row = figures([[outcome(0.1, 1, "500")]], 1.0)
    assert (row["p50_ms"], row["p99_ms"], row["inference_p50_ms"], row["masks_mean"]) == ("", "", "", "")


def test_runs_are_joined() -> None:
    """Two runs of a second have the mean throughput, and the percentiles of all their requests."""
    first = [outcome(0.1, 100), outcome(0.2, 100)]
    second = [outcome(0.1, 300), outcome(0.2, 300), outcome(0.3, 300), outcome(0.4, 300)]
    row = figures([first, second], 1.0)
    assert (row["n"], row["throughput_per_s"], row["p50_ms"]) == (6, 3.0, 300.0)


def test_rest_is_the_median_of_differences() -> None:
    """The part that is not inference is a request's own latency without its own inference."""
    row = figures([[outcome(0.1, 100, inference_ms=80), outcome(0.2, 60, inference_ms=10)]], 1.0)
    assert (row["inference_p50_ms"], row["rest_p50_ms"]) == (45.0, 35.0)


METRICS = """
# TYPE sam3_stage_seconds histogram
sam3_stage_seconds_bucket{{stage="decode",le="+Inf"}} {decodes}
sam3_stage_seconds_sum{{stage="decode"}} {decode_s}
sam3_stage_seconds_count{{stage="decode"}} {decodes}
sam3_stage_seconds_sum{{stage="encode_image"}} {encode_s}
sam3_stage_seconds_count{{stage="encode_image"}} {passes}
# TYPE sam3_batch_requests histogram
sam3_batch_requests_bucket{{le="+Inf"}} {passes}
sam3_batch_requests_sum {decodes}
sam3_batch_requests_count {passes}
# TYPE sam3_texts counter
sam3_texts_total{{cache="hit"}} {decodes}
sam3_texts_total{{cache="miss"}} 3.0
"""


def test_metrics_are_those_of_the_load() -> None:
    """Means and shares come from what was added during the load, not from the server's whole life."""
    before = ServerMetrics.of(METRICS.format(decodes=100.0, decode_s=50.0, encode_s=9.0, passes=50.0))
    after = ServerMetrics.of(METRICS.format(decodes=140.0, decode_s=50.4, encode_s=11.0, passes=60.0))
    added = after.since(before, elapsed_s=4.0)
    means_ms = added["stage_means_ms"]
    assert means_ms == {"decode": pytest.approx(10.0), "encode_image": pytest.approx(200.0)}
    assert (added["batch_mean"], added["device_share"]) == (4.0, 0.5)
    assert added["caches"] == "sam3_texts_hit=40"


def test_timeline_has_every_stage_and_what_none_covers() -> None:
    """Claim and fetch overlap, the runner's stages are inside segment, and the rest is named."""
    means_ms = {"claim": 5.0, "fetch": 3.0, "decode": 10.0, "segment": 40.0, "queue": 1.0, "upscale": 2.0}
    lines = timeline(means_ms, 60.0)
    times_ms = {line.split()[0]: float(line.split()[1]) for line in lines}
    assert times_ms == means_ms | {"other": 5.0, "whole": 60.0}
    assert [line.split()[0] for line in lines][-3:] == ["upscale", "other", "whole"]
