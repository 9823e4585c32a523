"""Text prompts: their limits, and their token ids as in the official model. Does not import torch."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ftfy
import numpy as np
from tokenizers import Tokenizer

from sam3_runner.errors import PromptTooLong, WeightsError
from sam3_runner.invisible import trimmed

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

MAX_PROMPTS = 10
"""Of one request."""
MAX_PROMPT_CHARACTERS = 200
"""As sent, before both ends are stripped."""
CONTEXT_TOKENS = 32
"""Input length of the text encoder, start and end token included (`context_length` of SAM 3)."""


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Input of the text encoder for T texts: `ids` (T, 32) int64, `valid` (T, 32) bool."""

    ids: npt.NDArray[np.int64]
    valid: npt.NDArray[np.bool_]


class PromptTokenizer:
    """CLIP's byte-pair encoding, read from a `tokenizer.json`. Raises `WeightsError`."""

    def __init__(self, path: Path) -> None:
        try:
            self._tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise WeightsError(f"{path} is missing: the checkpoint has no tokenizer") from error
        except Exception as error:  # tokenizers raises bare Exception for any malformed file
            raise WeightsError(f"{path} is not a tokenizer: {error}") from error
        self._padding_id = self._tokenizer.token_to_id("<|endoftext|>")

    def count(self, text: str) -> int:
        """Tokens of `text`, start and end token included."""
        return len(self._tokenizer.encode(clean_prompt(text)).ids)

    def check_length(self, text: str, *, name: str = "the prompt") -> None:
        """Raise `PromptTooLong`, with `name` first, for a text of more than 32 tokens."""
        _check_tokens(self.count(text), name)

    def encode(self, texts: list[str]) -> TokenIds:
        """Encode `texts`, padded to 32 tokens.

        Raises:
            PromptTooLong: a text has more tokens. The official model truncates it without notice.
        """
        ids = np.full((len(texts), CONTEXT_TOKENS), self._padding_id, dtype=np.int64)
        valid = np.zeros((len(texts), CONTEXT_TOKENS), dtype=np.bool_)
        for row, encoding in enumerate(self._tokenizer.encode_batch([clean_prompt(text) for text in texts])):
            tokens = len(encoding.ids)
            _check_tokens(tokens, "the prompt")
            ids[row, :tokens] = encoding.ids
            valid[row, :tokens] = True
        return TokenIds(ids=ids, valid=valid)


def clean_text(text: str) -> str:
    """Repair, unescape, collapse white space, lower: `_clean_lower` of the official tokenizer."""
    repaired = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(repaired.split()).lower()


def clean_prompt(text: str) -> str:
    """The text that the model reads: `clean_text`, without invisible marks at the ends.

    The official model encodes a zero-width space at an end as tokens; pasted texts often have one.
    """
    return clean_text(trimmed(text))


def _check_tokens(tokens: int, name: str) -> None:
    if tokens > CONTEXT_TOKENS:
        raise PromptTooLong(f"{name} has {tokens} tokens; the model reads {CONTEXT_TOKENS}")
