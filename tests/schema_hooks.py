"""Hooks for schemathesis: provide an existing image, and the rules that the schema cannot express.

Only what matches the schema is changed, so that the server can serve it.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from typing import Any
from uuid import uuid4

import schemathesis
from pydantic import TypeAdapter, ValidationError
from schemathesis.transport.serialization import Binary

from contract import Prompt
from contract.options import Boxes, Labels
from sam3_runner.prompts import CONTEXT_TOKENS, PromptTokenizer
from sam3_runner.weights.checkpoint import CLIP_TOKENIZER_FILE
from tests.drawn import scene
from tests.edge import png_bytes

IMAGE_KEY = os.environ["TEST_IMAGE_KEY"]
"""The key of an image in the server's store."""
USER = IMAGE_KEY.split("/")[1]
CASES_PER_INFERENCE = 8
"""The other cases use a missing image, which takes a tenth of the time."""
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.IGNORECASE)
DEADLINE_MS = re.compile(r"[1-9][0-9]{0,4}")
USER_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")

IMAGE = png_bytes(scene(100).image)
"""For the form: any file matches its schema."""
SIDE_PX = 336
"""Of both images."""

prompts = TypeAdapter[str](Prompt)
boxes = TypeAdapter[Any](Boxes)
labels = TypeAdapter[Any](Labels)
tokenizer = PromptTokenizer(CLIP_TOKENIZER_FILE)
numbers = itertools.count()


@schemathesis.hook
def before_call(
    _context: schemathesis.HookContext, case: schemathesis.Case[Any], _kwargs: dict[str, Any]
) -> None:
    """Change requests that match the schema so that the server can serve them; leave the others."""
    # A deadline of few milliseconds can be met or not.
    headers: Any = case.headers or {}
    if DEADLINE_MS.fullmatch(str(headers.get("X-Deadline-Ms", ""))):
        headers["X-Deadline-Ms"] = "60000"
    if not isinstance(case.body, dict):
        return
    body: dict[str, Any] = dict(case.body)
    for prompt in (body, *_prompts_of(body)):
        _fit_prompt(prompt)
    # Schemathesis repeats ids, but each task is done once.
    if _fits(UUID, body.get("task_id")):
        body["task_id"] = str(uuid4())
    # Few generated strings are valid keys.
    if _fits(USER_ID, body.get("user_id")) and _is_image_url(body.get("image_url")):
        exists = next(numbers) % CASES_PER_INFERENCE == 0
        body |= {"user_id": USER, "image_url": IMAGE_KEY if exists else f"uploads/{USER}/none"}
    has_file = isinstance(body.get("image"), Binary | bytes)
    if has_file:
        # An empty text of a form is a field that is left out.
        body = {name: "\x01" if value == "" else value for name, value in body.items()}
        body |= {"image": IMAGE, **_wrong_lists(body)}
    case.body = body
    if has_file:
        # Else it would judge the changed body anew, and a body with a file always as an invalid one.
        case._record_starting_state()


def _prompts_of(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The prompts of a batch that are objects, each a copy that is in the body; texts are shortened."""
    if not isinstance(body.get("prompts"), list):
        return []
    body["prompts"] = [
        dict(each) if isinstance(each, dict) else _with_few_tokens(each) for each in body["prompts"]
    ]
    return [each for each in body["prompts"] if isinstance(each, dict)]


def _wrong_lists(form: dict[str, Any]) -> dict[str, Any]:
    """Lists that break the schema, but not in a form: an empty one is left out, a label alone is a list."""
    wrong = {name: "no list" for name in ("boxes", "box_labels") if form.get(name) == []}
    return wrong if isinstance(form.get("box_labels", []), list) else {**wrong, "box_labels": "no list"}


def _fit_prompt(prompt: dict[str, Any]) -> None:
    """Shorten its text, put its boxes into the image, and give each box one label."""
    for name in ("text_prompt", "prompt", "text"):
        if name in prompt:
            prompt[name] = _with_few_tokens(prompt[name])
    if not _matches(boxes, prompt.get("boxes")):
        return
    prompt["boxes"] = [_box_inside(*box) for box in prompt["boxes"]]
    for name in ("labels", "box_labels"):
        if _matches(labels, prompt.get(name)):
            count = len(prompt["boxes"])
            prompt[name] = [*prompt[name], *[1] * count][:count]


def _box_inside(x0: float, y0: float, x1: float, y1: float) -> list[float]:
    half_px = SIDE_PX // 2
    return [abs(x0) % half_px, abs(y0) % half_px, half_px + abs(x1) % half_px, half_px + abs(y1) % half_px]


def _matches(adapter: TypeAdapter[Any], value: Any) -> bool:
    """Whether a value has the form that the schema describes."""
    try:
        adapter.validate_json(json.dumps(value))
    except (ValidationError, TypeError):
        return False
    return True


def _with_few_tokens(prompt: Any) -> Any:
    """A prompt of the same length within the token limit; other values stay unchanged."""
    try:
        text = prompts.validate_python(prompt, strict=True)
    except ValidationError:
        return prompt
    if tokenizer.count(text) <= CONTEXT_TOKENS:
        return prompt
    return text[0] + " " * (len(prompt) - 2) + text[-1]


def _is_image_url(value: Any) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= 2048


def _fits(pattern: re.Pattern[str], value: Any) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None
