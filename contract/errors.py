"""Errors as a caller sees them: the tables of codes and statuses, and the body."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field

import results
import sam3_runner
import storage
from contract.options import FieldError
from contract.prompts import reason_against
from contract.requests import OBJECT_TAG, STRING_TAG

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

RETRY_AFTER_S = 2
"""For callers of a server that is loading, or whose connections are all in use."""
INTERNAL_MESSAGE = "something went wrong on our side"
MAX_SHOWN_NAME = 60
"""Characters of an unknown field's name that the error message repeats."""


class OverloadedError(Exception):
    """This worker has too much to do for one more request; nothing was changed.

    Args:
        message: for the caller.
        retry_after_s: when it may be sent again.
    """

    def __init__(self, message: str, retry_after_s: float = RETRY_AFTER_S) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class BoxRefusedError(Exception):
    """A box has no px of the image; the message begins with the name of its field."""


class TaskMismatchError(Exception):
    """The task is done, but for other prompts or options, or its row has been changed since."""


class TaskGivenUpError(Exception):
    """The server's processes died too often while they worked on this task; it is not tried again."""


STATUSES: dict[str, HTTPStatus] = {
    "INVALID_REQUEST": HTTPStatus.BAD_REQUEST,
    "AUTH_REQUIRED": HTTPStatus.UNAUTHORIZED,
    "AUTH_INVALID": HTTPStatus.UNAUTHORIZED,
    "FORBIDDEN": HTTPStatus.FORBIDDEN,
    "IMAGE_NOT_FOUND": HTTPStatus.NOT_FOUND,
    "TASK_NOT_FOUND": HTTPStatus.NOT_FOUND,
    "NOT_FOUND": HTTPStatus.NOT_FOUND,
    "METHOD_NOT_ALLOWED": HTTPStatus.METHOD_NOT_ALLOWED,
    "REQUEST_TIMEOUT": HTTPStatus.REQUEST_TIMEOUT,
    "TASK_IN_PROGRESS": HTTPStatus.CONFLICT,
    "FILE_TOO_LARGE": HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    "URL_TOO_LONG": HTTPStatus.REQUEST_URI_TOO_LONG,
    "UNSUPPORTED_IMAGE": HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    "UNSUPPORTED_MEDIA_TYPE": HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    "OVERLOADED": HTTPStatus.TOO_MANY_REQUESTS,
    "HEADERS_TOO_LARGE": HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    "INFERENCE_FAILED": HTTPStatus.INTERNAL_SERVER_ERROR,
    "INTERNAL_ERROR": HTTPStatus.INTERNAL_SERVER_ERROR,
    "STORAGE_UNAVAILABLE": HTTPStatus.BAD_GATEWAY,
    "RESULTS_UNAVAILABLE": HTTPStatus.BAD_GATEWAY,
    "MODEL_NOT_LOADED": HTTPStatus.SERVICE_UNAVAILABLE,
    "DEADLINE_EXCEEDED": HTTPStatus.GATEWAY_TIMEOUT,
}
"""The status of each code."""


class ErrorDetail(BaseModel):
    """What went wrong."""

    code: str = Field(description="later versions may add some", json_schema_extra={"enum": [*STATUSES]})
    message: str


class ErrorResponse(BaseModel):
    """The body of every error."""

    error: ErrorDetail
    request_id: str


CODES: dict[type[Exception], str] = {
    BoxRefusedError: "INVALID_REQUEST",
    OverloadedError: "OVERLOADED",
    TaskMismatchError: "INVALID_REQUEST",
    TaskGivenUpError: "INFERENCE_FAILED",
    TimeoutError: "DEADLINE_EXCEEDED",
    sam3_runner.DeadlineExceeded: "DEADLINE_EXCEEDED",
    sam3_runner.InferenceFailed: "INFERENCE_FAILED",
    sam3_runner.ModelNotLoaded: "MODEL_NOT_LOADED",
    sam3_runner.RunnerStopped: "MODEL_NOT_LOADED",
    sam3_runner.BoxOutsideImage: "INVALID_REQUEST",
    sam3_runner.MasksTooLarge: "INVALID_REQUEST",
    sam3_runner.PromptTooLong: "INVALID_REQUEST",
    sam3_runner.UnsupportedImage: "UNSUPPORTED_IMAGE",
    storage.ImageUrlInvalid: "INVALID_REQUEST",
    storage.ImageUrlForbidden: "FORBIDDEN",
    storage.ObjectNotFound: "IMAGE_NOT_FOUND",
    storage.ObjectTooLarge: "FILE_TOO_LARGE",
    storage.StorageUnavailable: "STORAGE_UNAVAILABLE",
    results.TaskNotFound: "TASK_NOT_FOUND",
    results.TaskInProgress: "TASK_IN_PROGRESS",
    results.AttemptLost: "TASK_IN_PROGRESS",
    results.MetadataInvalid: "INTERNAL_ERROR",
    results.ResultsUnavailable: "RESULTS_UNAVAILABLE",
}
"""The code of every error that a request can meet. An exception that is not here is INTERNAL_ERROR."""

