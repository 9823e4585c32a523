"""Text prompts to token ids, as the official model reads them. Knows nothing of torch."""

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

CONTEXT_TOKENS = 32
"""Tokens that the text encoder reads, start and end token included (`context_length` of SAM 3)."""


@dataclass(frozen=True, slots=True)
class TokenIds:
    """T texts as the text encoder takes them: `ids` (T, 32) int64, `valid` (T, 32) bool."""

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
        self._pad = self._tokenizer.token_to_id("<|endoftext|>")

    def count(self, text: str) -> int:
        """Tokens of `text`, start and end token included."""
        return len(self._tokenizer.encode(_cleaned(text)).ids)

    def encode(self, texts: list[str]) -> TokenIds:
        """Encode `texts`, padded to 32 tokens; raises `PromptTooLong` for a text of more.

        The official model cuts longer texts silently; a caller is better told.
        """
        ids = np.full((len(texts), CONTEXT_TOKENS), self._pad, dtype=np.int64)
        valid = np.zeros((len(texts), CONTEXT_TOKENS), dtype=np.bool_)
        for row, encoding in enumerate(self._tokenizer.encode_batch([_cleaned(text) for text in texts])):
            tokens = len(encoding.ids)
            if tokens > CONTEXT_TOKENS:
                raise PromptTooLong(f"the prompt has {tokens} tokens; the model reads {CONTEXT_TOKENS}")
            ids[row, :tokens] = encoding.ids
            valid[row, :tokens] = True
        return TokenIds(ids=ids, valid=valid)


def clean_text(text: str) -> str:
    """Repair, unescape, collapse white space, lower: `_clean_lower` of the official tokenizer."""
    repaired = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(repaired.split()).lower()


def _cleaned(text: str) -> str:
    # The official model makes tokens of a zero-width space at an end, which came there by a paste.
    return clean_text(trimmed(text))
