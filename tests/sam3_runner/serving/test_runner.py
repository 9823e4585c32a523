"""The runner as a BentoML service."""

from __future__ import annotations

from typing import Any

import pytest

from sam3_runner.serving.engine import EngineConfig
from sam3_runner.serving.runner import runner_service


def do_nothing() -> None:
    pass


@pytest.mark.parametrize("gpu", [True, False])
def test_one_process_a_gpu(*, gpu: bool) -> None:
    """The runner is one process, and asks for a GPU only where there is one."""
    service: Any = runner_service(
        EngineConfig("demo"),
        timeout_s=10.0,
        gpu=gpu,
        on_start=do_nothing,
        on_failure=do_nothing,
        on_device_lost=do_nothing,
    )
    assert service.config["workers"] == 1
    assert ("gpu" in service.config.get("resources", {})) == gpu
