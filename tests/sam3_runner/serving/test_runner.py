"""The runner as a BentoML service."""

from __future__ import annotations

from typing import Any

from sam3_runner.serving.engine import EngineConfig
from sam3_runner.serving.runner import runner_service


def do_nothing() -> None:
    pass


def test_one_process_a_runner() -> None:
    """A runner is one process under the name that its callers know, and BentoML gives it no GPU."""
    service: Any = runner_service(
        EngineConfig("demo"),
        name="sam3_runner_1",
        timeout_s=10.0,
        on_start=do_nothing,
        on_failure=do_nothing,
        on_device_lost=do_nothing,
    )
    assert service.name == "sam3_runner_1"
    assert service.config["workers"] == 1
    assert "resources" not in service.config
