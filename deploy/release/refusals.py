"""Checks before a release is built: a clean tree, the version, its section in the changelog, a free tag."""

from __future__ import annotations

import re
import runpy
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_VERSION = re.compile(r"\d+\.\d+\.\d+")
_SECTION = re.compile(r"^## ", re.MULTILINE)
_DATED = re.compile(r"\[(?P<version>[^\]]+)\] - \d{4}-\d{2}-\d{2}")


class NoRelease(Exception):
    """The release cannot be made; the message says why and what to do."""


def refusals(root: Path, version: str) -> list[str]:
    """List the reasons why `version` cannot be released, one sentence each; empty if it can.

    Args:
        root: the repository's folder.
        version: the version to release, such as 1.2.3.
    """
    if not _VERSION.fullmatch(version):
        return [f"VERSION={version} is not a version: use one such as 1.2.3"]
    return [
        *_uncommitted(root),
        *_other_version(root, version),
        *_changelog(root, version),
        *_tagged_elsewhere(root, version),
    ]


def _uncommitted(root: Path) -> Iterator[str]:
    changed = [line[3:] for line in git(root, "status", "--porcelain").splitlines()]
    if changed:
        some = ", ".join(changed[:5])
        yield f"the tree differs from its commit in {some}: commit or remove {_pronoun(changed)}"


def _pronoun(files: list[str]) -> str:
    return "it" if len(files) == 1 else f"these {len(files)}"


def _other_version(root: Path, version: str) -> Iterator[str]:
    ours = runpy.run_path(str(root / "version.py"))["VERSION"]
    if ours != version:
        yield f"VERSION={version}, but version.py has {ours}: change it there, in a commit"


def _changelog(root: Path, version: str) -> Iterator[str]:
    """Check that the section of `version` has lines, and that Unreleased has none."""
    sections: dict[str, str] = {}
    for section in _SECTION.split((root / "CHANGELOG.md").read_text(encoding="utf-8"))[1:]:
        title, _, lines = section.partition("\n")
        dated = _DATED.fullmatch(title.strip())
        sections[dated["version"] if dated else title.strip()] = lines
    if not sections.get(version, "").strip():
        yield (
            f"CHANGELOG.md has no lines under '## [{version}] - YYYY-MM-DD': move those of Unreleased there, "
            "with today's date"
        )
    elif sections.get("[Unreleased]", "").strip():
        yield f"CHANGELOG.md still has lines under Unreleased: move them to {version}, which includes them"


def _tagged_elsewhere(root: Path, version: str) -> Iterator[str]:
    """Refuse a tag on another commit. A tag on this commit is fine: the workflow builds from it."""
    tag = tag_of(version)
    if git(root, "tag", "--list", tag).strip() and git(root, "rev-list", "-n1", tag) != head(root):
        yield f"the tag {tag} is on another commit: increase the version, because a release never changes"


def tag_of(version: str) -> str:
    """The git tag of a version."""
    return f"v{version}"


def head(root: Path) -> str:
    """The commit that is checked out."""
    return git(root, "rev-parse", "HEAD")


def git(root: Path, *words: str) -> str:
    """Run git; returns its output without the last newline."""
    return subprocess.run(
        ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
    ).stdout.rstrip("\n")
