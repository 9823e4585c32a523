"""The checks of the machine and the settings, as the image runs them: without the client."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from commands.doctor import all_checks, machine, server
from commands.local_server import ROOT, clean_environment

if TYPE_CHECKING:
    from pathlib import Path

KEY = "0123456789abcdef"
SECRET = "hush-hush-0123456789abcdef"


def doctor(data_dir: Path, **settings: str) -> tuple[int, dict[str, list[str]]]:
    """The exit status and, by the name of the check, the lines of `python -m commands.doctor`."""
    ended = subprocess.run(
        [sys.executable, "-m", "commands.doctor", "--port", "0"],
        cwd=ROOT,
        env=clean_environment(data_dir, KEY) | settings,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.stderr == ""
    assert SECRET not in ended.stdout
    lines: dict[str, list[str]] = {}
    for line in ended.stdout.splitlines():
        if line[0] != " ":
            lines.setdefault(line[9:27].strip(), []).append(line)
        else:
            lines[next(reversed(lines))][-1] += " " + line.strip()
    return ended.returncode, lines


def test_nothing_is_wrong_with_the_demo(tmp_path: Path) -> None:
    """The demo's settings pass every check, and none leaves a file behind."""
    status, lines = doctor(tmp_path / "data")
    assert status == 0
    assert {line.split()[0] for found in lines.values() for line in found} <= {"ok", "warning"}
    assert "embedded demo checkpoint" in lines["weights"][0]
    assert not (tmp_path / "data").exists()


@pytest.mark.slow
def test_half_broken_settings(tmp_path: Path) -> None:
    """Every wrong setting has its line with its mend; the checks that do not need them go on; no secret."""
    weights = tmp_path / "sam3.pt"
    weights.write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "file").write_text("")
    status, lines = doctor(
        tmp_path / "file" / "data",
        API_SECRET_KEY=SECRET[:9],
        API_WORKERS="none",
        R2_ENDPOINT="https://ACCOUNT.r2.cloudflarestorage.com",
        R2_ACCESS_KEY_ID=SECRET,
        HF_TOKEN=SECRET,
        SAM3_WEIGHTS_PATH=str(weights),
        SUPABASE_URL="http://127.0.0.1:9",
        SUPABASE_SERVICE_KEY=f"sb_secret_{SECRET}",
        MAX_INFLIGHT="5",
    )
    assert status == 1
    failed = " ".join(lines["settings"])
    for words in ("API_SECRET_KEY must have 16", "API_WORKERS must be", "R2_ENDPOINT still has"):
        assert words in failed
    assert "if MAX_IN_FLIGHT is meant" in failed
    assert "is a Git LFS pointer" in lines["weights"][0]
    assert "cannot be created in" in lines["DATA_DIR"][0]
    assert lines["results"][0].startswith("warning")
    assert "tried again at the first task" in lines["results"][0]


def test_missing_weights_and_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are not there are a failure without a token, a warning with one; it is not shown."""
    monkeypatch.setenv("ENV_FILE", os.devnull)
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    monkeypatch.setenv("API_SECRET_KEY", KEY)
    monkeypatch.setenv("SAM3_WEIGHTS_PATH", str(tmp_path / "weights" / "sam3.pt"))
    status = {check.name: check.status for check in all_checks(0)}
    assert (status["weights"], status["HF_TOKEN"]) == ("failed", "warning")
    monkeypatch.setenv("HF_TOKEN", "hf_" + SECRET)
    checks = {check.name: check for check in all_checks(0)}
    assert (checks["weights"].status, checks["HF_TOKEN"].status) == ("warning", "ok")
    assert not any(SECRET in check.finding + check.mend for check in checks.values())


def test_port_of_another_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that is taken is a failure that names another way."""
    monkeypatch.setenv("ENV_FILE", os.devnull)
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    monkeypatch.setenv("SAM3_WEIGHTS_PATH", "demo")
    monkeypatch.setattr(server, "HEALTH_TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        taken.settimeout(0)
        checks = {check.name: check for check in all_checks(taken.getsockname()[1])}
    assert checks["port"].status == "failed"
    assert "--port" in checks["port"].mend


def test_packages_are_compared_with_the_lock(tmp_path: Path) -> None:
    """A package that is missing fails; another version is a warning, but not another build of the same."""
    lock = tmp_path / "requirements.lock"
    lock.write_text(f"pytest=={pytest.__version__}\n    # via x\nno-such-package==1.0\nnumpy==0.1\n")
    missing, different = machine._packages(lock)
    assert (missing.status, missing.finding) == ("failed", "no-such-package not installed")
    assert different.status == "warning"
    assert "(0.1 is locked)" in different.finding
