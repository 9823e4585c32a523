"""The folder of compiled kernels: used where it can be, and never a reason not to start."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sam3_runner.serving.kernel_cache import TRITON_VARIABLE, keep_kernels_in

ROOT = Path(__file__).parents[3]
KEEP = f"""
import logging, os, pathlib, sys
from sam3_runner.serving.kernel_cache import keep_kernels_in
logging.basicConfig(stream=sys.stdout, format="%(message)s")
keep_kernels_in(pathlib.Path(sys.argv[1]))
print(os.environ["{TRITON_VARIABLE}"], os.path.isdir(os.environ["{TRITON_VARIABLE}"]))
"""
LOAD = f"""
import os, pathlib, sys, time
from sam3_runner.serving.engine import Engine, EngineConfig
engine = Engine(EngineConfig("demo", sys.argv[1] or None, kernel_cache=pathlib.Path(sys.argv[2])))
engine.start()
while engine.status().state == "loading":
    time.sleep(0.1)
print(engine.status().state, os.environ.get("{TRITON_VARIABLE}"))
"""


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ.pop(TRITON_VARIABLE, None)


def run(code: str, *arguments: str, under: tuple[str, ...] = ()) -> list[str]:
    """The lines that a new Python process prints."""
    command = [*under, sys.executable, "-c", code, *arguments]
    ended = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return ended.stdout.splitlines()


def test_missing_folder_is_created(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Triton gets the folder, which is created, and left empty."""
    folder = tmp_path / "data" / "kernels"
    keep_kernels_in(folder)
    assert os.environ[TRITON_VARIABLE] == str(folder)
    assert list(folder.iterdir()) == []
    assert caplog.records == []


def test_unusable_folder_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file in place of the folder gives one warning, which names the setting, and a temporary folder."""
    file = tmp_path / "kernels"
    file.write_text("a file")
    with caplog.at_level(logging.WARNING, "sam3_runner"):
        keep_kernels_in(file)
    [record] = caplog.records
    assert record.getMessage() == (
        f"SAM3_KERNEL_CACHE: {file} cannot be used (File exists), so each start compiles the kernels anew: "
        "let this server's user write there, or name another folder"
    )
    replacement = Path(os.environ[TRITON_VARIABLE])
    assert replacement != file
    assert replacement.is_dir()
    assert file.read_text() == "a file"


def test_temporary_folder_is_removed(tmp_path: Path) -> None:
    """The replacement exists while its process runs, and no longer."""
    (tmp_path / "kernels").write_text("a file")
    _, printed = run(KEEP, str(tmp_path / "kernels"))
    folder, _, existed = printed.rpartition(" ")
    assert existed == "True"
    assert not Path(folder).exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mounts need Linux")
@pytest.mark.parametrize(
    ("option", "fault"), [("ro", "Read-only file system"), ("noexec", "it is mounted noexec")]
)
def test_mount_that_cannot_be_used_is_replaced(tmp_path: Path, option: str, fault: str) -> None:
    """Kernels are written to the folder, and libraries are loaded from it."""
    mount = f'mount -t tmpfs -o {option} none "$0" && exec "$@"'
    under = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, str(tmp_path))
    if not shutil.which("unshare") or subprocess.run([*under, "true"], check=False).returncode:
        pytest.skip("nothing can be mounted here")
    warning, printed = run(KEEP, str(tmp_path), under=under)
    assert f"SAM3_KERNEL_CACHE: {tmp_path} cannot be used ({fault})" in warning
    assert str(tmp_path) not in printed


def test_engine_sets_the_folder(tmp_path: Path) -> None:
    """Triton has the folder in a process that may use a GPU, and not where the CPU is asked for."""
    folder = tmp_path / "kernels"
    assert run(LOAD, "cpu", str(folder)) == ["ok None"]
    assert not folder.exists()
    assert run(LOAD, "", str(folder)) == [f"ok {folder}"]
    assert folder.is_dir()
