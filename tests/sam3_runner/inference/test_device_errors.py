"""How a full GPU memory is distinguished from other errors of torch."""

from __future__ import annotations

import pytest
import torch

from sam3_runner.errors import DeviceFull
from sam3_runner.inference.device_errors import out_of_memory_as

FULL = "the memory of cuda is too full for the model: free it"


@pytest.mark.parametrize(
    "error",
    [
        # As torch 2.11 raised them on an H200 whose memory another process had filled.
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of"
        ),
    ],
)
def test_full_memory_is_recognised(error: RuntimeError) -> None:
    """Every out-of-memory error of torch becomes `DeviceFull`."""
    with pytest.raises(DeviceFull, match=FULL), out_of_memory_as(FULL):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: no kernel image is available for execution on the device"),
        ValueError("out of memory"),
    ],
)
def test_other_errors_are_unchanged(error: Exception) -> None:
    """Other errors of CUDA, and of other types, are not converted."""
    with pytest.raises(type(error), match=str(error)), out_of_memory_as(FULL):
        raise error
