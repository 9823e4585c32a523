"""The MCP server as a process, called by the official SDK's client on stdin and stdout."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from mcp import Client, StdioServerParameters, stdio_client
from PIL import Image
from pycocotools import mask as coco_mask

from commands.local_server import reserved_ports

if TYPE_CHECKING:
    from mcp.types import CallToolResult, Tool

    from commands.local_server import LocalServer

pytestmark = pytest.mark.server

ROOT = Path(__file__).parent.parent.parent
SAMPLE = ROOT / "examples" / "sample.jpg"
CIRCLE_BOX = (926, 363, 1066, 503)
"""Of the purple circle in the sample, in px."""


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with a picture, a text and a link out of it; beside it another picture."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    shutil.copy(SAMPLE, folder / "shapes.jpg")
    shutil.copy(SAMPLE, tmp_path / "private.jpg")
    (folder / "notes.txt").write_text("no picture")
    (folder / "link.jpg").symlink_to(tmp_path / "private.jpg")
    return folder


@dataclass(frozen=True)
class Conversation:
    """What one process of the MCP server answered."""

    tools: list[Tool]
    answers: list[CallToolResult]


def converse(url: str, key: str, root: Path, *calls: dict[str, Any]) -> Conversation:
    """Start an MCP server, list its tools and make the calls; it must write nothing to stderr."""
    parameters = StdioServerParameters(
        command=sys.executable,
        args=["-m", "adapters.mcp", "--root", str(root), "--url", url],
        env={"SAM3_API_KEY": key, "PYTHONPATH": str(ROOT)},
        cwd=root.parent,
    )
    log_path = root.parent / "stderr.txt"

    async def talk() -> Conversation:
        with log_path.open("w") as log:
            async with Client(stdio_client(parameters, errlog=log)) as client:
                tools = (await client.list_tools()).tools
                return Conversation(tools, [await client.call_tool("segment_image", each) for each in calls])

    conversation = asyncio.run(talk())
    assert log_path.read_text() == ""
    return conversation


def values_of(result: CallToolResult) -> dict[str, Any]:
    """The structured content of a good answer."""
    assert not result.is_error, result.content
    assert isinstance(result.structured_content, dict)
    return result.structured_content


def sentence_of(result: CallToolResult) -> str:
    """The text of an answer that is an error."""
    assert result.is_error
    assert result.structured_content is None
    [content] = result.content
    assert content.type == "text"
    return content.text


def test_agent_finds_objects(server: LocalServer, pictures: Path) -> None:
    """The tool is listed; its answer has a text, values and a drawn picture, for a path, base64 and boxes."""
    in_base64 = base64.b64encode(SAMPLE.read_bytes()).decode()
    conversation = converse(
        server.url,
        server.api_key,
        pictures,
        {"path": "shapes.jpg", "prompts": ["triangle", "purple circle", "blue star"], "masks": True},
        {"image_base64": in_base64, "prompts": "purple circle"},
        {"path": str(pictures / "shapes.jpg"), "boxes": [CIRCLE_BOX]},
        {"path": "shapes.jpg", "prompts": ["triangle"], "score_threshold": 1},
    )
    [tool] = conversation.tools
    assert tool.name == "segment_image"
    assert {"path", "prompts", "boxes", "score_threshold"} <= set(tool.input_schema["properties"])
    by_path, by_base64, by_box, above_threshold = map(values_of, conversation.answers)

    labels = [each["label"] for each in by_path["instances"]]
    assert labels == ["triangle"] * 4 + ["purple circle"]
    circle = by_path["instances"][-1]
    assert np.abs(np.subtract(circle["box"], CIRCLE_BOX)).max() < 4
    assert coco_mask.area(circle["mask"]) == circle["area_px"] > 15_000
    text, drawing = conversation.answers[0].content
    assert text.type == "text"
    assert '"triangle": 4 found' in text.text
    assert '"blue star": nothing found' in text.text
    assert f"score {circle['score']:.2f}, box [" in text.text
    assert drawing.type == "image"
    check_drawing(drawing.data)

    assert by_base64["instances"] == [{name: circle[name] for name in circle if name != "mask"}]
    assert [each["label"] for each in by_box["instances"]] == ["visual"]
    assert above_threshold["instances"] == []


def check_drawing(data: str) -> None:
    """Check that a JPEG is the sample, smaller, with the circle in another colour and the sky unchanged."""
    drawn = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (drawn.format, drawn.size) == ("JPEG", (1024, 576))
    sample = Image.open(SAMPLE)
    x, y = (round((CIRCLE_BOX[axis] + CIRCLE_BOX[axis + 2]) / 2 * 1024 / sample.width) for axis in (0, 1))
    change = np.abs(np.asarray(drawn, np.int16) - np.asarray(sample.resize(drawn.size), np.int16)).max(axis=2)
    assert change[y, x] > 30
    assert change[10:60, 600:700].max() < 30  # the empty sky


def test_each_error_is_a_sentence_and_the_next_call_works(server: LocalServer, pictures: Path) -> None:
    """Files outside of the root stay unread, whichever path leads there; each error says what is wrong."""
    prompts = ["purple circle"]
    private = pictures.parent / "private.jpg"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"path": "missing.jpg", "prompts": prompts}, "there is no file missing.jpg"),
        ({"path": ".", "prompts": prompts}, "there is no file"),
        ({"path": "../private.jpg", "prompts": prompts}, "is outside of the folder"),
        ({"path": str(private), "prompts": prompts}, "is outside of the folder"),
        ({"path": "../missing.jpg", "prompts": prompts}, "is outside of the folder"),
        ({"path": "link.jpg", "prompts": prompts}, "is outside of the folder"),
        ({"path": "a\0b", "prompts": prompts}, "cannot be read"),
        ({"path": "notes.txt", "prompts": prompts}, "no picture"),
        ({"image_base64": "not base64!", "prompts": prompts}, "not base64"),
        ({"prompts": prompts}, "path or as image_base64"),
        ({"path": "shapes.jpg"}, "give a prompt, or boxes"),
        ({"path": "shapes.jpg", "prompts": prompts, "score_threshold": 7}, "score_threshold"),
    ]

    good = {"path": "shapes.jpg", "prompts": prompts}
    calls = [arguments for arguments, _ in cases]
    *failed, found = converse(server.url, server.api_key, pictures, *calls, good).answers
    for answer, (_, sentence) in zip(failed, cases, strict=True):
        assert sentence in sentence_of(answer)
    assert len(values_of(found)["instances"]) == 1

    [refused] = converse(server.url, "a-wrong-key", pictures, good).answers
    assert "SAM3_API_KEY" in sentence_of(refused)
    assert "a-wrong-key" not in sentence_of(refused)


def test_server_that_is_away(pictures: Path) -> None:
    """Without a SAM 3 server the tool is listed, and a call says what to do."""
    with reserved_ports(1) as [port]:
        url = f"http://127.0.0.1:{port}"
        conversation = converse(url, "any-key", pictures, {"path": "shapes.jpg", "prompts": ["circle"]})
    assert len(conversation.tools) == 1
    assert f"nothing answers at {url}; start the server" in sentence_of(conversation.answers[0])


def test_root_that_is_no_folder(pictures: Path) -> None:
    """The start fails with one sentence."""
    ended = subprocess.run(
        [sys.executable, "-m", "adapters.mcp", "--root", str(pictures / "shapes.jpg")],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stderr == f"{pictures / 'shapes.jpg'} is no folder\n"
