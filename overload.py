"""Refuses requests of an overloaded worker before FastAPI reads them, which would take most of the time.

At ten times the capacity nine of ten requests are refused: the accepted ones, /health and the other refusals
wait for the time that a refusal takes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from contract import BatchRequest, DeadlineMs, PredictRequest
from direct_form import PATH as DIRECT_PATH

if TYPE_CHECKING:
    from contract import Failure
    from direct import DirectPath
    from pipeline import Pipeline

BODIES: dict[str, type[PredictRequest | BatchRequest]] = {
    "/api/v1/predict": PredictRequest,
    "/api/v1/predict/batch": BatchRequest,
}
"""The model of the body, by path. Direct requests are not read for this: their bodies hold images."""
DEADLINE: TypeAdapter[int | None] = TypeAdapter(DeadlineMs)


class OverloadCheck:
    """The check of one process, which admits everything until its attributes are set.

    Attributes:
        pipeline: whose requests are refused.
        direct: the same, of direct requests.
    """

    def __init__(self) -> None:
        self.pipeline: Pipeline | None = None
        self.direct: DirectPath | None = None

    def find_refusal(self, path: str, deadline_ms: str | None, body: bytes | None) -> Failure | None:
        """Why a request must not begin now; None where it may.

        None too for what breaks a rule: its route refuses that, and says why.

        Args:
            path: of a POST.
            deadline_ms: its header X-Deadline-Ms.
            body: at most as long as the gate allows; None before it is read.
        """
        try:
            if body is None:
                return self._find_early_refusal(path, deadline_ms)
            return self._find_refusal(path, deadline_ms, body)
        except ValidationError:
            return None

    def _find_early_refusal(self, path: str, deadline_ms: str | None) -> Failure | None:
        if self.direct is None or path != DIRECT_PATH:
            return None
        return self.direct.find_refusal(_checked_ms(deadline_ms))

    def _find_refusal(self, path: str, deadline_ms: str | None, body: bytes) -> Failure | None:
        if self.pipeline is None or path not in BODIES:
            return None
        request = BODIES[path].model_validate_json(body)
        return self.pipeline.find_refusal(request, _checked_ms(deadline_ms))


def _checked_ms(deadline_ms: str | None) -> int | None:
    return None if deadline_ms is None else DEADLINE.validate_python(deadline_ms)
