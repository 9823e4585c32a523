"""BentoML's count of the host's GPUs: no GPU where NVML fails."""

from __future__ import annotations

import logging

import pynvml
from bentoml._internal.resource import NvidiaGpuResource

logger = logging.getLogger(__name__)


def patch() -> None:
    """Let BentoML count no GPU where NVML fails, as it does where there is none.

    It counts before any check of ours, whatever the device is. After an upgrade of the host's driver NVML no
    longer fits the driver, and the start would end in a traceback.
    """
    count = NvidiaGpuResource.from_system

    def count_or_none() -> list[int]:
        try:
            gpus: list[int] = count()
        except pynvml.NVMLError as error:
            logger.warning("GPUs cannot be counted: %s", error)
            return []
        return gpus

    NvidiaGpuResource.from_system = staticmethod(count_or_none)  # type: ignore[method-assign, assignment]
