"""Counts the GPUs of this host that the installed PyTorch can use, and gives a process one of them.

It asks NVIDIA's driver, without torch: the server refuses to start within a second, before any process loads
torch.
"""

from __future__ import annotations

import ctypes
import os
import runpy
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from sam3_runner.errors import DeviceUnavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
"""Oldest branch of NVIDIA's driver for each major version of CUDA, whatever its minor version."""

NO_DEVICE = 100
"""CUDA_ERROR_NO_DEVICE."""


MIG_PREFIX = "MIG-"
"""Begins the UUID of a part of a GPU (multi-instance GPU)."""


def count_gpus(named: Sequence[str] | None) -> int:
    """How many GPUs processes of this server can use, one each; at least 1.

    Args:
        named: the items of `CUDA_VISIBLE_DEVICES`, which the driver obeys too; None where it is not set.

    Raises:
        DeviceUnavailable: there is none that torch can use; the message has the remedy.
    """
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
    # The driver shows a process one MIG device, however many are named. Each process here needs one only.
    if named is not None and all(name.startswith(MIG_PREFIX) for name in named):
        return len(named)
    count = ctypes.c_int()
    _call(driver, "cuDeviceGetCount", ctypes.byref(count))
    return count.value


def take_gpu(index: int, named: Sequence[str] | None) -> None:
    """Let CUDA show this process one GPU alone. To be called before torch is imported.

    Where fewer are named, the model runs on the CPU, and nothing changes.

    Args:
        index: among the GPUs that `count_gpus` counts.
        named: as for `count_gpus`.
    """
    if named is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(index)
    elif index < len(named):
        os.environ["CUDA_VISIBLE_DEVICES"] = named[index]


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
