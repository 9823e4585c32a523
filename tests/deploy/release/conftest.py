"""A small project with its own git history, from which the tests make releases."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING
from zipfile import ZipFile

import pytest

if TYPE_CHECKING:
    from pathlib import Path

VERSION = "9.9.9"
CHANGELOG = f"""# Changelog

## [Unreleased]

## [{VERSION}] - 2026-11-26
### Added
- All.
"""


def git(folder: Path, *words: str) -> None:
    """Run git with a fixed identity, independent of the machine's configuration."""
    identity = (
        "-c",
        "user.name=Somebody",
        "-c",
        "user.email=somebody@example.com",
        "-c",
        "commit.gpgsign=false",
    )
    subprocess.run(["git", "-C", str(folder), *identity, *words], check=True, capture_output=True)


def commit(folder: Path) -> None:
    """Commit all files of the folder."""
    git(folder, "add", "--all")
    git(folder, "commit", "--message", "Change", "--allow-empty")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A repository whose only commit can be released as VERSION."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "version.py").write_text(f'VERSION = "{VERSION}"\n')
    (folder / "CHANGELOG.md").write_text(CHANGELOG)
    (folder / "pyproject.toml").write_text(
        '[project]\nname = "sam3"\ndynamic = ["version"]\nlicense = "Apache-2.0"\n'
    )
    (folder / ".gitignore").write_text("/dist/\n/build/\n__pycache__/\n")
    git(folder, "init", "--quiet", "--initial-branch", "main")
    commit(folder)
    return folder


def write_wheel(folder: Path, name: str, metadata: str) -> None:
    """Write a minimal wheel: its metadata, and one module."""
    about = f"{name}-1.0.dist-info"
    with ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "")
        wheel.writestr(
            f"{about}/METADATA",
            f"Metadata-Version: 2.4\nName: {name.replace('_', '-')}\nVersion: 1.0\n{metadata}\n",
        )
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
