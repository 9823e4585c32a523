"""SAM 3 on one device: weights, the model's forward, batches of requests, masks.

Importing this package loads no torch: API workers use its values, images and prompts alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sam3_runner.errors import (
    DeadlineExceeded,
    DecoderFailed,
    DeviceUnavailable,
    InferenceFailed,
    ModelNotLoaded,
    PromptTooLong,
    RunnerStopped,
    SAM3Error,
    UnsupportedImage,
    WeightsError,
)
from sam3_runner.instances import Instance, MaskCrop, PredictResult

if TYPE_CHECKING:
    from sam3_runner.predictor import SAM3Predictor

__all__ = [
    "DeadlineExceeded",
    "DecoderFailed",
    "DeviceUnavailable",
    "InferenceFailed",
    "Instance",
    "MaskCrop",
    "ModelNotLoaded",
    "PredictResult",
    "PromptTooLong",
    "RunnerStopped",
    "SAM3Error",
    "SAM3Predictor",
    "UnsupportedImage",
    "WeightsError",
]


def __getattr__(name: str) -> object:
    if name == "SAM3Predictor":
        from sam3_runner.predictor import SAM3Predictor  # noqa: PLC0415 - torch only for who asks

        return SAM3Predictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
