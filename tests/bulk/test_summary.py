"""The numbers of a run: in memory, as JSON, and in a terminal."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from bulk.finished_times import MAX_INTERVALS, PAUSE_S, FinishedTimes
from bulk.rows import TimingsMs
from bulk.summary import MAX_EXAMPLES, MAX_MOST, SCORE_BINS, Summary, summary_tables
from sam3_runner.instances import PredictResult
from tests.bulk.made_rows import FINISHED, Refused, done, failed
from tests.outputs.masks import result_of

MASK = np.ones((4, 7), np.bool_)
START = datetime(2026, 11, 27, 4, 0, tzinfo=UTC)


def found(prompt: str, *scores: float) -> PredictResult:
    """A result of a picture of 7 x 4 px."""
    if not scores:
        return PredictResult(prompt, 0.1, 7, 4, [])
    return result_of(*[MASK] * len(scores), prompt=prompt, scores=list(scores))


@pytest.fixture
def summary() -> Summary:
    """Three pictures that are done, one of them without instances, and seven that failed."""
    made = Summary(["cat", "dog", "bird"])
    made.add(done("/a.jpg", [found("cat", 0.9, 0.58), found("dog", 1.0)], content=b"1234"))
    made.add(done("/b.jpg", [found("cat", 0.5), found("dog")], content=b"12"))
    late = done("/c.jpg", [found("cat"), found("dog")], finished_at=FINISHED + timedelta(seconds=18))
    made.add(late)
    for number in range(6):
        made.add(failed(f"/{number}.jpg"))
    made.add(failed("/gone.jpg", Refused("NOT_FOUND", "there is no such object")))
    return made


def test_counts(summary: Summary) -> None:
    """Pictures with and without a result, and instances by prompt."""
    assert (summary.pictures, summary.done, summary.failed_pictures) == (10, 3, 7)
    assert (summary.instances, summary.done_with_any) == (4, 2)
    assert [(name, each.instances, each.pictures) for name, each in summary.prompts.items()] == [
        ("cat", 3, 2),
        ("dog", 1, 1),
        ("bird", 0, 0),
    ]
    assert summary.most_instances == [(3, "/a.jpg"), (1, "/b.jpg")]
    assert summary.pictures_a_minute == pytest.approx(9 / 18 * 60)


def test_scores_are_in_the_bin_that_they_begin(summary: Summary) -> None:
    """A score on an edge is in the bin above it; 1 is in the last one."""
    cat, dog = summary.prompts["cat"].scores, summary.prompts["dog"].scores
    assert {number: count for number, count in enumerate(cat) if count} == {25: 1, 29: 1, 45: 1}
    assert {number: count for number, count in enumerate(dog) if count} == {SCORE_BINS - 1: 1}


def test_json_has_all_of_it(summary: Summary) -> None:
    """What failed and why with the first examples, sizes, times of the stages that were reached."""
    document = json.loads(summary.to_json())
    assert document["pictures"] == {"all": 10, "done": 3, "done_with_any_instance": 2, "failed": 7}
    assert [(each["code"], each["pictures"], len(each["examples"])) for each in document["failed"]] == [
        ("NOT_FOUND", 1, 1),
        ("TOO_LARGE", 6, MAX_EXAMPLES),
    ]
    assert document["failed"][0]["examples"] == [{"image": "/gone.jpg", "message": "there is no such object"}]
    assert document["picture_bytes"] == {
        "pictures": 3,
        "total": 6,
        "mean": 2.0,
        "smallest": 0,
        "largest": 4,
    }
    assert document["picture_px"]["mean"] == 28
    assert (document["timings_ms"]["fetch"]["pictures"], document["timings_ms"]["decode"]["pictures"]) == (
        10,
        3,
    )
    assert document["timings_ms"]["fetch"]["total"] == pytest.approx(3 * 12.3 + 7 * 3.0)
    assert document["finished"]["first"] == "2026-11-27T04:08:55.702+00:00"
    assert sum(document["prompts"][0]["scores"]) == document["prompts"][0]["instances"] == 3


def test_an_empty_run_has_numbers_too() -> None:
    """Nothing is divided by the number of pictures."""
    document = json.loads(Summary(["cat"]).to_json())
    assert (document["pictures"]["all"], document["picture_px"]["mean"]) == (0, 0)
    assert document["finished"] == {"first": None, "last": None, "pictures_a_minute": None}


def test_named_pictures_are_few() -> None:
    """However many pictures there are, those that are named are the first ten by instances, then by name."""
    summary = Summary(["cat"])
    for number in range(100):
        summary.add(done(f"/{number:03}.jpg", [found("cat", *[0.9] * (1 + number // 40))]))
    assert summary.most_instances == [(3, f"/{number:03}.jpg") for number in range(80, 80 + MAX_MOST)]


def test_terminal_shows_it_and_is_not_controlled(summary: Summary) -> None:
    """Counts by prompt and by error; a name cannot move the cursor."""
    summary.add(failed("/\x1b[2J[red].jpg", Refused("FORBIDDEN", "no\nread access")))
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    console.print(summary_tables(summary))
    written = console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    assert "/?[2J[red].jpg: no?read access" in written
    assert "\x1b[2J" not in written
    assert "3 of 11 pictures done, 8 failed, 4 instances in 2 pictures." in written
    rows = [line.replace("│", " ").split() for line in written.splitlines()]
    assert ["cat", "3", "2"] in rows
    assert rows.count(["bird", "0", "0"]) == 1


@given(offsets_s=st.lists(st.integers(0, 20_000_000), min_size=1, max_size=50), chance=st.randoms())
@settings(deadline=None)
def test_order_of_pictures_makes_no_difference(offsets_s: list[int], chance: object) -> None:
    """Workers finish in any order; the rate is the same, and no picture is lost."""
    made = []
    for _ in range(2):
        times = FinishedTimes()
        for offset_s in offsets_s:
            times.add(START + timedelta(seconds=offset_s))
        made.append(times)
        chance.shuffle(offsets_s)  # type: ignore[attr-defined]  # hypothesis' Random
    assert made[0].stretches(120) == made[1].stretches(120)
    assert made[0].worked_s == made[1].worked_s
    assert sum(sum(each.counts) for each in made[0].stretches(120)) == len(offsets_s)


def test_a_run_of_a_week_has_few_intervals() -> None:
    """Intervals become wider as a run goes on, and no picture is lost."""
    times = FinishedTimes()
    for number in range(60_000):
        times.add(START + timedelta(seconds=10 * number))
    assert len(times.counts) <= MAX_INTERVALS
    (stretch,) = times.stretches(120)
    assert len(stretch.counts) <= 120
    assert sum(stretch.counts) == times.pictures == 60_000
    assert stretch.counts[1] == stretch.width_s / 10
    assert times.worked_s == 599_990


def test_shards_are_no_peaks_of_the_rate() -> None:
    """64 pictures that end together every 3.2 s are 20 a second, and not 64 in one second of three."""
    times = finished_shards(100, every_s=3.2)
    (stretch,) = times.stretches(120)
    rates = [count / stretch.width_s for count in stretch.counts[1:-1]]
    assert len(rates) > 10
    assert min(rates) > 15
    assert max(rates) < 25


def test_shards_of_eleven_minutes_are_no_pauses() -> None:
    """Large shards of a large model on a CPU: the rate is what was done in all the time."""
    times = finished_shards(20, every_s=660)
    (stretch,) = times.stretches(120)
    assert sum(stretch.counts) == 20 * 64
    assert times.worked_s == 19 * 660


def finished_shards(shards: int, every_s: float) -> FinishedTimes:
    times = FinishedTimes()
    for shard in range(shards):
        for _ in range(64):
            times.add(START + timedelta(seconds=every_s * shard))
    return times


def test_a_pause_is_no_low_rate() -> None:
    """The time between two runs of the same command is left out; a slow minute is not."""
    times = FinishedTimes()
    for start_s in (0, 300, 300 + PAUSE_S + 100):
        for second in range(100):
            times.add(START + timedelta(seconds=start_s + second))
    first, last = times.stretches(120)
    assert (first.width_s, last.start_s - first.end_s) == (5, PAUSE_S)
    assert first.counts == [5] * 20 + [0] * 40 + [5] * 20
    assert last.counts == [5] * 20
    assert times.worked_s == pytest.approx(500, abs=2)


def test_stages_that_were_not_reached_are_not_counted() -> None:
    """The mean is over the pictures that reached a stage."""
    summary = Summary(["cat"])
    for fetch in (10.0, 20.0):
        summary.add(done("/a.jpg", [found("cat")], timings_ms=TimingsMs(fetch=fetch, inference=4.0)))
    summary.add(failed("/b.jpg"))
    fetch_ms, inference = summary.times_ms["fetch"], summary.times_ms["inference"]
    assert (fetch_ms.pictures, fetch_ms.mean, fetch_ms.largest) == (3, 11.0, 20.0)
    assert (inference.pictures, inference.mean) == (2, 4.0)
    assert summary.times_ms["decode"].pictures == 0
