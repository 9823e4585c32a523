"""Prompts: their limits, and the token ids of a text as in the official model. Does not import torch."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ftfy
import numpy as np
from tokenizers import Tokenizer

from sam3_runner.errors import BoxOutsideImage, PromptTooLong, WeightsError
from sam3_runner.invisible import trimmed

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in px of the image as a viewer shows it (EXIF orientation applied), not rounded."""

MAX_PROMPTS = 10
"""Of one request."""
MAX_PROMPT_CHARACTERS = 200
"""As sent, before both ends are stripped."""
CONTEXT_TOKENS = 32
"""Input length of the text encoder, start and end token included (`context_length` of SAM 3)."""
MAX_BOXES = 32
"""Exemplars of one prompt."""
VISUAL = "visual"
"""The text that the model reads for boxes alone, as in the official model."""


@dataclass(frozen=True, slots=True)
class ConceptPrompt:
    """What to find in one image: a text, exemplars, or both.

    Attributes:
        text: a noun phrase; None: boxes alone.
        boxes: exemplars, at most `MAX_BOXES`. They may stick out of the image; see `boxes_inside`.
        labels: one a box: True for an object of the concept, False for one that is not to be found.
        score_threshold: instances with a higher score are kept, 0..1; None: the predictor's threshold.

    Raises:
        ValueError: a value is out of its range; the message names the attribute.
    """

    text: str | None
    boxes: tuple[Box, ...] = ()
    labels: tuple[bool, ...] = ()
    score_threshold: float | None = None

    def __post_init__(self) -> None:
        if self.text is None and not self.boxes:
            raise ValueError("text is None and boxes is empty: give a text, a box, or both")
        if len(self.boxes) > MAX_BOXES:
            raise ValueError(f"boxes has {len(self.boxes)} boxes: at most {MAX_BOXES} are allowed")
        if len(self.labels) != len(self.boxes):
            raise ValueError(
                f"labels has {len(self.labels)} values for {len(self.boxes)} boxes: give one a box"
            )
        for index, box in enumerate(self.boxes):
            _check_box(box, f"boxes[{index}]")
        if self.score_threshold is not None and not 0.0 <= self.score_threshold <= 1.0:
            raise ValueError(f"score_threshold is {self.score_threshold}: it must be in 0..1")

    @property
    def model_text(self) -> str:
        """The text that the model reads."""
        return VISUAL if self.text is None else self.text

    def boxes_inside(self, width: int, height: int) -> tuple[Box, ...]:
        """The boxes, clipped to an image of `width` x `height` px.

        Raises:
            BoxOutsideImage: a box has no px of the image; the message names its index.
        """
        return tuple(_clipped(box, width, height, index) for index, box in enumerate(self.boxes))


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


def _check_box(box: Box, name: str) -> None:
    if not all(math.isfinite(side) for side in box):
        raise ValueError(f"{name} is {list(box)}: its four numbers must be finite")
    x0, y0, x1, y1 = box
    if x0 >= x1 or y0 >= y1:
        raise ValueError(f"{name} is {list(box)}: x0 must be less than x1, and y0 less than y1")


def _clipped(box: Box, width: int, height: int, index: int) -> Box:
    x0, y0, x1, y1 = box
    if x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:
        raise BoxOutsideImage(
            f"boxes[{index}] is {list(box)}, which has no px of an image of {width} x {height} px"
        )
    return max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))


def _check_tokens(tokens: int, name: str) -> None:
    if tokens > CONTEXT_TOKENS:
        raise PromptTooLong(f"{name} has {tokens} tokens; the model reads {CONTEXT_TOKENS}")
