"""The server, but with a score threshold that keeps many masks of a picture. For benchmarks alone.

The server has no setting for the threshold, and random weights keep nothing at 0.5. Here the threshold is
chosen when the model has warmed up: between two neighbouring scores of one picture, so that so many instances
are kept; other pictures keep about as many. A checkpoint with fewer queries (the demo has 24) keeps all of
them. The picture, its prompt and the number come from the environment: BENCHMARK_PICTURE (a file),
BENCHMARK_PROMPT, BENCHMARK_KEPT_MASKS.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from sam3_runner.serving import runner
from sam3_runner.serving.engine import Engine


def _crowded_predictor(*arguments: Any, **options: Any) -> Any:
    from sam3_runner.predictor import SAM3Predictor  # noqa: PLC0415 - torch, which only the runner may import

    class CrowdedPredictor(SAM3Predictor):
        def warm_up(self, *arguments: Any, **options: Any) -> None:
            super().warm_up(*arguments, **options)
            kept = int(os.environ["BENCHMARK_KEPT_MASKS"])
            self.score_threshold = 0.0
            result = self.predict(os.environ["BENCHMARK_PICTURE"], os.environ["BENCHMARK_PROMPT"])
            scores = sorted((instance.score for instance in result.instances), reverse=True)
            if len(scores) > kept:
                self.score_threshold = (scores[kept - 1] + scores[kept]) / 2

    return CrowdedPredictor(*arguments, **options)


runner.Engine = partial(Engine, make_predictor=_crowded_predictor)  # type: ignore[attr-defined, assignment]

from service import SegmentationService  # noqa: E402 - it makes the runner's service from what is above

__all__ = ["SegmentationService"]
