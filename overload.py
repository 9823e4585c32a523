"""Refuses requests of an overloaded worker before FastAPI reads them, which would take most of the time.

At ten times the capacity nine of ten requests are refused: the accepted ones, /health and the other refusals
wait for the time that a refusal takes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from contract import BatchRequest, DeadlineMs, PredictRequest

if TYPE_CHECKING:
    from contract import Failure
    from pipeline import Pipeline

BODIES: dict[str, type[PredictRequest | BatchRequest]] = {
    "/api/v1/predict": PredictRequest,
    "/api/v1/predict/batch": BatchRequest,
}
"""The model of the body, by path."""
DEADLINE: TypeAdapter[int | None] = TypeAdapter(DeadlineMs)


class OverloadCheck:
    """The check of one process, which admits everything until it has a pipeline.

    Attributes:
        pipeline: whose requests are refused.
    """

    def __init__(self) -> None:
        self.pipeline: Pipeline | None = None

    def find_refusal(self, path: str, deadline_ms: str | None, body: bytes) -> Failure | None:
        """Why a request must not begin now; None where it may.

        None too for what breaks a rule: its route refuses that, and says why.

        Args:
            path: of a POST.
            deadline_ms: its header X-Deadline-Ms.
            body: at most as long as the gate allows.
        """
        if self.pipeline is None or path not in BODIES:
            return None
        try:
            request = BODIES[path].model_validate_json(body)
            checked_ms = None if deadline_ms is None else DEADLINE.validate_python(deadline_ms)
        except ValidationError:
            return None
        return self.pipeline.find_refusal(request, checked_ms)
