"""The HTTP contract: requests, answers, and the tables of errors, codes and statuses."""

from __future__ import annotations

import unicodedata
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any, Literal
from uuid import UUID

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema, WithJsonSchema

import results
import sam3_runner
import storage
from sam3_runner.instances import SCORE_THRESHOLD
from sam3_runner.invisible import is_invisible, trimmed
from sam3_runner.prompts import CONTEXT_TOKENS, MAX_PROMPT_CHARACTERS, MAX_PROMPTS

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


class TaskMismatchError(Exception):
    """The task is done, but for other prompts, or its row no longer holds what this server wrote."""


class TaskGivenUpError(Exception):
    """The server's processes died too often while they worked on this task; it is not tried again."""


PROMPT_RULE = (
    "A noun phrase. Spaces and invisible marks (joiners, zero-width spaces, byte order marks) at its ends "
    "are stripped; the rest is used, stored and answered as it was sent. One rule cannot stand in a schema: "
    f"it has at most {CONTEXT_TOKENS} tokens, start and end token included, or is refused with 400 and both "
    "numbers. An English word is one or two tokens, a character of other scripts or an emoji up to four."
)
PROMPT_PATTERN = (
    r"^[^\u0000-\u001F\u007F-\u009F\u2028\u2029]*"
    r"[^\u0000-\u0020\u007F-\u00A0\u00AD\u061C\u1680\u180E\u2000-\u200F"
    r"\u2028-\u202F\u205F-\u206F\u3000\uFEFF]"
    r"[^\u0000-\u001F\u007F-\u009F\u2028\u2029]*$"
)
"""For the description alone: no control characters, and something that is not stripped."""
REFUSED_IN_PROMPTS = {
    "Cc": "a control character",
    "Cs": "half of a surrogate pair",
    "Zl": "a line separator",
    "Zp": "a paragraph separator",
}
"""By Unicode's category. All else is text, unassigned characters too: emoji are newer than our tables."""


def _reason_against(text: str) -> str | None:
    """What a prompt holds and must not hold: "holds a control character (U+000A)"."""
    for character in text:
        refused = REFUSED_IN_PROMPTS.get(unicodedata.category(character))
        if refused:
            return f"holds {refused} (U+{ord(character):04X})"
    return None


def _cleaned(text: str) -> str:
    """The prompt as it is used, stored and answered: as it was sent, without spaces and marks at its ends."""
    reason = _reason_against(text)
    if reason:
        raise ValueError(reason)
    if is_invisible(text):
        raise ValueError("must hold more than spaces and invisible characters")
    return trimmed(text)


Prompt = Annotated[
    str,
    Field(
        min_length=1,
        max_length=MAX_PROMPT_CHARACTERS,
        description=PROMPT_RULE,
        examples=["red circle"],
        json_schema_extra={"pattern": PROMPT_PATTERN},
    ),
    AfterValidator(_cleaned),
]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")

    image_url: Annotated[
        str,
        Field(
            min_length=1,
            max_length=2048,
            description="where the Edge stored the image: a URL of our bucket, or its bare key. "
            "What cannot be read as either is a 400",
            examples=["uploads/user-1/0b0f5c7e"],
        ),
    ]
    user_id: Annotated[
        str,
        Field(
            pattern=r"^[A-Za-z0-9_-]{1,64}$",
            description="owner of the image and of the task",
            examples=["user-1"],
        ),
    ]
    task_id: Annotated[UUID, Field(description="id of the row in segmentation_results")]

    @property
    def texts_by_field(self) -> dict[str, str]:
        """The prompts, by the names of their fields."""
        raise NotImplementedError

    @property
    def texts(self) -> list[str]:
        """The prompts."""
        return list(self.texts_by_field.values())


MAX_DEADLINE_MS = 600_000
"""Of the longest REQUEST_TIMEOUT_S."""


def _digits(value: object) -> object:
    """Python's int() would read "+5", "5_000" and " 5" too."""
    if isinstance(value, str) and not (value.isascii() and value.isdecimal() and len(value) < 10):
        raise ValueError(f"must be a whole number from 1 to {MAX_DEADLINE_MS}")
    return value


DeadlineMs = Annotated[
    int | SkipJsonSchema[None],
    BeforeValidator(_digits),
    # Of a union, pydantic would describe the bounds by names that JSON Schema does not know.
    WithJsonSchema({"type": "integer", "minimum": 1, "maximum": MAX_DEADLINE_MS}),
    Field(
        ge=1,
        le=MAX_DEADLINE_MS,
        description="how long the caller waits, in ms. A request that cannot be done in this time is refused "
        "with 429 before it begins; one whose turn does not come in this time ends. Default: "
        "DEFAULT_DEADLINE_S (25 s). More than REQUEST_TIMEOUT_S (60 s) counts as that",
        examples=[20_000],
    ),
]


class PredictRequest(_Request):
    """One image, one prompt."""

    text_prompt: Prompt

    @property
    def texts_by_field(self) -> dict[str, str]:
        """The prompt, by the name of its field."""
        return {"text_prompt": self.text_prompt}


