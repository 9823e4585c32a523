"""The server, but for GPUs that are lost: those that a file names, at each load of the model."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from sam3_runner.errors import DeviceUnavailable
from sam3_runner.serving import runner
from sam3_runner.serving.engine import Engine
from tests.server_processes import LOST_GPUS_FILE


def _predictor(*arguments: Any, **options: Any) -> Any:
    from sam3_runner.predictor import SAM3Predictor  # noqa: PLC0415 - torch, which only the runner may import

    file = Path(os.environ[LOST_GPUS_FILE])
    if file.exists() and os.environ["CUDA_VISIBLE_DEVICES"] in file.read_text().split():
        raise DeviceUnavailable("the GPU is lost")
    return SAM3Predictor(*arguments, **options)


runner.Engine = partial(Engine, make_predictor=_predictor)  # type: ignore[attr-defined, assignment]

from service import SegmentationService  # noqa: E402 - it makes the runners' services from what is above

__all__ = ["SegmentationService"]
