"""The distribution of tests to workers."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

HOOKS = "from tests.conftest import pytest_runtest_protocol, pytest_xdist_make_scheduler\n"
TESTS = """
import os, pathlib, time
import pytest

def record(event):
    with pathlib.Path(os.environ["EVENTS"]).open("a") as events:
        events.write(f"{event} {os.environ['PYTEST_XDIST_WORKER']}\\n")

@pytest.mark.parametrize("number", range(4))
def test_concurrent(number):
    record("begin")
    time.sleep(0.1)
    record("end")

@pytest.mark.alone
@pytest.mark.parametrize("number", range(2))
def test_alone(number):
    record("alone")
    time.sleep(0.5)  # long enough for another test to start
    record("end")
"""


def test_tests_marked_alone_run_exclusively(tmp_path: Path) -> None:
    """Two workers run tests concurrently, but none during a test that is marked `alone`."""
    folder, events = tmp_path / "some", tmp_path / "events"
    folder.mkdir()
    (folder / "conftest.py").write_text(HOOKS)
    for name in ("test_one.py", "test_two.py"):
        (folder / name).write_text(TESTS)
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "--numprocesses", "2", "-p", "no:cacheprovider", str(folder)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "EVENTS": str(events)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "12 passed" in ended.stdout, ended.stdout
    running: dict[str, str] = {}
    for event, worker in map(str.split, events.read_text().splitlines()):
        if event == "end":
            del running[worker]
            continue
        running[worker] = event
        assert len(running) == 1 or "alone" not in running.values(), events.read_text()
    assert {line.split()[1] for line in events.read_text().splitlines()} == {"gw0", "gw1"}
