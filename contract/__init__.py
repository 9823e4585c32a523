"""The HTTP contract: requests, answers, and the tables of errors, codes and statuses."""

from contract.answers import (
    BatchResponse,
    Health,
    InstanceModel,
    Limits,
    ModelInfo,
    PredictResponse,
    RunnerState,
)
from contract.errors import (
    CODES,
    STATUSES,
    ErrorResponse,
    Failure,
    OverloadedError,
    TaskGivenUpError,
    TaskMismatchError,
    error_responses,
    framework_failure,
    invalid_request,
    unreadable_body,
)
from contract.prompts import PROMPT_PATTERN, Prompt
from contract.requests import BatchRequest, DeadlineMs, PredictRequest

__all__ = [
    "CODES",
    "PROMPT_PATTERN",
    "STATUSES",
    "BatchRequest",
    "BatchResponse",
    "DeadlineMs",
    "ErrorResponse",
    "Failure",
    "Health",
    "InstanceModel",
    "Limits",
    "ModelInfo",
    "OverloadedError",
    "PredictRequest",
    "PredictResponse",
    "Prompt",
    "RunnerState",
    "TaskGivenUpError",
    "TaskMismatchError",
    "error_responses",
    "framework_failure",
    "invalid_request",
    "unreadable_body",
]
