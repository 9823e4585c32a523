"""The bodies of requests."""

from __future__ import annotations

from typing import Annotated, Any, Final, Self
from uuid import UUID  # noqa: TC003 - pydantic reads it

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic.json_schema import SkipJsonSchema, WithJsonSchema

from contract.options import (
    LEFT_OUT,
    ExemplarFields,
    FieldError,
    FormFields,
    NotNull,
    RefinementFields,
    Threshold,
    canonical_text,
    text_or_boxes,
)
from contract.prompts import Prompt
from sam3_runner.prompts import MAX_PROMPTS, VISUAL

EXAMPLE_IMAGE_KEY: Final = "uploads/user-1/sample"
"""In the documentation. The embedded demo stores its sample image there."""


class _Request(RefinementFields, FormFields):
    model_config = ConfigDict(extra="forbid")

    image_url: Annotated[
        str,
        Field(
            min_length=1,
            max_length=2048,
            description="where the Edge stored the image: a URL of our bucket, or its bare key. "
            "What cannot be read as either is a 400",
            examples=[EXAMPLE_IMAGE_KEY],
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
        """The texts of the prompts, by the names of their fields."""
        raise NotImplementedError

    @property
    def labels_of_prompts(self) -> tuple[str, ...]:
        """The prompts as answers and rows name them."""
        raise NotImplementedError

    @property
    def options_text(self) -> str:
        """What is asked for besides the prompts, as canonical JSON; empty where nothing is."""
        raise NotImplementedError


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


class PredictRequest(_Request, ExemplarFields):
    """One image, one prompt: a text, boxes, or both."""

    model_config = ConfigDict(json_schema_extra=text_or_boxes("text_prompt"))

    text_prompt: Annotated[Prompt | None, NotNull] = LEFT_OUT

    @model_validator(mode="after")
    def _has_a_prompt(self) -> Self:
        if self.text_prompt is None and self.boxes is None:
            raise FieldError("text_prompt", "is required unless there are boxes")
        return self

    @property
    def texts_by_field(self) -> dict[str, str]:
        """The text, by the name of its field."""
        return {} if self.text_prompt is None else {"text_prompt": self.text_prompt}

    @property
    def labels_of_prompts(self) -> tuple[str, ...]:
        """The prompt as answers and rows name it."""
        return (self.text_prompt or VISUAL,)

    @property
    def options_text(self) -> str:
        """As canonical JSON."""
        return canonical_text(self, [self.exemplars])


class PromptItem(ExemplarFields):
    """One prompt of a batch: a text, boxes, or both, and a threshold of its own."""

    model_config = ConfigDict(extra="forbid", json_schema_extra=text_or_boxes("text"))

    text: Annotated[Prompt | None, NotNull] = LEFT_OUT
    score_threshold: Annotated[Threshold | None, NotNull] = LEFT_OUT

    @model_validator(mode="after")
    def _has_a_prompt(self) -> Self:
        if self.text is None and self.boxes is None:
            raise FieldError("text", "is required unless there are boxes")
        return self

    @property
    def options(self) -> dict[str, Any]:
        """Exemplars and threshold, for the canonical text."""
        own = {} if self.score_threshold is None else {"score_threshold": self.score_threshold}
        return self.exemplars | own


STRING_TAG: Final = "<string>"
OBJECT_TAG: Final = "<object>"
"""pydantic puts the tags into the places of errors; `errors.invalid_request` leaves them out."""


def _tag_of(item: object) -> str:
    return OBJECT_TAG if isinstance(item, dict | PromptItem) else STRING_TAG


AnyPrompt = Annotated[
    Annotated[Prompt, Tag(STRING_TAG)] | Annotated[PromptItem, Tag(OBJECT_TAG)], Discriminator(_tag_of)
]


class BatchRequest(_Request):
    """One image, several prompts: the image is fetched and encoded once."""

    prompts: Annotated[
        list[AnyPrompt],
        Field(
            min_length=1,
            max_length=MAX_PROMPTS,
            description="each a text, or an object with a text, boxes, or both",
            examples=[["red circle", {"text": "triangles", "score_threshold": 0.3}]],
        ),
    ]

    @property
    def texts_by_field(self) -> dict[str, str]:
        """The texts of the prompts, by the names of their fields."""
        found = {}
        for index, prompt in enumerate(self.prompts):
            if isinstance(prompt, str):
                found[f"prompts.{index}"] = prompt
            elif prompt.text is not None:
                found[f"prompts.{index}.text"] = prompt.text
        return found

    @property
    def labels_of_prompts(self) -> tuple[str, ...]:
        """The prompts as answers and rows name them."""
        return tuple(each if isinstance(each, str) else each.text or VISUAL for each in self.prompts)

    @property
    def options_text(self) -> str:
        """As canonical JSON."""
        return canonical_text(self, [{} if isinstance(each, str) else each.options for each in self.prompts])


EXAMPLE_OWNER: Final = {"image_url": EXAMPLE_IMAGE_KEY, "user_id": "user-1"}
EXAMPLES: Final[dict[str, dict[str, dict[str, Any]]]] = {
    "/api/v1/predict": {
        "a text": {"text_prompt": "purple circle"},
        "an exemplar": {"boxes": [[924, 364, 1075, 505]], "labels": [1]},
        "every form of the answer": {
            "text_prompt": "triangles",
            "outputs": ["mask", "instances", "label_map", "overlay", "coco"],
            "segmentation": "polygons",
            "polygon_tolerance": 1.0,
        },
        "thresholds and clean masks": {
            "text_prompt": "triangles",
            "score_threshold": 0.3,
            "max_instances": 5,
            "min_area": 100,
            "fill_holes": 50,
            "remove_islands": 50,
        },
    },
    "/api/v1/predict/batch": {
        "texts": {"prompts": ["triangles", "red shape"]},
        "one label for each object": {
            "prompts": ["triangles", {"text": "red shape", "score_threshold": 0.4}],
            "nms_iou": 0.7,
            "outputs": ["overlay"],
        },
    },
}
"""Bodies for the documentation, by path and name; the embedded demo answers each."""
