"""docs/operations.md: each command is run by a test, or is marked as not run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.deploy.commands import NOT_RUN, command_lines, commands_in
from tests.tiers import need

if TYPE_CHECKING:
    from commands.local_server import LocalServer

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "operations.md"
VAST = [".venv/vastai/bin/python", "deploy/vast/vast.py"]
SMOKE = [".venv/bin/python", "deploy/smoke.py"]
HOST = re.compile(r"https://sam3-(blue|green)\.example\.com|http://127\.0\.0\.1:3000")


def lines_of(*beginning: str) -> list[list[str]]:
    """The page's commands that start with these words."""
    return [words for words in commands_in(PAGE) if words[: len(beginning)] == [*beginning]]


def test_every_command_is_run_or_marked() -> None:
    """Commands of vast.py run in test_vast.py, make's have their own tests, and the rest runs below."""
    left = [
        words
        for words in commands_in(PAGE)
        if words[:2] not in (VAST, SMOKE) and words[0] not in {"make", "curl"}
    ]
    assert left == []
    assert lines_of(*VAST)
    assert sum(NOT_RUN in line for line in command_lines(PAGE)) > 0


def test_targets_of_make_exist() -> None:
    """Each `make` command of the page names a target of the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {words[1] for words in lines_of("make")} <= targets


@pytest.mark.server
def test_smoke_commands_pass(server: LocalServer, tmp_path: Path) -> None:
    """Each smoke command passes against a server with embedded stores."""
    file = tmp_path / "smoke.env"
    file.write_text(f"API_SECRET_KEY={server.api_key}\nDATA_DIR={server.data_dir}\n")
    values = {
        ".venv/bin/python": sys.executable,
        "/etc/sam3/smoke.env": str(file),
        "SMOKE_USER": "smoke-of-the-page",
    }
    lines = lines_of(*SMOKE)
    assert lines
    for line in lines:
        words = [HOST.sub(server.url, values.get(word, word)) for word in line]
        assert server.url in words
        ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
        assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.server
def test_curl_commands_succeed(server: LocalServer, tmp_path: Path) -> None:
    """Each curl command gets 200, with the key in a file."""
    need(None if shutil.which("curl") else "no curl (apt-get install curl)")
    header = tmp_path / "key.header"
    header.write_text(f"X-API-Key: {server.api_key}\n")
    lines = lines_of("curl")
    assert len(lines) == 2
    for line in lines:
        words = [HOST.sub(server.url, word).replace("/etc/sam3/key.header", str(header)) for word in line]
        ended = subprocess.run([*words, "-w", "%{http_code}"], capture_output=True, text=True, check=False)
        assert ended.stdout.endswith(str(httpx.codes.OK.value)), ended.stdout
