"""SAM 3 on one device: weights, the forward pass, batches of requests, masks.

Importing this package does not import torch: API workers use only its values, images and prompts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sam3_runner.errors import (
    BoxOutsideImage,
    DeadlineExceeded,
    DecoderFailed,
    DeviceUnavailable,
    FeaturesNotHeld,
    InferenceFailed,
    MasksTooLarge,
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
    "BoxOutsideImage",
    "DeadlineExceeded",
    "DecoderFailed",
    "DeviceUnavailable",
    "FeaturesNotHeld",
    "InferenceFailed",
    "Instance",
    "MaskCrop",
    "MasksTooLarge",
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
        from sam3_runner.predictor import SAM3Predictor  # noqa: PLC0415 - imports torch

        return SAM3Predictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
