"""The text of a prompt: which characters it may hold, and how it is cleaned."""

from __future__ import annotations

import unicodedata
from typing import Annotated

from pydantic import AfterValidator, Field

from sam3_runner.invisible import is_invisible, trimmed
from sam3_runner.prompts import CONTEXT_TOKENS, MAX_PROMPT_CHARACTERS

PROMPT_RULE = (
    "A noun phrase. Spaces and invisible marks (joiners, zero-width spaces, byte order marks) at its ends "
    "are stripped; the rest is used, stored and answered as it was sent. One rule cannot stand in a schema: "
    f"it has at most {CONTEXT_TOKENS} tokens, start and end token included, or is refused with 400 and both "
    "numbers. An English word is one or two tokens, a character of other scripts or an emoji up to four."
)
PROMPT_PATTERN = (
    r"^[^\u0000-\u001F\u007F-\u009F\u2028\u2029]*"
    r"[^\u0000-\u0020\u007F-\u00A0\u00AD\u061C\u1680\u180E\u2000-\u200F"
    r"\u2028-\u202F\u205F-\u206F\u3000\uFEFF]"
    r"[^\u0000-\u001F\u007F-\u009F\u2028\u2029]*$"
)
"""For the description alone: no control characters, and something that is not stripped."""
REFUSED_IN_PROMPTS = {
    "Cc": "a control character",
    "Cs": "half of a surrogate pair",
    "Zl": "a line separator",
    "Zp": "a paragraph separator",
}
"""By Unicode's category. All else is text, unassigned characters too: emoji are newer than our tables."""


def reason_against(text: str) -> str | None:
    """What a prompt holds and must not hold: "holds a control character (U+000A)"."""
    for character in text:
        refused = REFUSED_IN_PROMPTS.get(unicodedata.category(character))
        if refused:
            return f"holds {refused} (U+{ord(character):04X})"
    return None


def _cleaned(text: str) -> str:
    """The prompt as it is used, stored and answered: as it was sent, without spaces and marks at its ends."""
    reason = reason_against(text)
    if reason:
        raise ValueError(reason)
    if is_invisible(text):
        raise ValueError("must hold more than spaces and invisible characters")
    return trimmed(text)


Prompt = Annotated[
    str,
    Field(
        min_length=1,
        max_length=MAX_PROMPT_CHARACTERS,
        description=PROMPT_RULE,
        examples=["red circle"],
        json_schema_extra={"pattern": PROMPT_PATTERN},
    ),
    AfterValidator(_cleaned),
]
