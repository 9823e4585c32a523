"""Encoded prompts, kept for later passes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

import torch

from sam3_runner.metrics import TEXTS
from sam3_runner.network.model import TextFeatures

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sam3_runner.inference.pass_clock import PassClock
    from sam3_runner.inference.passes import Passes
    from sam3_runner.prompts import PromptTokenizer

CACHED_TEXTS = 1024
"""Encoded prompts in the cache: 32 KB each at full size."""


class TextCache:
    """Features of prompts by their cleaned text; the least recently used are removed. Safe for threads.

    Args:
        passes: encode the texts.
        tokenizer: of the checkpoint.
    """

    def __init__(self, passes: Passes, tokenizer: PromptTokenizer) -> None:
        self._passes = passes
        self._tokenizer = tokenizer
        self._features: OrderedDict[str, TextFeatures] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._features)

    def __contains__(self, cleaned: str) -> bool:
        return cleaned in self._features

    def features(self, texts: Mapping[str, str], clock: PassClock) -> TextFeatures:
        """Features of distinct texts, in their order; only those that are not cached are encoded.

        Args:
            texts: a prompt by its cleaned text.
            clock: records the time of encoding.

        Raises:
            PromptTooLong: a prompt has more than 32 tokens.
        """
        with self._lock:
            misses = [cleaned for cleaned in texts if cleaned not in self._features]
            TEXTS.labels("hit").inc(len(texts) - len(misses))
            TEXTS.labels("miss").inc(len(misses))
            if misses:
                self._encode(misses, [texts[cleaned] for cleaned in misses], clock)
            for cleaned in texts:
                self._features.move_to_end(cleaned)
            rows = [self._features[cleaned] for cleaned in texts]
            while len(self._features) > CACHED_TEXTS:
                self._features.popitem(last=False)
        return TextFeatures(
            tokens=torch.stack([row.tokens for row in rows]), valid=torch.stack([row.valid for row in rows])
        )

    def _encode(self, cleaned: list[str], prompts: list[str], clock: PassClock) -> None:
        tokens = self._tokenizer.encode(prompts)
        ids, valid = torch.from_numpy(tokens.ids), torch.from_numpy(tokens.valid)
        most = self._passes.max_texts
        for start in range(0, len(cleaned), most):
            part = slice(start, start + most)
            with clock.stage("encode_text"):
                encoded = self._passes.encode_texts(ids[part], valid[part])
            for row, text in enumerate(cleaned[part]):
                # Clones: a view would keep the whole batch in memory.
                self._features[text] = TextFeatures(encoded.tokens[row].clone(), encoded.valid[row].clone())
