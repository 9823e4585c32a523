"""The server, but with memory for the features of two images of the demo checkpoint."""

from __future__ import annotations

from dataclasses import replace

from sam3_runner.serving import runner
from sam3_runner.serving.engine import Engine, EngineConfig

TWO_IMAGES_BYTES = 7_000_000
"""3.1 MB each."""


def _engine(config: EngineConfig) -> Engine:
    return Engine(replace(config, max_feature_bytes=TWO_IMAGES_BYTES))


runner.Engine = _engine  # type: ignore[attr-defined, assignment]

from service import SegmentationService  # noqa: E402 - it makes the runner's service from what is above

__all__ = ["SegmentationService"]
