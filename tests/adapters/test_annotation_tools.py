"""Runs the tests that need the annotation tools, in these tools' own environment, beside the shared server.

The tools cannot be installed beside the server's packages. Without the other tests:

    python -m tests.adapters.with_server .venv/annotation/bin/python -m pytest -c /dev/null --rootdir . \
        --noconftest tests/adapters/test_cvat.py
"""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from commands.local_server import ROOT
from tests.tiers import need

if TYPE_CHECKING:
    from commands.local_server import LocalServer

pytestmark = [pytest.mark.server, pytest.mark.slow]

PYTHON = ROOT / ".venv" / "annotation" / "bin" / "python"
TESTS = (
    "tests/outputs/test_coco.py",
    "tests/outputs/test_converters.py",
    "tests/sam3_client/test_supervision.py",
    "tests/adapters/test_label_studio.py",
    "tests/adapters/test_cvat.py",
)
TIMEOUT_S = 600


def test_annotation_tools_read_our_answers_and_call_our_adapters(server: LocalServer) -> None:
    """Every test with the annotation tools passes, and none is skipped."""
    need(None if PYTHON.exists() else "no .venv/annotation (make test installs it)")
    ended = subprocess.run(
        [
            *(PYTHON, "-m", "pytest", "-c", os.devnull, "--rootdir", ".", "--noconftest"),
            *("-q", "-rs", "-p", "no:cacheprovider", *TESTS),
        ],
        cwd=ROOT,
        env=os.environ | {"SAM3_URL": server.url, "SAM3_API_KEY": server.api_key},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=TIMEOUT_S,
        check=False,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout
    assert " skipped" not in ended.stdout, ended.stdout
