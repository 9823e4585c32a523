"""An API worker's view of the runner's process: its note, and whether who wrote it lives."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

from sam3_runner import liveness
from sam3_runner.liveness import RunnerLife, leave_note

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def living() -> set[str]:
    """The identities of the processes that live."""
    return set()


@pytest.fixture
def note(tmp_path: Path) -> Path:
    """Where the runner leaves its note."""
    return tmp_path / "runner.pid"


@pytest.fixture
def life(note: Path, living: set[str], monkeypatch: pytest.MonkeyPatch) -> RunnerLife:
    """The view, which looks each time."""
    monkeypatch.setattr(liveness, "LOOK_S", 0.0)
    return RunnerLife(note, living.__contains__)


def test_start(life: RunnerLife, note: Path, living: set[str]) -> None:
    """No note, then the note of an earlier server's runner, then ours."""
    assert life.look() is None
    leave_note(note, "earlier")
    assert life.look() is None
    assert life.absence == "the model's process is starting"
    living.add("first")
    leave_note(note, "first")
    assert life.look() == "first"
    assert list(note.parent.iterdir()) == [note]


def test_death_and_successor(
    life: RunnerLife, note: Path, living: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A death is seen at the next look and logged once; the successor is found by its note."""
    living.add("first")
    leave_note(note, "first")
    assert life.look() == "first"
    living.clear()
    with caplog.at_level(logging.WARNING, "bentoml.sam3"):
        assert [life.look(), life.look()] == [None, None]
    assert len(caplog.records) == 1
    assert life.absence == "the model's process has stopped and is being started anew"
    living.add("second")
    leave_note(note, "second")
    assert life.look() == "second"


def test_successor_is_never_taken_for_the_dead(life: RunnerLife, note: Path, living: set[str]) -> None:
    """Between two looks one may die and the next be there: the identity tells."""
    living.add("first")
    leave_note(note, "first")
    assert life.look() == "first"
    living.symmetric_difference_update({"first", "second"})
    leave_note(note, "second")
    assert life.look() == "second"


def test_dying_process(
    life: RunnerLife, note: Path, living: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that cut off a call is dead at once, though it takes a while to go; if it stays, it lives."""
    living.add("first")
    leave_note(note, "first")
    assert life.look() == "first"
    life.cut_off("another")
    assert life.look() == "first"
    life.cut_off("first")
    assert life.look() is None
    monkeypatch.setattr(life, "_dying_until_s", 0.0)
    assert life.look() == "first"


def test_looks_are_few(note: Path) -> None:
    """Hundreds of calls that wait together do not look hundreds of times."""
    looks = []

    def is_alive(identity: str) -> bool:
        looks.append(identity)
        return True

    leave_note(note, "first")
    life = RunnerLife(note, is_alive)
    assert {life.look() for _ in range(300)} == {"first"}
    assert len(looks) < 20