class BatchRequest(_Request):
    """One image, several prompts: the image is fetched and encoded once."""

    prompts: Annotated[list[Prompt], Field(min_length=1, max_length=MAX_PROMPTS)]

    @property
    def texts_by_field(self) -> dict[str, str]:
        """The prompts, by the names of their fields."""
        return {f"prompts.{index}": text for index, text in enumerate(self.prompts)}


class InstanceModel(BaseModel):
    """One object that was found."""

    label: str = Field(description="the prompt that found it")
    score: float = Field(description=f"{SCORE_THRESHOLD} to 1")
    box: tuple[float, float, float, float] = Field(
        description="x0, y0, x1, y1 in px of the image", examples=[[102.4, 88.1, 230.9, 216.0]]
    )
    area: int = Field(description="px of its mask")


class PredictResponse(BaseModel):
    """Every instance of one prompt."""

    task_id: str
    mask_url: str = Field(description="PNG of the image's size, 0 or 255: the union of the instances")
    labels: list[str] = Field(description="the prompt if it was found, else nothing")
    inference_time_ms: float = Field(
        description="time of the model's pass that held this image; in a batch, the prompt's equal share"
    )
    confidence: float = Field(description="the best score, 0.0 when nothing was found")
    instances: list[InstanceModel] = Field(description="best score first")
    image_width: int = Field(description="px, as a viewer shows the image (EXIF orientation applied)")
    image_height: int


class BatchResponse(BaseModel):
    """The results of several prompts, in their order."""

    task_id: str
    results: list[PredictResponse]
    total_inference_time_ms: float


class RunnerState(BaseModel):
    """The state of one of the model's processes and of its GPU."""

    state: Literal["ok", "loading", "error"]
    detail: str | None = Field(None, description="what is going on, or wrong, unless the state is ok")
    gpu_name: str | None = None
    vram_used_mb: int | None = None
    vram_total_mb: int | None = None


class Health(BaseModel):
    """The state of the model and of its GPUs; without `runners`, of the first process that is ready."""

    model_config = ConfigDict(protected_namespaces=())

    status: Literal["ok", "loading", "error"]
    model_loaded: bool
    detail: str | None = Field(None, description="what is going on, or wrong, unless the status is ok")
    gpu_available: bool
    gpu_name: str | None = None
    vram_used_mb: int | None = None
    vram_total_mb: int | None = None
    runners: list[RunnerState] = Field(description="one for each process of the model, on a GPU of its own")


class Limits(BaseModel):
    """What requests may hold."""

    max_image_bytes: int
    max_image_pixels: int
    max_prompts: int = MAX_PROMPTS
    max_prompt_characters: int = MAX_PROMPT_CHARACTERS
    max_prompt_tokens: int = CONTEXT_TOKENS
    image_formats: list[str] = ["image/png", "image/jpeg", "image/webp"]


class ModelInfo(BaseModel):
    """What is loaded."""

    model_config = ConfigDict(protected_namespaces=())

    model_name: Literal["SAM3"] = "SAM3"
    model_version: str = Field(description="of this server")
    checkpoint: str = Field(description="`demo`, or the name of the weights")
    checkpoint_layout: Literal["official", "transformers"] = Field(
        description="of its file: official (`sam3.pt`) or transformers (`model.safetensors`)"
    )
    weights_sha256: str = Field(description="of the file that was loaded")
    demo: bool = Field(description="the embedded demo checkpoint: it knows coloured shapes only")
    parameters: int = Field(description="counted")
    weights_size_gb: float
    device: str
    dtype: str = Field(description="of the large matrix products; scores and boxes are float32")
    input_size: int = Field(description="side of the square that the model sees, px")
    score_threshold: float
    limits: Limits
    runners: list[RunnerState] = Field(description="one for each process of the model, on a GPU of its own")


class ErrorDetail(BaseModel):
    """What went wrong."""

    code: str
    message: str


class ErrorResponse(BaseModel):
    """The body of every error."""

    error: ErrorDetail
    request_id: str


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

CODES: dict[type[Exception], str] = {
    OverloadedError: "OVERLOADED",
    TaskMismatchError: "INVALID_REQUEST",
    TaskGivenUpError: "INFERENCE_FAILED",
    TimeoutError: "DEADLINE_EXCEEDED",
    sam3_runner.DeadlineExceeded: "DEADLINE_EXCEEDED",
    sam3_runner.InferenceFailed: "INFERENCE_FAILED",
    sam3_runner.ModelNotLoaded: "MODEL_NOT_LOADED",
    sam3_runner.RunnerStopped: "MODEL_NOT_LOADED",
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
    location = [str(part)[:MAX_SHOWN_NAME] for part in first["loc"]][1:]
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        # The number right after "body" is the position of the error, not a field.
        reason = f"is not JSON: {first['ctx']['error']} (character {location.pop()})"
    elif first["type"] == "string_unicode":
        # Python reads half of a surrogate pair, but it cannot be encoded again.
        reason = _reason_against(first["input"]) or reason
        reason = reason if location else f"the name of a field {reason}"
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
