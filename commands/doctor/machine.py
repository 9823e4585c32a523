"""Checks of the machine and its Python. Needs the standard library alone: packages may be missing."""

from __future__ import annotations

import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from commands.doctor.check import Check

if TYPE_CHECKING:
    from collections.abc import Iterator

LOCK = Path(__file__).parent.parent.parent / "requirements.lock"
PINNED = re.compile(r"^([\w.-]+)==([^\s;+]+)", re.MULTILINE)
OLDEST_PYTHON = (3, 11)
SHOWN_PACKAGES = 5
DEMO_MEMORY_GB = 2.0
"""The demo's processes take 1.2 GB together (docs/benchmarks.md)."""


def machine_checks() -> Iterator[Check]:
    """Python, its packages, and memory."""
    yield _python()
    yield from _packages(LOCK)
    yield _memory()


def _python() -> Check:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.executable}"
    if sys.version_info < OLDEST_PYTHON:
        return Check("Python", "failed", found, "install Python 3.11 or newer")
    return Check("Python", "ok", found)


def _packages(lock: Path) -> Iterator[Check]:
    """The packages that `lock` names; a build of torch for another device has the same version."""
    if not lock.exists():  # in the image
        yield Check("packages", "ok", "not compared: there is no requirements.lock here")
        return
    missing, different = [], []
    pinned = PINNED.findall(lock.read_text(encoding="utf-8"))
    for name, wanted in pinned:
        try:
            if version(name).partition("+")[0] != wanted:
                different.append(f"{name} {version(name)} ({wanted} is locked)")
        except PackageNotFoundError:
            missing.append(name)
    mend = "pip install -r requirements.lock, in this environment"
    if missing:
        yield Check("packages", "failed", f"{_some(missing)} not installed", mend)
    if different:
        yield Check("packages", "warning", f"other versions than tested: {_some(different)}", mend)
    if not missing and not different:
        yield Check("packages", "ok", f"all {len(pinned)} in the versions of requirements.lock")


def _some(names: list[str]) -> str:
    rest = len(names) - SHOWN_PACKAGES
    return ", ".join(names[:SHOWN_PACKAGES]) + (f" and {rest} more" if rest > 0 else "")


def _memory() -> Check:
    try:
        import psutil  # noqa: PLC0415 - it may be missing

        from sam3_runner.serving.memory_limit import memory_limit_bytes  # noqa: PLC0415 - needs numpy
    except ImportError as error:
        return Check("memory", "warning", f"not measured: {error.name} is not installed")
    memory, limit_bytes = psutil.virtual_memory(), memory_limit_bytes()
    free_gb = min(memory.available, limit_bytes) / 1e9
    found = f"{free_gb:.1f} GB available"
    if limit_bytes < memory.total:
        found += f", of a container limited to {limit_bytes / 1e9:.1f} GB"
    if free_gb < DEMO_MEMORY_GB:
        return Check("memory", "warning", found, "free some: the demo alone takes about 1.2 GB")
    return Check("memory", "ok", found)
