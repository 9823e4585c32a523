"""The server, but for a device that fails in a pass with `BREAKING_PROMPT`, once."""

from __future__ import annotations

from functools import partial
from typing import Any

from sam3_runner.serving import runner
from sam3_runner.serving.engine import Engine


def _breaking_predictor(*arguments: Any, **options: Any) -> Any:
    from tests.breaking import BreakingPredictor  # noqa: PLC0415 - torch, which only the runner may import

    return BreakingPredictor(*arguments, **options)


runner.Engine = partial(Engine, make_predictor=_breaking_predictor)  # type: ignore[attr-defined, assignment]

from service import SegmentationService  # noqa: E402 - it makes the runner's service from what is above

__all__ = ["SegmentationService"]
