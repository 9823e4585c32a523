"""The MCP server and its tool."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import CallToolResult, ToolAnnotations
from pydantic import BeforeValidator, Field

from adapters.mcp.answer import SegmentAnswer, tool_result
from adapters.mcp.images import ImageFolder, ImageRefused, decode_base64
from sam3_client import AsyncClient, Sam3Error, __version__

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

INSTRUCTIONS = (
    "segment_image finds every instance of a concept in a picture, with SAM 3. Name concepts as short noun "
    "phrases, one each: 'red car', not 'the red car on the left'. Positions and negations are ignored."
)

DESCRIPTION = (
    "Find every instance of one or several concepts in a picture. Pass path or image_base64, and prompts or "
    "boxes or both. Answers the score, box and area of each instance, and the picture with all of them drawn "
    "in. What boxes alone find has the label 'visual'."
)

# Lists of plain numbers: several clients refuse the schema of a tuple.
Path = Annotated[str, Field(description="of a picture's file (PNG, JPEG, WEBP) below the server's folder")]
Base64 = Annotated[str, Field(description="of a picture's file, where there is no path")]
Prompts = Annotated[
    list[str],
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    Field(description="what to find, a noun phrase each, as in ['car', 'red traffic light']"),
]
Box = Annotated[list[float], Field(min_length=4, max_length=4)]
Boxes = Annotated[
    list[Box], Field(description="x0, y0, x1, y1 in px each: examples in this picture of what to find")
]
BoxLabels = Annotated[
    list[int], Field(description="for each box: 1, like this (the default), or 0, not like this")
]
Threshold = Annotated[
    float | None, Field(description="0 to 1: instances with a higher score are returned; default 0.5")
]
Masks = Annotated[bool, Field(description="add each mask to the structured content, as COCO run lengths")]


def create_server(client: AsyncClient, folder: ImageFolder) -> MCPServer[None]:
    """An MCP server with the tool `segment_image`.

    Args:
        client: of the SAM 3 server; it is closed when this server ends.
        folder: whose pictures may be read.
    """

    @asynccontextmanager
    async def lifespan(_: MCPServer[None]) -> AsyncIterator[None]:
        async with client:
            yield

    server = MCPServer(
        "sam3",
        title="SAM 3",
        instructions=INSTRUCTIONS,
        version=__version__,
        lifespan=lifespan,
        log_level="WARNING",  # below it, arguments of calls are logged
    )

    @server.tool(
        title="Find objects in a picture",
        description=DESCRIPTION,
        annotations=ToolAnnotations(read_only_hint=True),
    )
    async def segment_image(
        *,
        path: Path = "",
        image_base64: Base64 = "",
        prompts: Prompts = (),  # type: ignore[assignment] # a default must not be mutable
        boxes: Boxes = (),  # type: ignore[assignment]
        box_labels: BoxLabels = (),  # type: ignore[assignment]
        score_threshold: Threshold = None,
        masks: Masks = False,
    ) -> Annotated[CallToolResult, SegmentAnswer]:
        try:
            image = await asyncio.to_thread(read_image, folder, path, image_base64)
            result = await client.segment(
                image,
                prompts,
                boxes=boxes or None,
                box_labels=box_labels or None,
                score_threshold=score_threshold,
            )
            return await asyncio.to_thread(tool_result, result, masks=masks)
        except (ImageRefused, Sam3Error) as error:
            raise ToolError(str(error)) from error

    return server


def read_image(folder: ImageFolder, path: str, image_base64: str) -> bytes:
    """The file that a call names. Raises `ImageRefused`."""
    if bool(path) == bool(image_base64):
        raise ImageRefused("pass the picture as path or as image_base64, one of them")
    return folder.read(path) if path else decode_base64(image_base64)