RETRIED_CODES = {"TASK_IN_PROGRESS", "OVERLOADED", "MODEL_NOT_LOADED"}
"""The codes whose answers have `Retry-After`."""
RETRY_AFTER_HEADER = {"description": "seconds after which to try again", "schema": {"type": "integer"}}

FRAMEWORK_ERRORS: dict[int, tuple[str, str]] = {
    404: ("NOT_FOUND", "there is nothing at this path"),
    405: ("METHOD_NOT_ALLOWED", "this method is not allowed here; the header Allow names those that are"),
    500: ("INTERNAL_ERROR", INTERNAL_MESSAGE),
    503: ("MODEL_NOT_LOADED", "not ready; GET /health says why"),
}
"""Code and message for what Starlette and BentoML answer: a path, a method, an exception, /readyz."""


class Failure(Exception):
    """An error as a caller sees it.

    Args:
        code: of `STATUSES`, or any other with a status.
        message: for the caller; holds no secret.
        status: where the code is not in `STATUSES`.
        retry_after_s: when the caller may try again.
        headers: more headers of the answer.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        status: HTTPStatus | None = None,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.status = status or STATUSES[code]
        self.message = message
        self.retry_after_s = retry_after_s
        self._headers = dict(headers or {})

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """The failure that a caller sees for `error`, by `CODES`."""
        if isinstance(error, Failure):
            return error
        for kind in type(error).__mro__:
            if kind in CODES:
                code = CODES[kind]
                message = str(error) or "the request took too long"
                return cls(code, message, retry_after_s=_retry_after_s(error, code))
        return cls("INTERNAL_ERROR", INTERNAL_MESSAGE)

    def with_message(self, message: str) -> Failure:
        """The same failure with another message."""
        return Failure(
            self.code,
            message,
            status=self.status,
            retry_after_s=self.retry_after_s,
            headers=self._headers,
        )

    def body(self, request_id: str) -> ErrorResponse:
        """The answer's body."""
        return ErrorResponse(error=ErrorDetail(code=self.code, message=self.message), request_id=request_id)

    @property
    def headers(self) -> dict[str, str]:
        """`Retry-After`, where it helps, and those of this failure."""
        if self.retry_after_s is None:
            return self._headers
        return self._headers | {"Retry-After": str(max(1, round(self.retry_after_s)))}


def framework_failure(status: int, allow: str | None) -> Failure:
    """The failure for an answer of Starlette or BentoML, by its status and its header `Allow`."""
    known = HTTPStatus(status)
    code, message = FRAMEWORK_ERRORS.get(known, (known.name, known.phrase))
    return Failure(
        code,
        message,
        status=known,
        retry_after_s=RETRY_AFTER_S if status == HTTPStatus.SERVICE_UNAVAILABLE else None,
        headers={"Allow": allow} if allow else None,
    )


def _retry_after_s(error: Exception, code: str) -> float | None:
    if isinstance(error, results.TaskInProgress | OverloadedError):
        return error.retry_after_s
    return RETRY_AFTER_S if code in RETRIED_CODES else None


def error_responses(*codes: str) -> dict[int | str, dict[str, object]]:
    """The errors in a route's documentation: an entry a status, which names its codes."""
    by_status: dict[HTTPStatus, list[str]] = {}
    for code in codes:
        by_status.setdefault(STATUSES[code], []).append(code)
    documented: dict[int | str, dict[str, object]] = {}
    for status, named in sorted(by_status.items()):
        documented[int(status)] = {"model": ErrorResponse, "description": ", ".join(named)}
        if RETRIED_CODES & set(named):
            documented[int(status)]["headers"] = {"Retry-After": RETRY_AFTER_HEADER}
    return documented


def invalid_request(errors: Iterator[dict[str, Any]]) -> Failure:
    """The failure of a request that does not fit its model: names the first field, never its value."""
    first = next(errors)
    tags = {STRING_TAG, OBJECT_TAG}
    location = [str(part)[:MAX_SHOWN_NAME] for part in first["loc"] if part not in tags][1:]
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        # The number right after "body" is the position of the error, not a field.
        reason = f"is not JSON: {first['ctx']['error']} (character {location.pop()})"
    elif first["type"] == "string_unicode":
        # Python reads half of a surrogate pair, but it cannot be encoded again.
        reason = reason_against(first["input"]) or reason
        reason = reason if location else f"the name of a field {reason}"
    elif isinstance(error := first.get("ctx", {}).get("error"), FieldError):
        location.append(error.field)
    elif not location:
        reason = "must be a JSON object, sent with Content-Type: application/json"
    return invalid_body(f"{'.'.join(location) or 'the body'}: {reason}")


def invalid_body(message: str) -> Failure:
    """The failure of a request whose body breaks a rule."""
    return Failure("INVALID_REQUEST", message)


def unreadable_body(error: BaseException | None) -> Failure:
    """The failure of a body for which `json.loads` raised another error than that it is no JSON."""
    match error:
        case UnicodeDecodeError():
            reason = f"is not {error.encoding.upper()} (byte {error.start})"
        case RecursionError():
            reason = "is nested too deeply"
        case ValueError():
            reason = "holds a number of too many digits"
        case _:
            reason = "cannot be read"
    return invalid_body(f"the body: {reason}")
