"""Prompts to token ids, and their limits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sam3_runner import PromptTooLong, WeightsError
from sam3_runner.prompts import CONTEXT_TOKENS, PromptTokenizer, clean_text
from sam3_runner.weights.checkpoint import CLIP_TOKENIZER_FILE

if TYPE_CHECKING:
    from pathlib import Path

START, END = 49406, 49407
TOKENIZER = PromptTokenizer(CLIP_TOKENIZER_FILE)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        # Output of the official tokenizer (CLIP's).
        ("cat", [2368]),
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        ("red circle", [736, 7117]),
        ("yellow school bus", [4481, 1228, 2840]),
    ],
)
def test_ids(text: str, ids: list[int]) -> None:
    """Texts are encoded as CLIP's ids between a start and an end token, padded with the end token."""
    tokens = TOKENIZER.encode([text])
    length = len(ids) + 2
    assert tokens.ids[0].tolist() == [START, *ids, END] + [END] * (CONTEXT_TOKENS - length)
    assert tokens.valid[0].tolist() == [True] * length + [False] * (CONTEXT_TOKENS - length)
    assert TOKENIZER.count(text) == length


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("Red  Circle", "red circle"),
        ("  cat\u3000\n", "cat"),
        ("caf\u00c3\u00a9", "café"),
        ("cats &amp;amp; dogs", "cats & dogs"),
        ("\u201cquoted\u201d", '"quoted"'),
        ("ﬁre", "fire"),
        ("ＷＩＤＥ", "wide"),
    ],
)
def test_cleaning(text: str, cleaned: str) -> None:
    """Broken encodings, entities, unusual spaces, ligatures and capitals make no difference."""
    assert clean_text(text) == cleaned
    assert TOKENIZER.encode([text]).ids.tolist() == TOKENIZER.encode([cleaned]).ids.tolist()


@pytest.mark.parametrize(
    "text",
    [
        *("black\u00a0circle", "black\u202fcircle", "black\u3000circle", "\ufeffblack circle"),
        *("black circle\u200b", "\u200e black circle\u00ad\u3000"),
    ],
)
def test_invisible_characters_of_pasted_texts(text: str) -> None:
    """Spaces of other scripts, and invisible characters at the ends, do not change the ids."""
    assert TOKENIZER.encode([text]).ids.tolist() == TOKENIZER.encode(["black circle"]).ids.tolist()
    assert TOKENIZER.count(text) == TOKENIZER.count("black circle")


def test_thirty_two_tokens() -> None:
    """32 tokens, start and end included, are accepted; for one more the error has both numbers."""
    assert TOKENIZER.encode(["cat " * 30]).valid.all()
    with pytest.raises(PromptTooLong, match="33 tokens; the model reads 32"):
        TOKENIZER.encode(["cat", "cat " * 31])
    assert TOKENIZER.count("cat " * 31) == 33


def test_special_tokens_in_a_prompt() -> None:
    """A prompt that contains the special tokens is encoded, and `count` agrees."""
    tokens = TOKENIZER.encode(["<|startoftext|> cat <|endoftext|>"])
    assert tokens.valid[0].sum() == TOKENIZER.count("<|startoftext|> cat <|endoftext|>")


def test_many_texts_keep_their_rows() -> None:
    """Texts encoded together have the same ids as alone."""
    texts = ["cat", "a very long prompt with many words in it", "", "ring"]
    together = TOKENIZER.encode(texts)
    for row, text in enumerate(texts):
        assert together.ids[row].tolist() == TOKENIZER.encode([text]).ids[0].tolist()


@given(text=st.text(max_size=200))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_text(text: str) -> None:
    """Any text is encoded or too long, and `count` and `check_length` agree with `encode`."""
    tokens = TOKENIZER.count(text)
    if tokens <= CONTEXT_TOKENS:
        TOKENIZER.check_length(text)
        assert TOKENIZER.encode([text]).valid.sum() == tokens
    else:
        with pytest.raises(PromptTooLong):
            TOKENIZER.encode([text])
        with pytest.raises(PromptTooLong, match=f"^prompts.3: has {tokens} tokens"):
            TOKENIZER.check_length(text, name="prompts.3:")


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"version": "1.0"}'])
def test_broken_tokenizer(tmp_path: Path, content: str) -> None:
    """An invalid tokenizer.json is refused."""
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(WeightsError, match="is not a tokenizer"):
        PromptTokenizer(path)


def test_missing_tokenizer(tmp_path: Path) -> None:
    """A missing tokenizer.json is reported."""
    with pytest.raises(WeightsError, match="is missing"):
        PromptTokenizer(tmp_path / "tokenizer.json")
