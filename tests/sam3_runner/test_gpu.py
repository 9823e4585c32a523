"""Which GPUs the start takes, by a real library in the place of NVIDIA's driver."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.driver import NO_DEVICE, fake_driver, torch_built_for

ROOT = Path(__file__).parents[2]
CODE = """
from sam3_runner.errors import DeviceUnavailable
from sam3_runner.gpu import check_gpu
try:
    check_gpu()
except DeviceUnavailable as error:
    print(error)
"""


def objection(environment: dict[str, str]) -> str:
    """What a process with `environment` says of its GPU; empty when it takes it."""
    ended = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return ended.stdout.strip()


@pytest.mark.parametrize(
    ("driver", "cuda"), [(13000, "13.0"), (13010, "13.0"), (13000, "13.2"), (13000, "12.8"), (12020, "12.8")]
)
def test_driver_of_the_same_major_version_serves(tmp_path: Path, driver: int, cuda: str) -> None:
    """A driver runs every CUDA of its own major version, and of those before."""
    assert objection(fake_driver(tmp_path, driver) | torch_built_for(tmp_path, cuda)) == ""


@pytest.mark.parametrize(
    ("driver", "cuda", "needed", "supported"),
    [
        (12040, "13.0", ", which needs NVIDIA driver 580 or newer", "12.4"),
        (11080, "12.6", ", which needs NVIDIA driver 525 or newer", "11.8"),
        (13020, "14.1", "", "13.2"),
    ],
)
def test_old_driver_is_refused(tmp_path: Path, driver: int, cuda: str, needed: str, supported: str) -> None:
    """What torch needs and what the driver supports are named, and what would fit."""
    said = objection(fake_driver(tmp_path, driver) | torch_built_for(tmp_path, cuda))
    assert said == (
        f"PyTorch here is built for CUDA {cuda}{needed}; this host's driver supports CUDA {supported}: "
        f"use an image of the CUDA {supported[:2]} line, or a host with a newer driver"
    )


def test_driver_without_a_gpu(tmp_path: Path) -> None:
    """A container that has the driver and no GPU: the driver's own name for it is in the sentence."""
    said = objection(fake_driver(tmp_path, 13000, NO_DEVICE) | torch_built_for(tmp_path, "13.0"))
    assert said.startswith("NVIDIA's driver shows no GPU here (cuInit: CUDA_ERROR_NO_DEVICE): give the ")


def test_error_without_a_name(tmp_path: Path) -> None:
    """A driver newer than we know may return what it has no name for."""
    said = objection(fake_driver(tmp_path, 13000, 4711) | torch_built_for(tmp_path, "13.0"))
    assert "(cuInit: error 4711)" in said


def test_torch_without_cuda(tmp_path: Path) -> None:
    """A CPU build of torch uses no GPU, whatever driver there is."""
    said = objection(fake_driver(tmp_path, 13000) | torch_built_for(tmp_path, None))
    assert said == "PyTorch here is built without CUDA: install its CUDA build"
