"""What a request may ask for besides its prompts: thresholds, refinement and forms of the answer.

A task's options are stored as canonical JSON text: equal options have equal text, and none have no text.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from sam3_runner.images.tiles import MAX_TILES_A_SIDE, Tiles
from sam3_runner.instances import SCORE_THRESHOLD
from sam3_runner.prompts import MAX_BOXES

MAX_INSTANCES: Final = 200
"""The model finds no more for one prompt."""
MAX_AREA_PX: Final = 2**26
"""The largest image."""
MAX_TOLERANCE_PX: Final = 1000.0

Output = Literal["mask", "instances", "label_map", "overlay", "coco"]
OUTPUTS: Final[tuple[Output, ...]] = ("mask", "instances", "label_map", "overlay", "coco")
Segmentation = Literal["coco_rle", "polygons"]


class FieldError(ValueError):
    """A rule between fields is broken.

    Args:
        field: the one to change, relative to the model.
        reason: continues a sentence after its name.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(reason)
        self.field = field


def _not_null(value: object) -> object:
    if value is None:
        raise ValueError("must not be null; leave the field out")
    return value


def describe_as_not_null(schema: dict[str, Any]) -> None:
    inner = next(each for each in schema.pop("anyOf") if each.get("type") != "null")
    schema.pop("default", None)
    schema.update({name: value for name, value in inner.items() if name not in schema})


NotNull = BeforeValidator(_not_null)
"""For a field that may be left out, but not be null."""
LEFT_OUT: Final[Any] = Field(None, json_schema_extra=describe_as_not_null)
"""Its default."""


