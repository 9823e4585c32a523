"""What a call answers: a text for the model, values for programs, the drawn picture for both."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

from mcp.types import CallToolResult, ImageContent, TextContent
from pydantic import BaseModel, Field

if TYPE_CHECKING:
    from sam3_client import Instance, Result

MAX_SIDE_PX = 1024
"""Of the drawn picture: clients refuse results of more than about 1 MB, and models shrink larger ones."""
JPEG_QUALITY = 85


class CocoRle(BaseModel):
    """A mask as COCO's compressed run lengths, which pycocotools reads."""

    size: list[int] = Field(description="height and width of the image in px")
    counts: str


class FoundInstance(BaseModel):
    """One object that was found."""

    label: str = Field(description='the prompt that found it; "visual" where boxes alone did')
    score: float = Field(description="0 to 1")
    box: list[float] = Field(description="x0, y0, x1, y1 in px of the image", min_length=4, max_length=4)
    area_px: int = Field(description="px of its mask")
    mask: CocoRle | None = Field(None, description="only if masks was true")


class SegmentAnswer(BaseModel):
    """The values of an answer, the best score of each prompt first."""

    image_width: int
    image_height: int
    presence: dict[str, float] = Field(
        description="of each prompt, the probability that its concept is in the image at all"
    )
    instances: list[FoundInstance]


def tool_result(result: Result, *, masks: bool) -> CallToolResult:
    """The answer to a call.

    Args:
        result: of one image.
        masks: add each instance's mask to the values.

    Raises:
        sam3_client.BadImage: the picture cannot be drawn, because Pillow cannot decode it.
    """
    answer = SegmentAnswer(
        image_width=result.width,
        image_height=result.height,
        presence=result.presence,
        instances=[_found(each, with_mask=masks) for each in result.instances],
    )
    drawing = base64.b64encode(_drawing(result)).decode()
    return CallToolResult(
        content=[
            TextContent(type="text", text=describe(result)),
            ImageContent(type="image", data=drawing, mime_type="image/jpeg"),
        ],
        structured_content=answer.model_dump(exclude_none=True),
    )


def describe(result: Result) -> str:
    """What was found, with a line each: label, score, box, area."""
    lines = [f"The image has {result.width} x {result.height} px."]
    for prompt in result.prompts:
        found = [each for each in result.instances if each.label == prompt]
        if not found:
            presence = result.presence[prompt]
            lines.append(f'"{prompt}": nothing found (probability that it is in the image: {presence:.2f}).')
            continue
        lines.append(f'"{prompt}": {len(found)} found. Boxes are x0, y0, x1, y1 in px of the image.')
        lines += [_line(number, each) for number, each in enumerate(found, 1)]
    return "\n".join(lines)


def _line(number: int, instance: Instance) -> str:
    box = ", ".join(f"{side:.0f}" for side in instance.box)
    return f"{number}. score {instance.score:.2f}, box [{box}], mask of {instance.area} px"


def _found(instance: Instance, *, with_mask: bool) -> FoundInstance:
    return FoundInstance(
        label=instance.label,
        score=instance.score,
        box=list(instance.box),
        area_px=instance.area,
        mask=CocoRle.model_validate(instance.coco_rle) if with_mask else None,
    )


def _drawing(result: Result) -> bytes:
    file = io.BytesIO()
    result.overlay(MAX_SIDE_PX).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()
