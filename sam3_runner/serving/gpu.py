"""Checks whether the installed PyTorch can use a GPU of this host. Asks NVIDIA's driver, without torch.

So the server refuses to start within a second, before any process loads torch.
"""

from __future__ import annotations

import ctypes
import runpy
from importlib.util import find_spec
from pathlib import Path

from sam3_runner.errors import DeviceUnavailable

OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
"""Oldest branch of NVIDIA's driver for each major version of CUDA, whatever its minor version."""

NO_DEVICE = 100
"""CUDA_ERROR_NO_DEVICE."""


def check_gpu() -> None:
    """Raise `DeviceUnavailable`, with the remedy, unless torch can use a GPU of this host."""
    built_for = _torch_cuda_version()
    if built_for is None:
        raise DeviceUnavailable("PyTorch here is built without CUDA: install its CUDA build")
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise DeviceUnavailable(
            "there is no NVIDIA driver here (libcuda.so.1): give the container a GPU (--gpus all)"
        ) from None
    _check_driver_version(driver, built_for)
    _call(driver, "cuInit", 0)


def _torch_cuda_version() -> str | None:
    """The CUDA version that torch is built for, from torch's own small version file."""
    torch = find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    version: str | None = runpy.run_path(str(Path(torch.origin).with_name("version.py")))["cuda"]
    return version


def _check_driver_version(driver: ctypes.CDLL, built_for: str) -> None:
    version = ctypes.c_int()
    _call(driver, "cuDriverGetVersion", ctypes.byref(version))
    major, minor = version.value // 1000, version.value % 1000 // 10
    needed = int(built_for.partition(".")[0])
    if major < needed:
        branch = OLDEST_DRIVER.get(needed)
        raise DeviceUnavailable(
            f"PyTorch here is built for CUDA {built_for}"
            + (f", which needs NVIDIA driver {branch} or newer" if branch else "")
            + f"; this host's driver supports CUDA {major}.{minor}: use an image of the CUDA {major} line, "
            "or a host with a newer driver"
        )


def _call(driver: ctypes.CDLL, function: str, *arguments: object) -> None:
    """Call a function of the driver. Raises `DeviceUnavailable` when its status is not 0."""
    status = getattr(driver, function)(*arguments)
    if status != 0:
        name = ctypes.c_char_p()
        driver.cuGetErrorName(status, ctypes.byref(name))
        reason = name.value.decode() if name.value else f"error {status}"
        if status == NO_DEVICE:
            remedy = "give the container one (--gpus all, CUDA_VISIBLE_DEVICES)"
        else:
            remedy = "look at nvidia-smi on the host, or use another host"
        raise DeviceUnavailable(f"NVIDIA's driver shows no GPU here ({function}: {reason}): {remedy}")
