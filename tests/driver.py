"""Fake NVIDIA drivers: a libcuda.so.1 that reports what a test chooses, and a torch for a CUDA version."""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

from tests.tiers import need

if TYPE_CHECKING:
    from pathlib import Path

NO_DEVICE = 100
"""CUDA_ERROR_NO_DEVICE, which cuInit returns if no GPU is visible."""
MISMATCH, NVML_MISMATCH = 803, 18
"""The versions of the driver's library and of NVML differ from the kernel's driver, as after an upgrade."""

_DRIVER = """
#include <stddef.h>
int cuDriverGetVersion(int *version) { *version = VERSION; return 0; }
int cuInit(unsigned flags) { return STATUS; }
int cuDeviceGetCount(int *count) { *count = GPUS; return 0; }
int cuGetErrorName(int error, const char **name) {
    *name = error == 100 ? "CUDA_ERROR_NO_DEVICE" : NULL;
    return *name ? 0 : 1;
}
"""


_NVML = """
int nvmlInitWithFlags(unsigned flags) { return STATUS; }
int nvmlShutdown(void) { return 0; }
"""


def fake_driver(folder: Path, version: int, status: int = 0, gpus: int = 1) -> dict[str, str]:
    """The environment of a process that finds this driver.

    Args:
        folder: for the library.
        version: the result of cuDriverGetVersion: 12040 for CUDA 12.4.
        status: the return value of cuInit.
        gpus: the result of cuDeviceGetCount.
    """
    values = (f"-DVERSION={version}", f"-DSTATUS={status}", f"-DGPUS={gpus}")
    return _library(folder / "libcuda.so.1", _DRIVER, *values)


def fake_nvml(folder: Path, status: int) -> dict[str, str]:
    """The environment of a process whose NVML fails to initialise with `status`."""
    return _library(folder / "libnvidia-ml.so.1", _NVML, f"-DSTATUS={status}")


def _library(path: Path, source: str, *options: str) -> dict[str, str]:
    compiler = shutil.which("cc") if sys.platform.startswith("linux") else None
    need(None if compiler else "no C compiler for Linux (apt-get install gcc libc6-dev)")
    subprocess.run(
        [str(compiler), "-shared", "-fPIC", *options, "-x", "c", "-", "-o", str(path)],
        input=source,
        text=True,
        check=True,
    )
    return {"LD_LIBRARY_PATH": str(path.parent)}


def torch_built_for(folder: Path, cuda: str | None) -> dict[str, str]:
    """The environment of a process that finds a torch for this CUDA version first, which cannot be imported.

    The start only reads its version file.
    """
    package = folder / "torch"
    package.mkdir()
    (package / "__init__.py").write_text('raise ImportError("this torch has only a version")\n')
    (package / "version.py").write_text(f"__version__ = '2.13.0'\ncuda = {cuda!r}\n")
    return {"PYTHONPATH": str(folder)}
