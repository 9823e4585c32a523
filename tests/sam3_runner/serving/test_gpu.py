"""The start's check of the GPU, with a real shared library in place of NVIDIA's driver."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sam3_runner.serving.gpu import take_gpu
from tests.driver import NO_DEVICE, fake_driver, torch_built_for

ROOT = Path(__file__).parents[3]
CODE = """
from sam3_runner.errors import DeviceUnavailable
from sam3_runner.serving.gpu import count_gpus
try:
    count_gpus(None)
except DeviceUnavailable as error:
    print(error)
"""


def gpu_error(environment: dict[str, str]) -> str:
    """The error of `count_gpus` in a process with `environment`; empty without one."""
    return output_of(CODE, environment)


def output_of(code: str, environment: dict[str, str], *arguments: str) -> str:
    """What a process with `environment` prints."""
    ended = subprocess.run(
        [sys.executable, "-c", code, *arguments],
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
def test_driver_of_the_same_major_version_is_accepted(tmp_path: Path, driver: int, cuda: str) -> None:
    """A driver supports every CUDA version of its own major version, and of earlier ones."""
    assert gpu_error(fake_driver(tmp_path, driver) | torch_built_for(tmp_path, cuda)) == ""


@pytest.mark.parametrize(
    ("driver", "cuda", "needed", "supported"),
    [
        (12040, "13.0", ", which needs NVIDIA driver 580 or newer", "12.4"),
        (11080, "12.6", ", which needs NVIDIA driver 525 or newer", "11.8"),
        (13020, "14.1", "", "13.2"),
    ],
)
def test_old_driver_is_refused(tmp_path: Path, driver: int, cuda: str, needed: str, supported: str) -> None:
    """The error names what torch needs, what the driver supports, and a suitable image."""
    message = gpu_error(fake_driver(tmp_path, driver) | torch_built_for(tmp_path, cuda))
    assert message == (
        f"PyTorch here is built for CUDA {cuda}{needed}; this host's driver supports CUDA {supported}: "
        f"use an image of the CUDA {supported[:2]} line, or a host with a newer driver"
    )


def test_driver_without_a_gpu(tmp_path: Path) -> None:
    """For a container with the driver and no GPU the error has the driver's name for the status."""
    message = gpu_error(fake_driver(tmp_path, 13000, NO_DEVICE) | torch_built_for(tmp_path, "13.0"))
    assert message.startswith("NVIDIA's driver shows no GPU here (cuInit: CUDA_ERROR_NO_DEVICE): give the ")


def test_error_without_a_name(tmp_path: Path) -> None:
    """A status without a name is reported as a number."""
    message = gpu_error(fake_driver(tmp_path, 13000, 4711) | torch_built_for(tmp_path, "13.0"))
    assert "(cuInit: error 4711)" in message


def test_torch_without_cuda(tmp_path: Path) -> None:
    """A CPU build of torch uses no GPU, whatever the driver."""
    message = gpu_error(fake_driver(tmp_path, 13000) | torch_built_for(tmp_path, None))
    assert message == "PyTorch here is built without CUDA: install its CUDA build"


COUNT = """
import sys
from sam3_runner.serving.gpu import count_gpus
print(count_gpus(sys.argv[1].split(",") if len(sys.argv) > 1 else None))
"""


@pytest.mark.parametrize(
    ("named", "count"),
    [
        ([], 2),
        # The driver counts what CUDA_VISIBLE_DEVICES names, but of MIG devices one a process.
        (["GPU-8932f937,GPU-c5b7a1f3,GPU-00000000"], 2),
        (["MIG-GPU-b1028956/1/0,MIG-GPU-b1028956/2/0,MIG-4f1b"], 3),
        (["MIG-4f1b"], 1),
    ],
)
def test_gpus_are_counted(tmp_path: Path, named: list[str], count: int) -> None:
    """The count is the driver's, but for parts of GPUs."""
    environment = fake_driver(tmp_path, 13000, gpus=2) | torch_built_for(tmp_path, "13.0")
    assert output_of(COUNT, environment, *named) == str(count)


@pytest.mark.parametrize(
    ("index", "named", "taken"),
    [
        (0, None, "0"),
        (1, None, "1"),
        (1, ["3", "5"], "5"),
        (0, ["GPU-8932f937", "GPU-c5b7a1f3"], "GPU-8932f937"),
        (1, ["MIG-4f1b", "MIG-77aa"], "MIG-77aa"),
    ],
)
def test_each_process_takes_a_gpu_of_its_own(
    monkeypatch: pytest.MonkeyPatch, index: int, named: list[str] | None, taken: str
) -> None:
    """A process sees one GPU: of those that are named, or of the whole host."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "before")
    take_gpu(index, named)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == taken


def test_no_gpu_is_taken_where_none_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runners on the CPU leave the variable that hides the GPUs as it is."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    take_gpu(1, [""])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
