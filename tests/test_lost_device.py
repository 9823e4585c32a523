"""A device that fails while the real server works: its process is started anew, and no task is lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from commands.local_server import local_server
from tests.breaking import BREAKING_PROMPT, BROKEN_ONCE_FILE
from tests.drawn import scene
from tests.edge import Edge, error_of, png_bytes
from tests.server_processes import runner_of, wait_until_all_workers_are_ready

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.server

SERVICE = "tests.breaking_service:SegmentationService"
RESTART_TIMEOUT_S = 120.0


def test_task_is_done_after_the_restart(tmp_path: Path) -> None:
    """The caller gets 503; the runner ends with status 1; its successor does the same attempt."""
    broken = str(tmp_path / "broken")
    settings = {BROKEN_ONCE_FILE: broken, "SAM3_DTYPE": "bfloat16", "API_WORKERS": "1"}
    with local_server(tmp_path / "data", settings, service=SERVICE) as server, Edge(server) as edge:
        assert edge.http.get("/api/v1/model/info").json()["dtype"] == "bfloat16"
        first = runner_of(server).pid
        body = edge.body(edge.upload(png_bytes(scene(600).image)), BREAKING_PROMPT)
        edge.insert_row(body)
        status, code, message = error_of(edge.send(body))
        assert (status, code) == (503, "MODEL_NOT_LOADED")
        assert "device has failed" in message
        assert "the task is kept" in message
        row = edge.settled_row(body["task_id"], RESTART_TIMEOUT_S)
        assert row.status == "done"
        wait_until_all_workers_are_ready(server, RESTART_TIMEOUT_S)
        assert runner_of(server).pid != first
        assert edge.answer(png_bytes(scene(600).image), scene(600).names[0])["instances"]
        log = server.log_path.read_text()
    assert "cpu has failed in this process: CUDA error: an illegal memory access was encountered" in log
    assert f"process {first} (service_sam3_runner_0) ended with status 1: it is restarted" in log
    assert log.count("it is restarted") == 1
