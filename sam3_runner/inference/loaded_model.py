"""The model in one precision on a device: requests in, the results of one pass out."""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from sam3_runner.errors import FeaturesNotHeld
from sam3_runner.inference.device_errors import is_out_of_memory, release_memory
from sam3_runner.inference.features import FeatureCache, ImageRow, count_features, gather, rows_of
from sam3_runner.inference.fitting_size import FittingSize
from sam3_runner.inference.kernel_support import find_supported_steps
from sam3_runner.inference.passes import Passes
from sam3_runner.inference.texts import TextCache
from sam3_runner.masks.draw import Found, KeptMasks, find_instances
from sam3_runner.masks.windows import Size
from sam3_runner.network.masks import mask_logits
from sam3_runner.prompts import MAX_BOXES, clean_prompt

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt
    from torch import Tensor

    from sam3_runner.inference.pass_clock import PassClock
    from sam3_runner.inference.passes import Decoded
    from sam3_runner.inference.staging import StagedImage
    from sam3_runner.network.model import SAM3Network, TextFeatures
    from sam3_runner.prompts import ConceptPrompt, PromptTokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Keeping:
    """Which queries are kept.

    Attributes:
        score_threshold: those with a higher score, of pairs without a threshold of their own.
        best: the best query of each pair too, whatever its score: for the passes before the server is ready.
        max_mask_bytes: of the masks of one pair's instances; more are a MasksTooLarge.
    """

    score_threshold: float
    best: bool = False
    max_mask_bytes: int | None = None

    def of(
        self, scores: npt.NDArray[np.float32], thresholds: Sequence[float | None]
    ) -> npt.NDArray[np.bool_]:
        """(P, Q) bool of scores (P, Q) and P thresholds. A score that is not finite is not kept."""
        limits = [self.score_threshold if each is None else each for each in thresholds]
        kept: npt.NDArray[np.bool_] = scores > np.array(limits, dtype=np.float32)[:, None]
        return kept | (scores >= scores.max(axis=1, keepdims=True)) if self.best else kept


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """One image with its prompts; `with_masks`: the results hold each mask, in place of their union."""

    image: StagedImage
    prompts: Sequence[ConceptPrompt]
    with_masks: bool


@dataclass(frozen=True, slots=True)
class PairResult:
    """What was found for one (image, prompt) pair; presence is the probability that the concept is there."""

    presence: float
    found: Found


NOTHING = Found([], None, is_finite=True)


