"""Request and answer of the route that touches no store and no row: `POST /v1/images/segmentations`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from contract.answers import CocoRle, ModelFacts, Present, SettingsModel, StageName
from contract.options import (
    LEFT_OUT,
    ExemplarFields,
    FieldError,
    Labels,
    NotNull,
    RefinementFields,
    describe_as_not_null,
    text_or_boxes,
)
from contract.prompts import Prompt  # noqa: TC001 - pydantic reads it

if TYPE_CHECKING:
    from collections.abc import Iterable

LISTS: Final = {"boxes", "box_labels"}
"""Fields that are JSON text, or repeated with an item each."""


class DirectRequest(RefinementFields, ExemplarFields):
    """The fields beside the file `image`."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra=text_or_boxes("prompt", labels_field="box_labels")
    )
    labels_field: ClassVar[str] = "box_labels"

    prompt: Annotated[Prompt | None, NotNull] = LEFT_OUT
    labels: Annotated[Labels | None, NotNull] = Field(
        None, alias="box_labels", json_schema_extra=describe_as_not_null
    )
    mask_format: Literal["png", "rle"] = Field(
        "png",
        description="png: base64 of a PNG of the image's size, 255 inside; rle: COCO's run lengths",
    )
    model: str = Field(
        "", max_length=200, description="clients of other servers send it; this one has one model"
    )

    @model_validator(mode="after")
    def _has_a_prompt(self) -> Self:
        if self.prompt is None and self.boxes is None:
            raise FieldError("prompt", "is required unless there are boxes")
        return self


class DirectInstance(BaseModel):
    """One object that was found."""

    mask: str | CocoRle = Field(description="in the form that `mask_format` names")
    box: tuple[float, float, float, float] = Field(description="x0, y0, x1, y1 in px of the image")
    score: float


class DirectAnswer(BaseModel):
    """Every instance of the prompt, best score first."""

    data: list[DirectInstance]
    presence: float = Field(description="probability that the concept is in the image at all")
    image_width: int
    image_height: int
    model: ModelFacts | Present = None
    timings_ms: dict[StageName, float]
    settings: SettingsModel


def read_fields(fields: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """The text fields of a form as values for `DirectRequest`, which refuses what does not fit.

    Lists are JSON text, or fields that are repeated with an item each. Of other repeated fields the
    last counts. Empty texts count as left out: browsers send the fields that nobody filled in.
    """
    read: dict[str, Any] = {}
    for name, text in fields:
        if not text:
            continue
        if name in LISTS:
            value = _json_or_text(text)
            is_whole = isinstance(value, list) and (name != "boxes" or _is_nested(value))
            read[name] = [*read.get(name, []), *(value if is_whole else [value])]
        elif name in RefinementFields.model_fields:
            read[name] = _json_or_text(text)
        else:
            read[name] = text
    return read


def _is_nested(value: list[Any]) -> bool:
    return all(isinstance(each, list) for each in value)


def _json_or_text(text: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return text if value is None else value  # a form has no null: fields are left out
