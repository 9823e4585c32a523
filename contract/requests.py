"""The bodies of requests."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema, WithJsonSchema

from contract.prompts import Prompt
from sam3_runner.prompts import MAX_PROMPTS


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
