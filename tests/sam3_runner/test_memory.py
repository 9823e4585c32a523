"""How a full GPU is told from everything else that torch complains of."""

from __future__ import annotations

import pytest
import torch

from sam3_runner.errors import DeviceFull
from sam3_runner.memory import telling_full_memory

FULL = "the memory of cuda is too full for the model: free it"


@pytest.mark.parametrize(
    "error",
    [
        # As torch 2.11 raised them on an H200 that another process had filled.
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of"
        ),
    ],
)
def test_full_memory_is_told(error: RuntimeError) -> None:
    """Whatever finds no memory is one error of ours, which may pass."""
    with pytest.raises(DeviceFull, match=FULL), telling_full_memory(FULL):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: no kernel image is available for execution on the device"),
        ValueError("out of memory"),
    ],
)
def test_other_errors_go_on(error: Exception) -> None:
    """What will not pass is not taken for it."""
    with pytest.raises(type(error), match=str(error)), telling_full_memory(FULL):
        raise error