class _BoxRows(NamedTuple):
    """The boxes of a prompt, with padding: (32, 4) fp32 cx cy w h in 0..1, (32,) bool and (32,) bool."""

    boxes: npt.NDArray[np.float32]
    labels: npt.NDArray[np.bool_]
    valid: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class _Pair:
    """A prompt of a request: its image, the features of this, and the row of its text in theirs.

    `boxes` is None for a prompt of text alone. All pairs of a pass have boxes, or none.
    """

    staged: StagedImage
    features: ImageRow
    text: int
    boxes: _BoxRows | None
    score_threshold: float | None
    with_masks: bool


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
    """The passes of a network, and the texts that it has encoded.

    Used by one thread at a time; on a CPU and without features to keep, by several at once.

    Args:
        network: on its device, in its precision.
        tokenizer: of the checkpoint.
        max_images: most images encoded at once.
        max_feature_bytes: memory for the features of images whose key is known.
        recorded: as for `Passes`.
        report: as for `Passes`.
    """

    def __init__(
        self,
        network: SAM3Network,
        tokenizer: PromptTokenizer,
        max_images: int,
        *,
        max_feature_bytes: int = 0,
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
        self.features = FeatureCache(max_feature_bytes, copies=network.position.is_cuda)
        self._pairs_at_once = FittingSize(self._passes.max_pairs)

    @torch.inference_mode()
    def segment(
        self,
        requests: Sequence[ModelRequest],
        keeping: Keeping,
        clock: PassClock,
    ) -> list[list[PairResult] | None]:
        """The results of each request; None where the output of one of its pairs is not finite.

        Images are encoded together unless their features are held, each distinct text once, and pairs are
        decoded together, each as many as a pass takes.
        """
        most = self._passes.max_images
        return [
            result
            for start in range(0, len(requests), most)
            for result in self._segment(requests[start : start + most], keeping, clock)
        ]

    def _segment(
        self,
        requests: Sequence[ModelRequest],
        keeping: Keeping,
        clock: PassClock,
    ) -> list[list[PairResult] | None]:
        boxes = [[_box_rows(prompt, request.image) for prompt in request.prompts] for request in requests]
        texts: dict[str, str] = {}
        for request in requests:
            texts |= {clean_prompt(prompt.model_text): prompt.model_text for prompt in request.prompts}
        text_rows = {cleaned: row for row, cleaned in enumerate(texts)}
        with clock.stage("encode_image"):
            features = self._features([request.image for request in requests])
        pairs = [
            _Pair(
                request.image,
                image,
                text_rows[clean_prompt(prompt.model_text)],
                of_prompt,
                prompt.score_threshold,
                request.with_masks,
            )
            for image, request, of_request in zip(features, requests, boxes, strict=True)
            for prompt, of_prompt in zip(request.prompts, of_request, strict=True)
        ]
        encoded_texts = self.texts.features(texts, clock)
        # Pairs with boxes have a step of their own.
        without, having = (
            [pair for pair in pairs if (pair.boxes is not None) == has_boxes] for has_boxes in (False, True)
        )
        found = {
            id(pair): result
            for part in (without, having)
            for pair, result in zip(part, self._decode_all(encoded_texts, part, keeping, clock), strict=True)
        }
        results = iter([found[id(pair)] for pair in pairs])
        by_request = [[next(results) for _ in request.prompts] for request in requests]
        return [found if all(result.found.is_finite for result in found) else None for found in by_request]

    def _features(self, images: Sequence[StagedImage]) -> list[ImageRow]:
        """The features of each image; images with one key are encoded once, now or in an earlier pass."""
        held = {image.key: self.features.find(image.key) for image in images}
        misses: dict[object, StagedImage] = {}
        for image in images:
            key = image.key or id(image)
            # The pixels of one request serve the others with the same key, which may have none.
            if held[image.key] is None and (key not in misses or misses[key].square is None):
                misses[key] = image
        encoded: dict[object, ImageRow] = {}
        remaining = iter(misses.items())
        for part in self._passes.image_parts(len(misses)) if misses else ():
            new = list(itertools.islice(remaining, part))
            batch = self._passes.encode_images(_squares([image for _, image in new]))
            encoded |= {
                key: self.features.keep(image.key, ImageRow(batch, row))
                for row, (key, image) in enumerate(new)
            }
        count_features(hits=len(images) - len(misses), misses=len(misses))
        return [held[image.key] or encoded[image.key or id(image)] for image in images]

    def _decode_all(
        self,
        texts: TextFeatures,
        pairs: list[_Pair],
        keeping: Keeping,
        clock: PassClock,
    ) -> list[PairResult]:
        """Decode as many pairs at once as fit in the memory. Raises when one alone does not fit."""
        results: list[PairResult] = []
        most = limit = self._pairs_at_once.current
        while len(results) < len(pairs):
            with_boxes = pairs[0].boxes is not None
            size = self._passes.pairs_at_once(min(most, len(pairs) - len(results)), with_boxes=with_boxes)
            chunk = pairs[len(results) : len(results) + size]
            try:
                with clock.stage("decode_prompts"):
                    decoded = self._decode(texts, chunk)
                with clock.stage("draw_masks"):  # a label of the metrics
                    results += self._results(decoded, chunk, keeping)
                continue
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                had_features = self.features.clear()
                if len(chunk) == 1 and not had_features:
                    raise
            # Outside of the handler, whose error holds the tensors of the failed pass.
            release_memory()
            if not had_features:
                most = len(chunk) // 2
        if most < limit:
            logger.warning("%d pairs are decoded at once: more do not fit in the memory", most)
            self._pairs_at_once.reduce_to(most)
        return results

    def _decode(self, texts: TextFeatures, pairs: list[_Pair]) -> Decoded:
        images, text_rows = [pair.features for pair in pairs], [pair.text for pair in pairs]
        boxes = [pair.boxes for pair in pairs if pair.boxes is not None]
        if boxes:
            return self._passes.decode_with_boxes(
                gather(images, lambda features: features.attended),
                gather(images, lambda features: features.coarse),
                rows_of(texts.tokens, text_rows),
                rows_of(texts.valid, text_rows),
                *(torch.from_numpy(np.stack(each)) for each in zip(*boxes, strict=True)),
            )
        return self._passes.decode(
            gather(images, lambda features: features.attended),
            gather(images, lambda features: features.geometry_token),
            rows_of(texts.tokens, text_rows),
            rows_of(texts.valid, text_rows),
        )

    def _results(self, decoded: Decoded, pairs: list[_Pair], keeping: Keeping) -> list[PairResult]:
        """The result of each pair; it is not finite where a score, a box or a mask is not."""
        summary = _on_host(decoded)
        instances = self._instances(decoded, summary, pairs, keeping)
        results: list[PairResult] = []
        for row in range(len(pairs)):
            found = instances.get(row, NOTHING)
            is_finite = found.is_finite and bool(summary.finite[row])
            results.append(PairResult(float(summary.presence[row]), found._replace(is_finite=is_finite)))
        return results

    def _instances(
        self, decoded: Decoded, summary: _Summary, pairs: list[_Pair], keeping: Keeping
    ) -> dict[int, Found]:
        """Instances by pair, for the pairs with a kept query; the mask head runs for these pairs only."""
        kept = keeping.of(summary.scores, [pair.score_threshold for pair in pairs])
        queries = {int(row): np.flatnonzero(kept[row]).tolist() for row in np.flatnonzero(kept.any(axis=1))}
        rows = list(queries)
        most = self._passes.max_mask_pairs if pairs[0].boxes is None else 1
        instances: dict[int, Found] = {}
        for start in range(0, len(rows), most):
            chunk = rows[start : start + most]
            found = find_instances(
                KeptMasks(
                    queries=[query for row in chunk for query in queries[row]],
                    scores=summary.scores[chunk][kept[chunk]],
                    boxes=summary.boxes[chunk][kept[chunk]],
                    logits=self._mask_logits(decoded, pairs, {row: queries[row] for row in chunk}),
                    counts=[len(queries[row]) for row in chunk],
                    sizes=[Size(pairs[row].staged.width, pairs[row].staged.height) for row in chunk],
                ),
                [pairs[row].with_masks for row in chunk],
                keeping.max_mask_bytes,
            )
            instances |= dict(zip(chunk, found, strict=True))
        return instances

    def _mask_logits(self, decoded: Decoded, pairs: list[_Pair], queries: dict[int, list[int]]) -> Tensor:
        """Logits (K, h, w) of the given queries by pair, those of the first pair first."""
        rows = list(queries)
        images = [pairs[row].features for row in rows]
        levels = range(len(images[0].batch.finer))
        features = self._passes.pixel_features(
            rows_of(decoded.fused, rows),
            rows_of(decoded.prompt, rows),
            rows_of(decoded.prompt_valid, rows),
            *(gather(images, lambda features, level=level: features.finer[level]) for level in levels),  # type: ignore[misc]
        )
        logits = []
        for (row, kept), pixels in zip(queries.items(), features, strict=True):
            index = torch.tensor(kept).to(pixels.device, non_blocking=True)
            logits.append(
                mask_logits(decoded.mask_factors[row, index], decoded.mask_offsets[row, index], pixels)
            )
        return torch.cat(logits)


def _box_rows(prompt: ConceptPrompt, image: StagedImage) -> _BoxRows | None:
    """The boxes of a prompt, in shares of its image; None where it has none. Raises BoxOutsideImage."""
    if not prompt.boxes:
        return None
    count = len(prompt.boxes)
    sides = np.array(prompt.boxes_inside(image.width, image.height), dtype=np.float64)
    sides /= (image.width, image.height) * 2
    rows = _BoxRows(
        np.zeros((MAX_BOXES, 4), np.float32), np.zeros(MAX_BOXES, bool), np.zeros(MAX_BOXES, bool)
    )
    rows.boxes[:count] = np.concatenate(
        ((sides[:, :2] + sides[:, 2:]) / 2, sides[:, 2:] - sides[:, :2]), axis=1
    )
    rows.labels[:count] = prompt.labels
    rows.valid[:count] = True
    return rows


def _squares(images: Sequence[StagedImage]) -> Tensor:
    """The images' squares (B, S, S, 3) uint8, on the device or on the host."""
    squares = [_square(image) for image in images]
    if len({square.device for square in squares}) > 1:
        # The device was full when some of them were staged.
        squares = [square.cpu() for square in squares]
    return torch.stack(squares)


def _square(image: StagedImage) -> Tensor:
    if image.square is None:
        raise FeaturesNotHeld("the features of this image are not held")
    return image.square


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
