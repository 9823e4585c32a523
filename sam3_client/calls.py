"""What is sent, and what its answer means; `Client` and `AsyncClient` share it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import httpx

from sam3_client.coco_rle import run_lengths
from sam3_client.errors import (
    DirectApiOff,
    InvalidRequest,
    ModelLoading,
    Overloaded,
    Sam3Error,
    ServerError,
    ServerUnreachable,
    Unauthorized,
    UnsupportedImage,
)
from sam3_client.result import Instance, Result

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import numpy as np
    import numpy.typing as npt

    from sam3_client.pictures import Picture

    Box = Sequence[float] | npt.NDArray[np.floating[Any]] | npt.NDArray[np.integer[Any]]

SEGMENT_PATH = "/v1/images/segmentations"
HEALTH_PATH = "/health"
INFO_PATH = "/api/v1/model/info"
VISUAL = "visual"
"""The label of what boxes alone have found, as in the server's other answers."""
MAX_CONNECT_S = 10.0


@dataclass(frozen=True, slots=True)
class Call:
    """One request to the server.

    Attributes:
        fields: of the form, beside the image.
        image: the file; None: a GET without a form.
    """

    path: str
    fields: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    image: bytes | None = None

    def request(self, http: httpx.Client | httpx.AsyncClient) -> httpx.Request:
        """The request of httpx; it can be sent once."""
        if self.image is None:
            return http.build_request("GET", self.path, headers=self.headers)
        files = {"image": ("image", self.image, "application/octet-stream")}
        return http.build_request("POST", self.path, data=self.fields, files=files, headers=self.headers)


@dataclass(frozen=True, slots=True)
class Options:
    """What `segment` takes besides image and prompts; None leaves a field to the server's default."""

    boxes: Sequence[Box] | npt.NDArray[Any] | None = None
    box_labels: Sequence[int] | None = None
    score_threshold: float | None = None
    fill_holes: int | None = None
    remove_islands: int | None = None
    min_area: int | None = None
    nms_iou: float | None = None
    max_instances: int | None = None
    tiles: int | Literal["auto"] | None = None
    deadline_ms: int | None = None

    def given(self) -> dict[str, Any]:
        """Those that are set, by their names."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def fields(self) -> dict[str, str]:
        """Those that are set, as texts of a form. Raises `InvalidRequest` for what is no list of numbers."""
        lists: dict[str, list[Any] | None] = {
            "boxes": None if self.boxes is None else [_numbers("boxes", box) for box in self.boxes],
            "box_labels": None if self.box_labels is None else _numbers("box_labels", self.box_labels),
        }
        plain = {
            "score_threshold": self.score_threshold,
            "fill_holes": self.fill_holes,
            "remove_islands": self.remove_islands,
            "min_area": self.min_area,
            "nms_iou": self.nms_iou,
            "max_instances": self.max_instances,
            "tiles": self.tiles,
        }
        return {name: json.dumps(value) for name, value in lists.items() if value is not None} | {
            name: str(value) for name, value in plain.items() if value is not None
        }


def _numbers(field: str, values: Any) -> list[float]:
    try:
        return [float(each) for each in values]
    except (TypeError, ValueError):
        rule = {
            "boxes": "boxes: must be a list of boxes, each [x0, y0, x1, y1] in px",
            "box_labels": "box_labels: must be a list of 1 and 0, one a box",
        }
        raise _invalid(rule[field]) from None


def _invalid(message: str) -> InvalidRequest:
    return InvalidRequest(message, code="INVALID_REQUEST")


def segment_calls(picture: Picture, prompts: str | Iterable[str], options: Options) -> dict[str, Call]:
    """A call for each distinct prompt, by the label of what it finds.

    Raises:
        InvalidRequest: a prompt is empty or no text, or there is neither a prompt nor a box.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if any(not text.strip() for text in texts):
        raise _invalid("a prompt is empty; name what to find, as in 'red circle'")
    if any("\ud800" <= letter <= "\udfff" for text in texts for letter in text):
        raise _invalid(
            "a prompt holds half of a surrogate pair, which is no character; read its text as UTF-8"
        )
    if not texts and options.boxes is None:
        raise _invalid("there is nothing to find: give a prompt, or boxes")
    fields = {"mask_format": "rle", **options.fields()}
    headers = {} if options.deadline_ms is None else {"X-Deadline-Ms": str(options.deadline_ms)}
    by_label = {text: {"prompt": text} for text in texts} or {VISUAL: {}}
    return {label: Call(SEGMENT_PATH, fields | own, headers, picture.file) for label, own in by_label.items()}


