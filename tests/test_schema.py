"""The server against its API description: schemathesis generates requests from it and checks the answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from commands.local_server import ROOT
from tests.drawn import scene
from tests.edge import png_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from tests.edge import Edge

pytestmark = pytest.mark.server

CASES = 1000
EXAMPLES_PER_ROUTE = "300"
"""Two of the five routes have no parameters, and so only a few cases."""
TIMEOUT_S = 900
CONFIG = """
[checks]
# Schemathesis' own list has no 413: a wrong body may be too long as well.
negative_data_rejection.expected-statuses = [400, 401, 403, 404, 405, 406, 409, 413, 415, 422, 429, "5xx"]
"""


def test_server_conforms_to_its_description(edge: Edge, tmp_path: Path) -> None:
    """Valid requests are served, invalid ones are refused, and every answer matches the description."""
    report_path = tmp_path / "report.json"
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{edge.server.url}/docs.json"),
            *("--header", f"X-API-Key: {edge.server.api_key}"),
            *("--max-examples", EXAMPLES_PER_ROUTE, "--seed", "1", "--generation-deterministic"),
            # The one required header is the key, which all requests have here: see in_process/test_gate.py.
            *("--continue-on-failure", "--no-color", "--exclude-checks", "missing_required_header"),
            *("--request-timeout", "60", "--report", "json", "--report-json-path", str(report_path)),
        ],
        cwd=tmp_path,  # schemathesis writes files there
        env=os.environ
        | {
            "PYTHONPATH": str(ROOT),
            "SCHEMATHESIS_HOOKS": "tests.schema_hooks",
            "TEST_IMAGE_KEY": edge.upload(png_bytes(scene(100).image)),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=TIMEOUT_S,
        check=False,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout
    report = json.loads(report_path.read_text())
    assert (report["failures"], report["errors"]) == ([], [])
    assert report["test_cases"]["generated"] >= CASES
    # Not all requests were refused: the model ran too.
    for route in ("POST /api/v1/predict", "POST /api/v1/predict/batch", "POST /v1/images/segmentations"):
        assert report["valid_rates"][route]["fuzzing"]["accepted"] > 0
