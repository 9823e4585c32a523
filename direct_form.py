"""Reads the form of a direct request, in memory: nothing of it is written to disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from contract import Failure
from contract.direct import DirectRequest, read_fields
from contract.options import describe_as_not_null

if TYPE_CHECKING:
    from starlette.requests import Request

PATH: Final = "/v1/images/segmentations"
MAX_FORM_BYTES: Final = 64 * 1024
"""Of all fields beside the image, with the form's own lines."""
MAX_FIELDS: Final = 100
EXAMPLE_PROMPT: Final = "triangles"


class _Parser(MultiPartParser):
    spool_max_size = 2**31  # larger files would be written to disk


async def read_form(request: Request, max_image_bytes: int) -> tuple[DirectRequest, bytes]:
    """The fields and the image. Raises `Failure`, and `RequestValidationError` for a field."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise Failure("INVALID_REQUEST", "the body: must be a form, sent as multipart/form-data")
    parser = _Parser(
        request.headers,
        request.stream(),
        max_files=1,
        max_fields=MAX_FIELDS,
        max_part_size=MAX_FORM_BYTES,
    )
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError, UnicodeError) as error:
        # KeyError: no boundary. The parser's other errors are of these kinds.
        raise Failure(
            "INVALID_REQUEST", "the body: is no form, or has too many or too long fields"
        ) from error
    try:
        files = [value for name, value in form.multi_items() if isinstance(value, UploadFile)]
        if not files or form.get("image") is not files[-1]:
            raise Failure("INVALID_REQUEST", "image: is required, as a file")
        image = await files[-1].read()
    finally:
        await form.close()
    if len(image) > max_image_bytes:
        raise Failure("FILE_TOO_LARGE", f"the image has more than {max_image_bytes} bytes")
    fields = [(name, value) for name, value in form.multi_items() if isinstance(value, str)]
    return _checked(read_fields(fields)), image


def _checked(fields: dict[str, Any]) -> DirectRequest:
    try:
        return DirectRequest.model_validate(fields)
    except ValidationError as error:
        raise RequestValidationError(
            [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
        ) from None


def form_schema() -> dict[str, Any]:
    """The request's body in the API description."""
    schema = DirectRequest.model_json_schema()
    image = {"type": "string", "format": "binary", "description": "PNG, JPEG or WEBP, by its content"}
    describe_as_not_null(schema["properties"]["nms_iou"])
    # What Swagger's page fills in.
    for prefilled in schema["properties"].values():
        if "default" in prefilled:
            prefilled["example"] = prefilled["default"]
    schema["properties"]["prompt"]["example"] = EXAMPLE_PROMPT
    schema["properties"] = {"image": image, **schema["properties"]}
    schema["required"] = ["image"]
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}