def read_result(picture: Picture, answers: Mapping[str, Mapping[str, Any]]) -> Result:
    """The result of all answers, by their labels. Raises `ServerError` for an answer of another shape."""
    try:
        first = next(iter(answers.values()))
        timings_ms: dict[str, float] = {}
        for answer in answers.values():
            for stage, time_ms in answer["timings_ms"].items():
                timings_ms[stage] = round(timings_ms.get(stage, 0.0) + float(time_ms), 1)
        return Result(
            picture,
            width=int(first["image_width"]),
            height=int(first["image_height"]),
            prompts=list(answers),
            presence={label: float(answer["presence"]) for label, answer in answers.items()},
            instances=[
                _instance(label, each) for label, answer in answers.items() for each in answer["data"]
            ],
            model=first.get("model"),
            timings_ms=timings_ms,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _no_sam3_server() from error


def _instance(label: str, found: Mapping[str, Any]) -> Instance:
    x0, y0, x1, y1 = (float(side) for side in found["box"])
    run_lengths(found["mask"])  # raises ValueError for a mask that cannot be read
    return Instance(label, float(found["score"]), (x0, y0, x1, y1), found["mask"])


def read_answer(response: httpx.Response) -> dict[str, Any]:
    """The body of a good answer. Raises the `Sam3Error` that an error's answer stands for."""
    try:
        body = response.json()
    except ValueError:
        body = None
    if response.is_success:
        if isinstance(body, dict):
            return body
        raise _no_sam3_server()
    raise _error_of(response, body)


def _no_sam3_server() -> ServerError:
    return ServerError(
        "the answer is not that of a SAM3 server; check the URL, and that client and server fit together",
        code="BAD_ANSWER",
    )


_KINDS: dict[int, type[Sam3Error]] = {
    400: InvalidRequest,
    401: Unauthorized,
    413: UnsupportedImage,
    415: UnsupportedImage,
    429: Overloaded,
    503: ModelLoading,
    504: Overloaded,
}
"""By status; every other is a `ServerError`."""
_ADVICE: dict[str, str] = {
    "AUTH_REQUIRED": "pass key=..., or set SAM3_API_KEY to a key of the server's API_SECRET_KEY",
    "AUTH_INVALID": "pass key=..., or set SAM3_API_KEY to a key of the server's API_SECRET_KEY",
    "FILE_TOO_LARGE": "pass a smaller picture, or one saved as JPEG or WEBP",
    "OVERLOADED": "try again later, or with fewer calls at once",
    "MODEL_NOT_LOADED": "try again when health() says ok",
    "DEADLINE_EXCEEDED": "try again with a larger deadline_ms, or with fewer calls at once",
}
"""What the caller can do, by the server's code."""


def _error_of(response: httpx.Response, body: Any) -> Sam3Error:
    status, path = response.status_code, response.request.url.path
    detail = body.get("error") if isinstance(body, dict) else None
    told = detail if isinstance(detail, dict) else {}
    code, message = str(told.get("code", f"HTTP_{status}")), str(told.get("message", response.reason_phrase))
    request_id = str(body.get("request_id", "")) if isinstance(body, dict) else ""
    kind = _KINDS.get(status, ServerError)
    if status == httpx.codes.NOT_FOUND and path.endswith(SEGMENT_PATH):
        kind = DirectApiOff
        message = f"the server at {shown(response.request.url)} takes no images directly"
        advice = "start it with DIRECT_API=true, or check the URL"
    else:
        message = message if told else f"the server answered {status} {message}".rstrip()
        advice = _ADVICE.get(code, "" if told else "check the URL, and what stands before the server")
    return kind(
        f"{message}; {advice}" if advice else message,
        code=code,
        request_id=request_id,
        retry_after_s=_retry_after_s(response.headers.get("Retry-After")),
    )


def _retry_after_s(header: str | None) -> float | None:
    try:
        return max(0.0, float(header or ""))
    except ValueError:  # none, or a date, which this server does not send
        return None


def unreachable(error: httpx.RequestError, timeout_s: float) -> ServerUnreachable:
    """The error for a call that got no answer."""
    url = shown(error.request.url)
    if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
        return ServerUnreachable(
            f"{url} did not answer within {timeout_s:g} s; pass a larger timeout_s", code="TIMEOUT"
        )
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return ServerUnreachable(
            f"nothing answers at {url}; start the server, or set url=... or SAM3_URL", code="UNREACHABLE"
        )
    return ServerUnreachable(
        f"the connection to {url} broke before the answer came; see the server's log", code="DISCONNECTED"
    )


def shown(url: httpx.URL) -> str:
    """Scheme, host and port: no path, and no password."""
    return f"{url.scheme}://{url.netloc.decode('ascii')}"


def base_url(text: str) -> httpx.URL:
    """Raises `ServerUnreachable` for a text that is no URL."""
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        url = httpx.URL("")
    if url.scheme not in {"http", "https"} or not url.host:
        raise ServerUnreachable(
            "the server's URL must be as in https://sam3.example.com; set url=... or SAM3_URL", code="BAD_URL"
        )
    return url


def key_headers(key: str | None) -> dict[str, str]:
    """The header with a key. Raises `Unauthorized` for a text that no header can hold."""
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise Unauthorized(
            "the key holds a space, a line end or another character that no key has; check key=... or "
            "SAM3_API_KEY",
            code="BAD_KEY",
        )
    return {"X-API-Key": key} if key else {}


def timeouts(timeout_s: float) -> httpx.Timeout:
    """For httpx: a connection is refused or made much earlier than an answer comes."""
    return httpx.Timeout(timeout_s, connect=min(MAX_CONNECT_S, timeout_s))
