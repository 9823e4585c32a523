"""Recognises errors of the device: its memory is full, or it no longer works. Imports torch only in calls."""

from __future__ import annotations

import gc
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sam3_runner.errors import DeviceFull

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

_OUT_OF_MEMORY = re.compile(
    r"CUDA\b.{0,20}\bout of memory|_ALLOC_FAILED|DefaultCPUAllocator: can't allocate memory"
)
"""torch's messages where a context, a tensor or cuBLAS's workspace does not fit (2.11, on an H200), and of a
CPU (2.13). Only that of a tensor on a GPU has an exception class of its own. After each of them the process
worked on once memory was free."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch raised `error` because the device's memory has no room."""
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


@contextmanager
def out_of_memory_as(message: str) -> Iterator[None]:
    """Turn torch's out-of-memory errors into `DeviceFull(message)`; other errors pass unchanged."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise DeviceFull(message) from error


def device_works(device: torch.device) -> bool:
    """Whether the device still computes in this process.

    After some errors of CUDA (an illegal address, a device-side assert, an uncorrectable ECC error, a lost
    GPU) every later call of this process fails, and "the process must be terminated and relaunched" (CUDA
    Runtime API, cudaError_t). A computation is tried, since no list of these errors is complete.
    """
    if device.type != "cuda":
        return True
    import torch  # noqa: PLC0415 - loaded already

    try:
        torch.cuda.synchronize(device)
        torch.ones(1, device=device).add_(1).item()
    except RuntimeError as error:
        # Whether memory is free says nothing about the device.
        return is_out_of_memory(error)
    return True


def release_memory() -> None:
    """Free what a failed pass, or a failed attempt to load, has left allocated on the GPU.

    Call it outside of the `except` block: until then the error's traceback holds the tensors.
    """
    import torch  # noqa: PLC0415 - loaded already

    gc.collect()
    torch.cuda.empty_cache()
