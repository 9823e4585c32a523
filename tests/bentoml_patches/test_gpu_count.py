"""The patch of BentoML's count of GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pynvml
import pytest
from bentoml._internal.resource import NvidiaGpuResource

from bentoml_patches import gpu_count

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _driver_mismatch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """NVML of another version than the kernel's driver, and an unpatched BentoML."""

    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    monkeypatch.setattr(NvidiaGpuResource, "from_system", NvidiaGpuResource.from_system)
    NvidiaGpuResource.from_system.cache_clear()
    yield
    monkeypatch.undo()
    NvidiaGpuResource.from_system.cache_clear()


def test_the_patch_is_needed() -> None:
    """BentoML's own count raises NVML's error."""
    with pytest.raises(pynvml.NVMLError):
        NvidiaGpuResource.from_system()


def test_nvml_error_counts_as_no_gpu(caplog: pytest.LogCaptureFixture) -> None:
    """The patched count is empty, and the log says why."""
    gpu_count.patch()
    assert NvidiaGpuResource.from_system() == []
    assert "GPUs cannot be counted" in caplog.text
