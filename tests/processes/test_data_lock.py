"""The lock on DATA_DIR: one server for each folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from processes import data_lock, identity
from settings import SettingsError

ROOT = Path(__file__).parent.parent.parent
CODE = """
import sys, pathlib
from processes import data_lock
data_lock.hold(pathlib.Path(sys.argv[1]))
print(flush=True)
input()
"""


def test_second_process_is_refused(tmp_path: Path) -> None:
    """A second process gets the first one's pid in the error, and the folder after that one is killed."""
    folder = tmp_path / "a" / "data"
    with subprocess.Popen(
        [sys.executable, "-c", CODE, str(folder)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline()
        held = data_lock.holder(folder)
        with pytest.raises(SettingsError, match=rf"in use by another server \(pid {first.pid}\)"):
            data_lock.hold(folder)
        assert data_lock.holder(folder) == held
        assert identity.is_alive(held)
        first.kill()
    data_lock.hold(folder)
    assert data_lock.holder(folder) == identity.current()
    with pytest.raises(SettingsError, match="in use"):
        data_lock.hold(folder)


def test_unused_folder_has_no_holder(tmp_path: Path) -> None:
    """A folder that no server has used has no holder."""
    assert data_lock.holder(tmp_path / "none") == ""


def test_unusable_folder_is_refused(tmp_path: Path) -> None:
    """A file in place of the folder, or of its parent, is refused with a message."""
    (tmp_path / "data").write_text("a file")
    with pytest.raises(SettingsError, match=f"DATA_DIR: {tmp_path / 'data'} is not a folder: move it away"):
        data_lock.hold(tmp_path / "data")
    with pytest.raises(SettingsError, match=r"DATA_DIR: .* cannot be written \(Not a directory\)"):
        data_lock.hold(tmp_path / "data" / "below")
