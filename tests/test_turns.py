"""How workers share the tests out."""

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

def note(word):
    with pathlib.Path(os.environ["NOTES"]).open("a") as notes:
        notes.write(f"{word} {os.environ['PYTEST_XDIST_WORKER']}\\n")

@pytest.mark.parametrize("number", range(4))
def test_beside_others(number):
    note("begin")
    time.sleep(0.1)
    note("end")

@pytest.mark.alone
@pytest.mark.parametrize("number", range(2))
def test_alone(number):
    note("alone")
    time.sleep(0.5)  # time enough for a neighbour
    note("end")
"""


def test_what_is_alone_has_no_neighbour(tmp_path: Path) -> None:
    """Two workers do tests beside each other, but nothing beside one that is `alone`."""
    folder, notes = tmp_path / "some", tmp_path / "notes"
    folder.mkdir()
    (folder / "conftest.py").write_text(HOOKS)
    for name in ("test_one.py", "test_two.py"):
        (folder / name).write_text(TESTS)
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "--numprocesses", "2", "-p", "no:cacheprovider", str(folder)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "NOTES": str(notes)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "12 passed" in ended.stdout, ended.stdout
    at_work: dict[str, str] = {}
    for word, worker in map(str.split, notes.read_text().splitlines()):
        if word == "end":
            del at_work[worker]
            continue
        at_work[worker] = word
        assert len(at_work) == 1 or "alone" not in at_work.values(), notes.read_text()
    assert {line.split()[1] for line in notes.read_text().splitlines()} == {"gw0", "gw1"}