def _checked_box(box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = box
    if not (x0 < x1 and y0 < y1):
        raise ValueError("must have x0 < x1 and y0 < y1")
    return box


def text_or_boxes(text_field: str, labels_field: str = "labels") -> dict[str, Any]:
    """For the JSON schema of a prompt: it has a text, boxes, or both, and labels with boxes alone."""
    return {
        "anyOf": [{"required": [text_field]}, {"required": ["boxes"]}],
        "dependentRequired": {labels_field: ["boxes"]},
    }


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = BeforeValidator(_whole)
"""For a strict int: 5.0 is a whole number of JSON too."""
AreaPx = Annotated[int, Field(strict=True, ge=0, le=MAX_AREA_PX), Whole]
Coordinate = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Boxes = Annotated[
    list[tuple[Coordinate, Coordinate, Coordinate, Coordinate]],
    Field(
        min_length=1,
        max_length=MAX_BOXES,
        description="exemplars: x0, y0, x1, y1 in px of the image as a viewer shows it, x0 < x1 and y0 < y1. "
        "Parts outside the image are cut off; a box that has no px in it is refused",
        examples=[[[102.0, 88.0, 231.0, 216.0]]],
    ),
]
Labels = Annotated[
    list[Annotated[int, Field(strict=True, ge=0, le=1), Whole]],
    Field(
        min_length=1,
        max_length=MAX_BOXES,
        description="one a box: 1, find more like it; 0, leave out what is like it. Default: all 1",
        examples=[[1]],
    ),
]
Threshold = Annotated[
    float,
    Field(
        strict=True,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description=f"instances with a higher score are kept. Default: {SCORE_THRESHOLD}; 0 is a value",
        examples=[0.3],
    ),
]


class ExemplarFields(BaseModel):
    """Boxes of one prompt, with their labels."""

    labels_field: ClassVar[str] = "labels"

    boxes: Annotated[Boxes | None, NotNull] = LEFT_OUT
    labels: Annotated[Labels | None, NotNull] = LEFT_OUT

    @field_validator("boxes")
    @classmethod
    def _have_areas(cls, boxes: list[Any] | None) -> list[Any] | None:
        for index, box in enumerate(boxes or ()):
            try:
                _checked_box(box)
            except ValueError as error:
                raise FieldError(f"{index}", str(error)) from None
        return boxes

    @model_validator(mode="after")
    def _labels_fit_boxes(self) -> Self:
        if self.labels is not None and len(self.labels) != len(self.boxes or ()):
            raise FieldError(
                self.labels_field, f"has {len(self.labels)} values for {len(self.boxes or ())} boxes"
            )
        return self

    @property
    def exemplars(self) -> dict[str, Any]:
        """Boxes and labels for the canonical text: labels are left out where all are 1."""
        if self.boxes is None:
            return {}
        found: dict[str, Any] = {"boxes": [list(box) for box in self.boxes]}
        return found | ({"labels": self.labels} if self.labels and 0 in self.labels else {})


def _checked_tiles(value: object) -> object:
    value = _whole(value)
    is_count = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_TILES_A_SIDE
    if value != "auto" and not is_count:
        raise ValueError(f'must be "auto" or a whole number from 1 to {MAX_TILES_A_SIDE}')
    return value


TilesField = Annotated[
    Tiles,
    BeforeValidator(_checked_tiles),
    # Of a union, errors would name its parts.
    WithJsonSchema(
        {"anyOf": [{"const": "auto"}, {"type": "integer", "minimum": 1, "maximum": MAX_TILES_A_SIDE}]}
    ),
    Field(
        description="for small things in large images: overlapping tiles are segmented besides the whole "
        "image. n: a grid of n x n; auto: as many as the model sees at about their own resolution, at most "
        f"{MAX_TILES_A_SIDE} a side; 1: none. Each tile costs as much as an image. Exemplars count in the "
        "tiles that contain them",
        examples=["auto"],
    ),
]


class RefinementFields(BaseModel):
    """How an image is searched, and what is kept of what is found, in the order in which it applies."""

    tiles: TilesField = 1
    score_threshold: Annotated[Threshold | None, NotNull] = LEFT_OUT
    fill_holes: AreaPx = Field(
        0,
        description="holes of at most so many px in an instance's mask are filled; 0: none",
        examples=[100],
    )
    remove_islands: AreaPx = Field(
        0,
        description="separate parts of at most so many px are removed from an instance's mask; 0: none",
        examples=[100],
    )
    min_area: AreaPx = Field(
        0,
        description="instances of fewer px are left out",
        examples=[400],
    )
    nms_iou: float | None = Field(
        None,
        strict=True,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="of two instances whose masks have a higher IoU, the one with the lower score is left "
        "out, across all prompts of the request: one object, one label. null: off",
        examples=[0.7],
    )
    max_instances: Annotated[
        Annotated[
            int,
            Field(
                strict=True,
                ge=1,
                le=MAX_INSTANCES,
                description="of each prompt, the instances with the best scores. Default: all",
                examples=[50],
            ),
            Whole,
        ]
        | None,
        NotNull,
    ] = LEFT_OUT


class FormFields(BaseModel):
    """The forms in which a task's result is stored and answered."""

    outputs: list[Output] = Field(
        ["mask"],
        max_length=2 * len(OUTPUTS),
        description="files to store. mask: the union of a prompt's instances, always stored; instances: one "
        "PNG an instance, cropped to it; label_map: one PNG whose px are numbers of instances, 0 for none; "
        "overlay: a preview JPEG; coco: a JSON document of COCO annotations",
        examples=[["mask", "overlay"]],
    )
    segmentation: Segmentation | None = Field(
        None,
        description="each instance's mask in the answer: coco_rle, {size: [height, width], counts}, "
        "COCO's compressed run lengths, column by column; polygons: a list of parts, each its outer ring and "
        "then its holes, rings of [x, y] in px. null: none",
        examples=["polygons"],
    )
    polygon_tolerance: float = Field(
        0.0,
        strict=True,
        ge=0,
        le=MAX_TOLERANCE_PX,
        allow_inf_nan=False,
        description="px by which a simplified polygon may differ; 0: exact, along the edges of px",
        examples=[1.0],
    )


class PromptOptions(ExemplarFields):
    """The options of one prompt."""

    model_config = ConfigDict(extra="forbid")

    score_threshold: Threshold | None = None


class TaskOptions(RefinementFields, FormFields):
    """All options of a task, from its canonical text."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompts: list[PromptOptions | None] = []

    @classmethod
    def from_text(cls, text: str) -> TaskOptions:
        """Read what `canonical_text` wrote. Raises ValueError."""
        return cls.model_validate_json(text) if text else cls()

    def of_prompt(self, index: int) -> PromptOptions:
        """The options of one prompt."""
        found = self.prompts[index] if index < len(self.prompts) else None
        return found or PromptOptions()

    def threshold_of(self, index: int) -> float | None:
        """The score threshold of one prompt: its own, or the request's; None: the model's."""
        own = self.of_prompt(index).score_threshold
        return self.score_threshold if own is None else own

    def asks_for(self, output: Output) -> bool:
        """Whether this file is to be stored."""
        return output == "mask" or output in self.outputs

    @property
    def refines(self) -> bool:
        """Whether instances or their masks change after the model."""
        return (
            self.nms_iou is not None
            or self.max_instances is not None
            or max(self.fill_holes, self.remove_islands, self.min_area) > 0
        )

    @property
    def needs_masks(self) -> bool:
        """Whether the mask of each instance is needed, not only their union."""
        return self.refines or self.tiles != 1 or self.segmentation is not None or self.needs_files

    @property
    def needs_files(self) -> bool:
        """Whether files besides the masks of the prompts are to be stored."""
        return bool({*self.outputs} - {"mask"})


def canonical_text(fields: RefinementFields, prompts: list[dict[str, Any]]) -> str:
    """The options of a request as text: equal for equal options, empty where nothing is asked for.

    Args:
        fields: of the request.
        prompts: of each prompt its own options; empty where it has none.
    """
    names = {*RefinementFields.model_fields, *FormFields.model_fields}
    options = fields.model_dump(mode="json", include=names, exclude_defaults=True)
    named = {*options.pop("outputs", ())} - {"mask"}
    if named:
        options["outputs"] = [name for name in OUTPUTS if name in named]
    if options.get("segmentation") != "polygons":
        options.pop("polygon_tolerance", None)
    if any(prompts):
        options["prompts"] = [each or None for each in prompts]
    return json.dumps(options, sort_keys=True, separators=(",", ":")) if options else ""
