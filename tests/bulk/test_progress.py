"""What a run tells while it goes on."""

from __future__ import annotations

import httpx
import pytest

from bulk.progress import RunMetrics, RunState, display_of, duration, line_of, waiting_shown
from bulk.stages.blocks import ShardOutcome
from tests.services.processes import wait_until


def _outcome(**values: object) -> ShardOutcome:
    given = {"pictures": 64, "instances": 5, "inference_s": 1.0, "errors": {}}
    return ShardOutcome(**(given | values))  # type: ignore[arg-type]


def test_line_counts_pictures_failures_and_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rate and share leave out the start, and the time left is that of the pictures that are not done."""
    now_s = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now_s)
    state = RunState(total=1064, streams=2, kept=100)
    state.add(_outcome())
    assert line_of(state) == "164 of 1,064 pictures, 0 failed"
    now_s = 102.0
    state.add(_outcome(errors={"NOT_FOUND": 3, "TOO_LARGE": 1}, inference_s=2.0))
    assert line_of(state) == "228 of 1,064 pictures, 32.0/s, 4 failed, model busy 50%, 26 s left"


def test_rate_is_that_of_the_last_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now_s)
    state = RunState(total=10**6, streams=1)
    for _ in range(100):
        state.add(_outcome())
        now_s += 1.0
    for _ in range(20):
        now_s += 9.0
        state.add(_outcome())
        now_s += 1.0
    assert state.rate == pytest.approx(6.4, rel=0.2)


@pytest.mark.parametrize(
    ("time_s", "text"),
    [
        (0.4, "0 s"),
        (99, "99 s"),
        (100, "2 min"),
        (5900, "98 min"),
        (11_100, "3 h 05 min"),
        (200_000, "2 d 7 h"),
    ],
)
def test_durations_are_read_at_a_glance(time_s: float, text: str) -> None:
    assert duration(time_s) == text


def test_lines_go_to_stderr_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    state = RunState(total=128, streams=1)
    with display_of() as display:
        display.say("starting")
        for _ in range(2):
            state.add(_outcome())
            display.show(state)
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.splitlines()
    assert lines[0] == "starting"
    assert lines[-1].startswith("128 of 128 pictures")


def test_run_that_waits_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """In intervals that double, and not after a shard has ended."""
    with display_of() as display, waiting_shown(display, first_s=0.05) as shard_has_ended:
        lines: list[str] = []

        def said() -> int:
            lines.extend(capsys.readouterr().err.splitlines())
            return len(lines)

        wait_until(lambda: said() >= 2, 10)
        shard_has_ended()
        before = said()
        wait_until(lambda: said() > before, 10)
    assert set(lines) == {"no shard has ended for 0 s: the model or a store is slow or away"}


def test_prometheus_reads_the_state_on_loopback() -> None:
    metrics = RunMetrics(0)
    try:
        state = RunState(total=128, streams=2, kept=3)
        state.add(outcome := _outcome(errors={"NOT_FOUND": 2}))
        metrics.show(state)
        metrics.show(state, outcome)
        text = httpx.get(f"http://127.0.0.1:{metrics.port}/metrics").text
    finally:
        metrics.close()
    for line in (
        "sam3_bulk_pictures_planned 128.0",
        "sam3_bulk_pictures_kept 3.0",
        'sam3_bulk_pictures_total{outcome="done"} 62.0',
        'sam3_bulk_pictures_total{outcome="NOT_FOUND"} 2.0',
        "sam3_bulk_instances_total 5.0",
        "sam3_bulk_inference_seconds_total 1.0",
        "sam3_bulk_streams 2.0",
    ):
        assert line in text.splitlines()
