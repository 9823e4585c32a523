"""The model in one precision on a device: requests in, the results of one pass out."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from sam3_runner.inference.device_errors import is_out_of_memory, release_memory
from sam3_runner.inference.fitting_size import FittingSize
from sam3_runner.inference.kernel_support import find_supported_steps
from sam3_runner.inference.passes import Passes
from sam3_runner.inference.texts import TextCache
from sam3_runner.instances import Instance, PredictResult
from sam3_runner.masks.draw import KeptMasks, to_instances
from sam3_runner.network.masks import mask_logits
from sam3_runner.prompts import clean_prompt

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt
    from torch import Tensor

    from sam3_runner.images.square import SquareImage
    from sam3_runner.inference.pass_clock import PassClock
    from sam3_runner.inference.passes import Decoded
    from sam3_runner.network.model import ImageFeatures, SAM3Network, TextFeatures
    from sam3_runner.prompts import PromptTokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Keeping:
    """Which queries are kept.

    Attributes:
        score_threshold: those with a higher score.
        best: the best query of each pair too, whatever its score: for the passes before the server is ready.
    """

    score_threshold: float
    best: bool = False

    def of(self, scores: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        """(P, Q) bool of scores (P, Q). A score that is not finite is not kept."""
        kept: npt.NDArray[np.bool_] = scores > self.score_threshold
        return kept | (scores >= scores.max(axis=1, keepdims=True)) if self.best else kept


@dataclass(frozen=True, slots=True)
class _Pair:
    """A prompt of a request, its image, and the rows of its image and its text in their features."""

    prompt: str
    square: SquareImage
    image: int
    text: int


@dataclass(frozen=True, slots=True)
class _Summary:
    """`Decoded.summary` on the host, split.

    Attributes:
        presence: (P,).
        scores: (P, Q).
        boxes: (P, Q, 4).
        finite: (P,) bool, whether all of a pair's values are.
    """

    presence: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    boxes: npt.NDArray[np.float32]
    finite: npt.NDArray[np.bool_]


class LoadedModel:
    """The passes of a network, and the texts that it has encoded. Used by one thread at a time.

    Args:
        network: on its device, in its precision.
        tokenizer: of the checkpoint.
        max_images: most images encoded at once.
        recorded: as for `Passes`.
        report: as for `Passes`.
    """

    def __init__(
        self,
        network: SAM3Network,
        tokenizer: PromptTokenizer,
        max_images: int,
        *,
        recorded: bool | None = None,
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.network = network
        with torch.inference_mode():
            if network.position.is_cuda:
                report("the model's kernels are being compiled, which takes longer the first time")
                find_supported_steps(Passes(network, max_images, recorded=False).run_all)
                release_memory()
            self._passes = Passes(network, max_images, recorded=recorded, report=report)
        self.texts = TextCache(self._passes, tokenizer)
        self._pairs_at_once = FittingSize(self._passes.max_pairs)

    @torch.inference_mode()
    def segment(
        self, requests: Sequence[tuple[SquareImage, Sequence[str]]], keeping: Keeping, clock: PassClock
    ) -> list[list[PredictResult] | None]:
        """The results of each request; None where the output of one of its pairs is not finite.

        Images are encoded together, each distinct text once, and pairs are decoded together, each as many as
        a pass takes.
        """
        most = self._passes.max_images
        return [
            result
            for start in range(0, len(requests), most)
            for result in self._segment(requests[start : start + most], keeping, clock)
        ]

    def _segment(
        self, requests: Sequence[tuple[SquareImage, Sequence[str]]], keeping: Keeping, clock: PassClock
    ) -> list[list[PredictResult] | None]:
        texts: dict[str, str] = {}
        for _, prompts in requests:
            texts |= {clean_prompt(prompt): prompt for prompt in prompts}
        text_rows = {cleaned: row for row, cleaned in enumerate(texts)}
        pairs = [
            _Pair(prompt, square, image, text_rows[clean_prompt(prompt)])
            for image, (square, prompts) in enumerate(requests)
            for prompt in prompts
        ]
        with clock.stage("encode_image"):
            pixels = np.stack([square.pixels for square, _ in requests])
            images = self._passes.encode_images(torch.from_numpy(pixels))
        results = iter(self._decode_all(images, self.texts.features(texts, clock), pairs, keeping, clock))
        by_request = [[next(results) for _ in prompts] for _, prompts in requests]
        return [
            None if None in found else [result for result in found if result is not None]
            for found in by_request
        ]

    def _decode_all(
        self,
        images: ImageFeatures,
        texts: TextFeatures,
        pairs: list[_Pair],
        keeping: Keeping,
        clock: PassClock,
    ) -> list[PredictResult | None]:
        """Decode as many pairs at once as fit in the memory. Raises when one alone does not fit."""
        results: list[PredictResult | None] = []
        most = limit = self._pairs_at_once.current
        while len(results) < len(pairs):
            chunk = pairs[len(results) : len(results) + most]
            try:
                with clock.stage("decode_prompts"):
                    decoded = self._decode(images, texts, chunk)
                with clock.stage("draw_masks"):  # a label of the metrics
                    results += self._results(images, decoded, chunk, keeping)
                continue
            except RuntimeError as error:
                if len(chunk) == 1 or not is_out_of_memory(error):
                    raise
            # Outside of the handler, whose error holds the tensors of the failed pass.
            release_memory()
            most = len(chunk) // 2
        if most < limit:
            logger.warning("%d pairs are decoded at once: more do not fit in the memory", most)
            self._pairs_at_once.reduce_to(most)
        return results

    def _decode(self, images: ImageFeatures, texts: TextFeatures, pairs: list[_Pair]) -> Decoded:
        image_rows, text_rows = [pair.image for pair in pairs], [pair.text for pair in pairs]
        return self._passes.decode(
            rows_of(images.attended, image_rows),
            rows_of(images.geometry_token, image_rows),
            rows_of(texts.tokens, text_rows),
            rows_of(texts.valid, text_rows),
        )

    def _results(
        self, images: ImageFeatures, decoded: Decoded, pairs: list[_Pair], keeping: Keeping
    ) -> list[PredictResult | None]:
        """The result of each pair; None where a score, a box or a mask is not finite."""
        summary = _on_host(decoded)
        instances = self._instances(images, decoded, summary, pairs, keeping)
        results: list[PredictResult | None] = []
        for row, pair in enumerate(pairs):
            found = instances.get(row, [])
            if found is None or not summary.finite[row]:
                results.append(None)
                continue
            presence = float(summary.presence[row])
            results.append(PredictResult(pair.prompt, presence, pair.square.width, pair.square.height, found))
        return results

    def _instances(
        self,
        images: ImageFeatures,
        decoded: Decoded,
        summary: _Summary,
        pairs: list[_Pair],
        keeping: Keeping,
    ) -> dict[int, list[Instance] | None]:
        """Instances by pair, for the pairs with a kept query; the mask head runs for these pairs only.

        None for a pair whose mask logits are not finite.
        """
        kept = keeping.of(summary.scores)
        queries = {int(row): np.flatnonzero(kept[row]).tolist() for row in np.flatnonzero(kept.any(axis=1))}
        rows, most = list(queries), self._passes.max_mask_pairs
        instances: dict[int, list[Instance] | None] = {}
        for start in range(0, len(rows), most):
            chunk = rows[start : start + most]
            features = self._passes.pixel_features(
                rows_of(decoded.fused, chunk),
                rows_of(decoded.prompt, chunk),
                rows_of(decoded.prompt_valid, chunk),
                *(rows_of(level, [pairs[row].image for row in chunk]) for level in images.finer),
            )
            logits = []
            for row, pixels in zip(chunk, features, strict=True):
                index = _index(queries[row], pixels.device)
                factors, offsets = decoded.mask_factors[row, index], decoded.mask_offsets[row, index]
                logits.append(mask_logits(factors, offsets, pixels))
            found = to_instances(
                [query for row in chunk for query in queries[row]],
                summary.scores[chunk][kept[chunk]],
                summary.boxes[chunk][kept[chunk]],
                torch.cat(logits),
                [
                    KeptMasks(len(queries[row]), pairs[row].square.width, pairs[row].square.height)
                    for row in chunk
                ],
            )
            for row, pair in zip(chunk, found, strict=True):
                instances[row] = pair.instances if pair.is_finite else None
        return instances


def rows_of(tensor: Tensor, rows: list[int]) -> Tensor:
    """The given rows of a tensor (N, ...); a view where they follow each other.

    Rows of feature maps (N, D, h, w) keep their channels last.
    """
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return tensor[rows[0] : rows[0] + len(rows)]
    index = _index(rows, tensor.device)
    if tensor.ndim == 4:
        return tensor.movedim(1, 3).index_select(0, index).movedim(3, 1)
    return tensor.index_select(0, index)


def _index(rows: list[int], device: torch.device) -> Tensor:
    return torch.tensor(rows).to(device, non_blocking=True)


def _on_host(decoded: Decoded) -> _Summary:
    """The summary, in one transfer, which waits for the device."""
    values = decoded.summary.cpu().numpy()
    queries = decoded.mask_offsets.shape[1]
    return _Summary(
        presence=values[:, 0],
        scores=values[:, 1 : 1 + queries],
        boxes=values[:, 1 + queries :].reshape(len(values), queries, 4),
        finite=np.isfinite(values).all(axis=1),
    )
