"""How an API worker sees the runner's process: its identity in a file, and whether that process lives."""

from __future__ import annotations

import logging
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from sam3_runner.serving import liveness
from sam3_runner.serving.liveness import RunnerLiveness, pids_in, reserve, write_identity

if TYPE_CHECKING:
    from pathlib import Path


ON_A_SMALL_DISK = (
    *("unshare", "--user", "--map-root-user", "--mount", "sh", "-c"),
    'mount -t tmpfs -o size=16k tmpfs "$0" && exec "$@"',
)
START_ON_A_FULL_DISK = """
import pathlib, sys
from sam3_runner.serving.liveness import reserve, write_identity
file = pathlib.Path(sys.argv[1], "runner.pid")
reserve(file)
try:
    file.with_name("filler").write_bytes(bytes(1 << 20))
except OSError:
    print("disk full")
for identity in ("7:first", "71:second"):
    write_identity(file, identity)
    print(file.read_text())
"""


@pytest.fixture
def living() -> set[str]:
    """The identities of the processes that live."""
    return set()


@pytest.fixture
def identity_file(tmp_path: Path) -> Path:
    """The file that the runner writes its identity to, as a server makes it before its runner starts."""
    path = tmp_path / "runner.pid"
    reserve(path)
    return path


@pytest.fixture
def runner(identity_file: Path, living: set[str], monkeypatch: pytest.MonkeyPatch) -> RunnerLiveness:
    """The liveness, without its cache."""
    monkeypatch.setattr(liveness, "CACHE_TIME_S", 0.0)
    return RunnerLiveness(identity_file, living.__contains__)


def test_pids_of_several_runners(tmp_path: Path) -> None:
    """The pids of all runners that have written their files; one that has not, or a torn text, has none."""
    texts = {"runner_0.pid": "71:boot-1.00", "runner_1.pid": "72:boot-2.00", "torn.pid": "", "odd.pid": "x:1"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    assert pids_in(tmp_path / name for name in [*texts, "missing.pid"]) == {71, 72}


def test_start(runner: RunnerLiveness, identity_file: Path, living: set[str]) -> None:
    """No identity, then that of a runner that has ended, then of the one that lives."""
    assert runner.find() is None
    write_identity(identity_file, "ended, with a longer name")
    assert runner.find() is None
    assert runner.reason_absent == "the model's process is starting"
    living.add("first")
    write_identity(identity_file, "first")
    assert runner.find() == "first"


def test_restart(runner: RunnerLiveness, identity_file: Path, living: set[str]) -> None:
    """The runner of an earlier server, which may still be ending, is none of this server's."""
    living.add("earlier")
    write_identity(identity_file, "earlier")
    reserve(identity_file)
    assert runner.find() is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a mount namespace")
def test_start_on_a_full_disk(tmp_path: Path) -> None:
    """A runner that starts while the disk is full can say which process it is, as can the next one."""
    if subprocess.run([*ON_A_SMALL_DISK, str(tmp_path), "true"], check=False).returncode:
        pytest.skip("nothing can be mounted here")
    command = [*ON_A_SMALL_DISK, str(tmp_path), sys.executable, "-c", START_ON_A_FULL_DISK, str(tmp_path)]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    assert ran.stdout.split() == ["disk", "full", "7:first", "71:second"]


def test_death_and_successor(
    runner: RunnerLiveness, identity_file: Path, living: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A death is seen at the next call and logged once; the successor is found by its identity."""
    living.add("first")
    write_identity(identity_file, "first")
    assert runner.find() == "first"
    living.clear()
    with caplog.at_level(logging.WARNING, "sam3_runner"):
        assert [runner.find(), runner.find()] == [None, None]
    assert len(caplog.records) == 1
    assert runner.reason_absent == "the model's process has stopped and is being restarted"
    living.add("second")
    write_identity(identity_file, "second")
    assert runner.find() == "second"


def test_successor_is_another_process(runner: RunnerLiveness, identity_file: Path, living: set[str]) -> None:
    """Between two calls one process may die and the next start: their identities differ."""
    living.add("first")
    write_identity(identity_file, "first")
    assert runner.find() == "first"
    living.symmetric_difference_update({"first", "second"})
    write_identity(identity_file, "second")
    assert runner.find() == "second"


def test_dying_process(
    runner: RunnerLiveness, identity_file: Path, living: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that broke off a call counts as dead at once, and as alive if it is still there later."""
    living.add("first")
    write_identity(identity_file, "first")
    assert runner.find() == "first"
    runner.mark_dying("another")
    assert runner.find() == "first"
    runner.mark_dying("first")
    assert runner.find() is None
    monkeypatch.setattr(runner, "_dying_until_s", 0.0)
    assert runner.find() == "first"


def test_liveness_is_cached(identity_file: Path) -> None:
    """Hundreds of calls in a row do not check the process hundreds of times."""
    checks = []

    def is_alive(identity: str) -> bool:
        checks.append(identity)
        return True

    write_identity(identity_file, "first")
    runner = RunnerLiveness(identity_file, is_alive)
    assert {runner.find() for _ in range(300)} == {"first"}
    assert len(checks) < 20
