"""Prompts with special spaces, joiners and invisible characters: only invalid text is refused."""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from contract import PROMPT_PATTERN, Prompt
from sam3_runner.invisible import is_invisible, trimmed
from tests.drawn import scene
from tests.edge import png_bytes

if TYPE_CHECKING:
    from tests.edge import Edge

PROMPT = TypeAdapter[str](Prompt)
PICTURE = scene(16)
"""A black circle and a purple one."""


@pytest.fixture(scope="module")
def image_key(edge: Edge) -> str:
    return edge.upload(png_bytes(PICTURE.image))


@pytest.fixture(scope="module")
def plain(edge: Edge, image_key: str) -> dict[str, Any]:
    """The answer to the prompt with plain spaces."""
    answer = edge.answer(image_key, "black circle")
    assert len(answer["instances"]) == len(PICTURE.named("black circle"))
    return answer


LIKE_BLACK_CIRCLE: dict[str, tuple[str, str]] = {
    "no-break space": ("black\u00a0circle", "black\u00a0circle"),
    "narrow no-break space": ("black\u202fcircle", "black\u202fcircle"),
    "thin space": ("black\u2009circle", "black\u2009circle"),
    "ideographic space": ("black\u3000circle", "black\u3000circle"),
    "Ogham space": ("black\u1680circle", "black\u1680circle"),
    "byte order mark in front": ("\ufeffblack circle", "black circle"),
    "zero-width space at the end": ("black circle\u200b", "black circle"),
    "spaces at the ends": (" \u00a0black circle\u3000 ", "black circle"),
    "marks and spaces at the ends": ("\u200e \u2060black circle\u200d \u00ad", "black circle"),
}
"""Prompts as sent, and as stored."""


@pytest.mark.server
@pytest.mark.parametrize("case", LIKE_BLACK_CIRCLE)
def test_special_spaces_do_not_change_the_result(
    edge: Edge, image_key: str, plain: dict[str, Any], case: str
) -> None:
    """The instances are those of "black circle"; labels and row have the trimmed prompt."""
    sent, stored = LIKE_BLACK_CIRCLE[case]
    body = edge.body(image_key, sent)
    edge.insert_row(body)
    response = edge.send(body)
    assert response.status_code == httpx.codes.OK, response.text
    answer = response.json()
    assert answer["labels"] == [stored]
    assert {instance["label"] for instance in answer["instances"]} == {stored}
    assert [i | {"label": ""} for i in answer["instances"]] == [i | {"label": ""} for i in plain["instances"]]
    row = edge.settled_row(body["task_id"])
    assert (row.labels, row.metadata["prompts"]) == ([stored], [stored])
    # The same prompt again, trimmed or not, is the same task.
    for again in (sent, stored):
        assert edge.send(edge.body(image_key, again, body["task_id"])).json() == answer


TEXTS = {
    "family emoji": "black circle \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "flag of England, which ends in a tag": "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067"
    "\U000e007f",
    "heart, which ends in a variation selector": "\u2764\ufe0f",
    "Persian, with its joiner": "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
    "Hindi, with its joiner": "\u0915\u094d\u200d\u0937",
    "soft hyphen": "black\u00adcircle",
    "right-to-left mark inside": "\u05d0\u200f\u05d1",
    "unassigned, an emoji of the future": "\U0001fbff \U0001faff",
    "private use": "\uf8ff",
    "noncharacter": "a\uffff",
    "Hangul filler before a letter": "\u3164a",
}


@pytest.mark.server
@pytest.mark.parametrize("case", TEXTS)
def test_unusual_text_is_accepted(edge: Edge, image_key: str, case: str) -> None:
    """Joiners, tags and unassigned characters are accepted, and stored in the row as sent."""
    body = edge.body(image_key, [TEXTS[case], "black circle"])
    response = edge.send(body)
    assert response.status_code == httpx.codes.OK, response.text
    assert edge.settled_row(body["task_id"]).metadata["prompts"] == [TEXTS[case], "black circle"]


def test_length_limit_applies_before_trimming() -> None:
    """200 characters are accepted and 201 refused, including those that are trimmed."""
    assert PROMPT.validate_python(" " * 100 + "a" + " " * 99) == "a"
    with pytest.raises(ValidationError, match="at most 200"):
        PROMPT.validate_python(" " * 100 + "a" + " " * 100)


@given(text=st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs"]), min_size=1, max_size=20))
@settings(max_examples=500, deadline=None)
def test_documented_pattern_matches_the_validation(text: str) -> None:
    """The pattern in the API's description matches the accepted prompts, and no refused ones."""
    try:
        accepted = bool(PROMPT.validate_python(text))
    except ValidationError:
        accepted = False
    described = re.search(PROMPT_PATTERN.removesuffix("$") + r"\Z", text) is not None
    # A pattern with all invisible characters would be too long.
    assert described == (accepted or (is_invisible(text) and trimmed(text) != "" and not _has_controls(text)))


def _has_controls(text: str) -> bool:
    return any(unicodedata.category(character) in {"Cc", "Zl", "Zp"} for character in text)
