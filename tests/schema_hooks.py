"""Hooks for schemathesis: provide an existing image, and two rules that the schema cannot express."""

from __future__ import annotations

import itertools
import os
import re
from typing import Any
from uuid import uuid4

import schemathesis
from pydantic import TypeAdapter, ValidationError

from contract import Prompt
from sam3_runner.prompts import CONTEXT_TOKENS, PromptTokenizer
from sam3_runner.weights.checkpoint import CLIP_TOKENIZER_FILE

IMAGE_KEY = os.environ["TEST_IMAGE_KEY"]
"""The key of an image in the server's store."""
USER = IMAGE_KEY.split("/")[1]
CASES_PER_INFERENCE = 8
"""The other cases use a missing image, which takes a tenth of the time."""
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.IGNORECASE)
DEADLINE_MS = re.compile(r"[1-9][0-9]{0,4}")
USER_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")

prompts = TypeAdapter[str](Prompt)
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
    if "text_prompt" in body:
        body["text_prompt"] = _with_few_tokens(body["text_prompt"])
    if isinstance(body.get("prompts"), list):
        body["prompts"] = [_with_few_tokens(text) for text in body["prompts"]]
    # Schemathesis repeats ids, but each task is done once.
    if _fits(UUID, body.get("task_id")):
        body["task_id"] = str(uuid4())
    # Few generated strings are valid keys.
    if _fits(USER_ID, body.get("user_id")) and _is_image_url(body.get("image_url")):
        exists = next(numbers) % CASES_PER_INFERENCE == 0
        body |= {"user_id": USER, "image_url": IMAGE_KEY if exists else f"uploads/{USER}/none"}
    case.body = body


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
