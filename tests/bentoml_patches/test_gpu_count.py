"""The patch of BentoML's count of GPUs."""

from __future__ import annotations

from typing import Any

import pynvml
import pytest
from bentoml._internal import resource

from bentoml_patches import gpu_count


@pytest.fixture(autouse=True)
def gpus(monkeypatch: pytest.MonkeyPatch, unpatched: Any) -> Any:
    """BentoML's own resource, where NVML is of another version than the kernel's driver."""

    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    theirs = unpatched(resource).NvidiaGpuResource
    monkeypatch.setattr(gpu_count, "NvidiaGpuResource", theirs)
    return theirs


def test_the_patch_is_needed(gpus: Any) -> None:
    """BentoML's own count raises NVML's error."""
    with pytest.raises(pynvml.NVMLError):
        gpus.from_system()


def test_nvml_error_counts_as_no_gpu(gpus: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The patched count is empty, and the log says why."""
    gpu_count.patch()
    assert gpus.from_system() == []
    assert "GPUs cannot be counted" in caplog.text
