"""`make audit` finds planted faults, and none in this repository."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.release.conftest import git

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent


def planted(key: str) -> str:
    """A made-up pair of AWS keys, built from parts so that this file contains no key."""
    secret = f"{key[::-1]}x7ZbkR3uTnYvWcE9mHgJ2fKq"
    return f"aws_access_key_id = AKIA{key}\naws_secret_access_key = {secret}\n"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone of this repository with its history, and with the current Makefile and workflows."""
    folder = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    shutil.copy(ROOT / "Makefile", folder)
    shutil.copytree(ROOT / ".github", folder / ".github", dirs_exist_ok=True)
    return folder


def make(folder: Path, target: str) -> subprocess.CompletedProcess[str]:
    """Run a target with the tools of the tests' environment."""
    tools = Path(sys.executable).parent
    return subprocess.run(
        ["make", "--old-file", f"{tools.parent}/dev", f"VENV={tools.parent}", target],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_repository_has_no_secrets(clone: Path) -> None:
    """Neither the files nor the history have secrets; .env, which git ignores, is not scanned."""
    (clone / ".env").write_text(planted("QYLPMN5HHHFPZAM2"))
    found = make(clone, "audit-secrets")
    assert found.returncode == 0, found.stdout + found.stderr


def test_secrets_are_found(clone: Path) -> None:
    """A secret in an uncommitted file and one in a deleted file are found."""
    (clone / "deleted.ini").write_text(planted("QYLPMN5HHHFPZAM2"))
    git(clone, "add", "deleted.ini")
    git(clone, "commit", "--message", "Add")
    git(clone, "rm", "deleted.ini")
    git(clone, "commit", "--message", "Remove")
    (clone / "new.ini").write_text(planted("RTGKBW3SDVXQJUE6"))
    found = make(clone, "audit-secrets")
    assert found.returncode != 0
    assert "deleted.ini" in found.stdout
    assert "new.ini" in found.stdout


def test_unpinned_action_in_a_workflow_is_found(clone: Path) -> None:
    """Zizmor accepts our workflows, and finds an action that is not pinned."""
    found = make(clone, "audit-workflows")
    assert found.returncode == 0, found.stdout + found.stderr
    workflow = clone / ".github" / "workflows" / "ci.yaml"
    workflow.write_text(
        workflow.read_text().replace("3d3c42e5aac5ba805825da76410c181273ba90b1 # v7.0.1", "v7")
    )
    found = make(clone, "audit-workflows")
    assert found.returncode != 0
    assert "unpinned" in found.stdout
