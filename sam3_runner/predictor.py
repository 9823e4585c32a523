"""SAM3Predictor: images and prompts in, instances out. Used by the server's runner and by Python callers."""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass, field
from math import isnan, nan
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from sam3_runner.errors import DeviceUnavailable, InferenceFailed, ModelNotLoaded
from sam3_runner.images.decode import decode_square
from sam3_runner.images.image_file import DEFAULT_MAX_PIXELS
from sam3_runner.images.read import read_image_file
from sam3_runner.images.square import SquareImage, to_square
from sam3_runner.inference.device_errors import (
    device_works,
    is_out_of_memory,
    out_of_memory_as,
    release_memory,
)
from sam3_runner.inference.fitting_size import FittingSize
from sam3_runner.inference.masks import to_instances
from sam3_runner.inference.pass_clock import PassClock
from sam3_runner.inference.precision import DTypeSetting, Precision, not_finite_message, precision_of
from sam3_runner.inference.warm_up import WARM_UP_PROMPTS, warm_up_squares
from sam3_runner.instances import SCORE_THRESHOLD, Instance, PredictResult
from sam3_runner.metrics import PRECISION_FALLBACKS, TEXTS
from sam3_runner.network.masks import mask_logits
from sam3_runner.network.model import SAM3Network, TextFeatures
from sam3_runner.network.precision import set_precision
from sam3_runner.prompts import PromptTokenizer, clean_prompt
from sam3_runner.weights.checkpoint import DEFAULT_WEIGHTS_PATH, DEMO, Checkpoint, find_checkpoint
from sam3_runner.weights.load import load_network

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from sam3_runner.inference.precision import DType
    from sam3_runner.network.model import Detections, ImageFeatures
    from sam3_runner.weights.layouts import Layout

logger = logging.getLogger(__name__)

ImageSource = Image.Image | bytes | str | Path
"""An image as Python callers pass it."""

PAIRS_PER_PASS = 16
"""(image, prompt) pairs decoded at once; bounds the memory of the fusion encoder."""

MASK_PAIRS_PER_PASS = 4
"""Pairs whose pixel features are in memory at once: 4g x 4g x D fp32 each, 85 MB at SAM 3's full size."""

CACHED_TEXTS = 1024
"""Encoded prompts in the cache of a precision: 16 to 32 KB each at full size."""


_FileVersion = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class _LoadedModel:
    """The model in one precision, and the texts that it has encoded: (L, D) tokens and (L,) valid of each."""

    network: SAM3Network
    texts: OrderedDict[str, tuple[Tensor, Tensor]] = field(default_factory=OrderedDict)


@dataclass(frozen=True, slots=True)
class _Pair:
    """A prompt of a request, and the rows of its image and its text in their features."""

    prompt: str
    image: int
    text: int


class SAM3Predictor:
    """SAM 3 for text prompts.

    Call `load` before anything else. Not safe for use from several threads at once.

    Args:
        weights_path: `sam3.pt`, a `.safetensors` file, a transformers folder, or `demo` for the embedded
            demo checkpoint. None: `weights/sam3.pt` if it exists, else the demo checkpoint, with a
            warning.
        device: `cuda`, `cpu`, or None for cuda if there is one.
        score_threshold: instances with a higher score are kept.
        dtype: of the large matrix products, as SAM3_DTYPE: `auto` is float16 on a GPU, with bfloat16 for
            requests that float16 overflows on, and float32 on a CPU; or a `Precision`. Scores, boxes and
            positions are float32 in each case.
    """

    def __init__(
        self,
        weights_path: str | None = None,
        device: str | None = None,
        *,
        score_threshold: float = SCORE_THRESHOLD,
        dtype: DTypeSetting | Precision = "auto",
    ) -> None:
        self._weights_path = weights_path
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._precision = dtype if isinstance(dtype, Precision) else precision_of(dtype, self.device.type)
        self.score_threshold = score_threshold
        self.checkpoint: Checkpoint | None = None
        self.layout: Layout | None = None
        self._tokenizer: PromptTokenizer | None = None
        self._models: dict[DType, _LoadedModel] = {}
        self._file_version: _FileVersion | None = None
        self._pairs_per_pass = FittingSize(PAIRS_PER_PASS)
        self._keeps_best = False
        self._clock = PassClock(torch.device("cpu"))

    def load(self) -> None:
        """Read the weights and move them to the device. Raises `WeightsError`, `DeviceUnavailable`."""
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise DeviceUnavailable(
                "there is no CUDA GPU that torch can use: start with SAM3_DEVICE=cpu, or check nvidia-smi "
                "and that the container was given the GPU"
            )
        checkpoint = find_checkpoint(self._weights_path or _default_weights_path())
        self._tokenizer = PromptTokenizer(checkpoint.tokenizer_file)
        with out_of_memory_as(f"the memory of {self.device} is too full for the model: free it"):
            self._models = {self.dtype: self._load_in(self.dtype, checkpoint)}
        self._file_version = _version_of(checkpoint.weights_file)
        self.checkpoint = checkpoint

    @property
    def dtype(self) -> DType:
        """The precision of the next pass."""
        return self._precision.dtype

    @property
    def parameters(self) -> int:
        """Number of weights of the loaded model."""
        return sum(parameter.numel() for parameter in self._network.parameters())

    @property
    def _network(self) -> SAM3Network:
        """The network of the next pass."""
        return self._model_in(self.dtype).network

    def predict(self, image: ImageSource, text_prompt: str) -> PredictResult:
        """Every instance of `text_prompt` in `image`, masks at the image's size.

        Args:
            image: path or bytes of a PNG, JPEG or WEBP, which is read as the server reads it; or a Pillow
                image of any mode. An image that Pillow opened is processed as its file would be: EXIF
                orientation applied, transparency composited on white, colour profile converted.
            text_prompt: a noun phrase.

        Raises:
            ModelNotLoaded: `load` was not called.
            PromptTooLong: more than 32 tokens.
            UnsupportedImage: a file that the server would refuse.
            OSError: the path cannot be read.
        """
        return self.predict_batch(image, [text_prompt])[0]

    def predict_batch(self, image: ImageSource, prompts: Sequence[str]) -> list[PredictResult]:
        """One result per prompt, in their order; the image is encoded once. Raises as `predict`."""
        if self.checkpoint is None:
            raise ModelNotLoaded("call load() first")
        if not prompts:
            return []
        square = _to_square(image, self.checkpoint.input_side_px)
        return self.segment([(square, prompts)])[0]

    def segment(
        self,
        requests: Sequence[tuple[SquareImage, Sequence[str]]],
        clock: PassClock | None = None,
        *,
        log_ids: Sequence[Mapping[str, str]] = (),
    ) -> list[list[PredictResult]]:
        """Several images at once, each with its own prompts: one list of results per image.

        The images are encoded in one pass, each distinct text once, and the pairs are decoded together.
        Requests whose output is not finite run again in the fallback's precision, if there is one.

        Args:
            requests: images and prompts.
            clock: records the times of the stages.
            log_ids: of each request, fields of the log line about its second pass.

        Raises:
            ModelNotLoaded: `load` was not called.
            PromptTooLong: a prompt has more than 32 tokens.
            InferenceFailed: an image has another side than the model's, or an output is not finite.
            torch.OutOfMemoryError, RuntimeError: one pair alone does not fit, or the device has failed.
        """
        if self.checkpoint is None:
            raise ModelNotLoaded("call load() first")
        self._check_sides([square for square, _ in requests])
        self._clock = clock or PassClock(self.device)
        dtype, fallback = self._precision.dtype, self._precision.fallback
        results = self._run_pass(self._model_in(dtype), requests)
        overflowed = [row for row, result in enumerate(results) if result is None]
        if overflowed and fallback:
            for row in overflowed:
                PRECISION_FALLBACKS.inc()
                logger.warning(
                    "the model's output is not finite in %s: running the request again in %s",
                    *(dtype, fallback),
                    extra=log_ids[row] if log_ids else None,
                )
            again = self._run_pass(self._model_in(fallback), [requests[row] for row in overflowed])
            for row, result in zip(overflowed, again, strict=True):
                results[row] = result
        finite = [result for result in results if result is not None]
        if len(finite) < len(results):
            raise InferenceFailed(
                not_finite_message(fallback, after=dtype) if fallback else not_finite_message(dtype)
            )
        return finite

    def warm_up(self, images: int) -> None:
        """Run the pass of a batch of `images` once, every part of the model included.

        A model whose output is not finite then runs in the fallback's precision from now on.

        Raises:
            InferenceFailed: the output is not finite, and there is no fallback, or none that helps.
        """
        assert self.checkpoint is not None
        squares = warm_up_squares(images, self.checkpoint.input_side_px)
        requests = [(square, WARM_UP_PROMPTS) for square in squares]
        self._clock = PassClock(self.device)
        self._keeps_best = True
        try:
            if None not in self._run_pass(self._model_in(self.dtype), requests):
                return
        finally:
            self._keeps_best = False
        if self._precision.fallback is None:
            raise InferenceFailed(not_finite_message(self.dtype))
        logger.warning(
            "the model's output is not finite in %s: every request runs in %s; set SAM3_DTYPE=%s to start so",
            *(self.dtype, self._precision.fallback, self._precision.fallback),
        )
        del self._models[self.dtype]
        release_memory()
        self._precision = Precision(self._precision.fallback)
        self.warm_up(images)

    def device_works(self) -> bool:
        """Whether the device still computes in this process; false after some errors of CUDA."""
        return device_works(self.device)

    def _model_in(self, dtype: DType) -> _LoadedModel:
        """The model in a precision, loaded on its first use.

        Raises:
            ModelNotLoaded: `load` was not called.
            InferenceFailed: the file of the weights is no longer the one that `load` has read.
        """
        if self.checkpoint is None:
            raise ModelNotLoaded("call load() first")
        if dtype not in self._models:
            if _version_of(self.checkpoint.weights_file) != self._file_version:
                raise InferenceFailed(
                    f"the model is needed in {dtype}, but its weights were replaced on disk: restart the "
                    f"server, or set SAM3_DTYPE={dtype}"
                )
            self._models[dtype] = self._load_in(dtype, self.checkpoint)
            logger.info("the model is loaded in %s too", dtype)
        return self._models[dtype]

    def _load_in(self, dtype: DType, checkpoint: Checkpoint) -> _LoadedModel:
        network, self.layout = load_network(checkpoint, self.device)
        set_precision(network, getattr(torch, dtype))
        return _LoadedModel(network)

    @torch.inference_mode()
    def _run_pass(
        self, model: _LoadedModel, requests: Sequence[tuple[SquareImage, Sequence[str]]]
    ) -> list[list[PredictResult] | None]:
        """The results of each request; None where the output of one of its pairs is not finite."""
        with self._clock.stage("encode_image"):
            images = model.network.encode_image(self._pixels([square for square, _ in requests]))
        texts: dict[str, str] = {}
        for _, prompts in requests:
            texts |= {clean_prompt(prompt): prompt for prompt in prompts}
        text_rows = {cleaned: row for row, cleaned in enumerate(texts)}
        pairs = [
            _Pair(prompt, image, text_rows[clean_prompt(prompt)])
            for image, (_, prompts) in enumerate(requests)
            for prompt in prompts
        ]
        squares = [square for square, _ in requests]
        results = iter(self._decode_all(model, images, self._encode_texts(model, texts), pairs, squares))
        by_request = [[next(results) for _ in prompts] for _, prompts in requests]
        return [
            None if None in found else [result for result in found if result is not None]
            for found in by_request
        ]

    def _decode_all(
        self,
        model: _LoadedModel,
        images: ImageFeatures,
        text: TextFeatures,
        pairs: list[_Pair],
        squares: list[SquareImage],
    ) -> list[PredictResult | None]:
        """Decode as many pairs at once as fit in the memory. Raises when one alone does not fit."""
        results: list[PredictResult | None] = []
        most = limit = self._pairs_per_pass.current
        while len(results) < len(pairs):
            chunk = pairs[len(results) : len(results) + most]
            try:
                results += self._decode(model, images, text, chunk, squares)
                continue
            except RuntimeError as error:
                if len(chunk) == 1 or not is_out_of_memory(error):
                    raise
            # Outside of the handler, whose error holds the tensors of the failed pass.
            release_memory()
            most = len(chunk) // 2
        if most < limit:
            logger.warning("%d pairs are decoded at once: more do not fit in the memory", most)
            self._pairs_per_pass.reduce_to(most)
        return results

    def _decode(
        self,
        model: _LoadedModel,
        images: ImageFeatures,
        text: TextFeatures,
        pairs: list[_Pair],
        squares: list[SquareImage],
    ) -> list[PredictResult | None]:
        """The result of each pair; None where a score, a box or a mask is not finite."""
        image_index = self._index([pair.image for pair in pairs])
        text_index = self._index([pair.text for pair in pairs])
        with self._clock.stage("decode_prompts"):
            detections = model.network.decode(
                images.attended[image_index],
                images.geometry_token[image_index],
                text.tokens[text_index],
                text.valid[text_index],
            )
        with self._clock.stage("draw_masks"):  # a label of the metrics
            instances = self._kept_instances(
                model, images, detections, image_index, [squares[pair.image] for pair in pairs]
            )
        # One transfer: NaN where the pair has anything that is not finite.
        presences: list[float] = detections.presence.where(_are_finite(detections), nan).tolist()
        results: list[PredictResult | None] = []
        for row, (pair, presence) in enumerate(zip(pairs, presences, strict=True)):
            found, square = instances.get(row, []), squares[pair.image]
            if found is None or isnan(presence):
                results.append(None)
            else:
                results.append(PredictResult(pair.prompt, presence, square.width, square.height, found))
        return results

    def _kept_instances(
        self,
        model: _LoadedModel,
        images: ImageFeatures,
        detections: Detections,
        image_index: Tensor,
        squares: list[SquareImage],
    ) -> dict[int, list[Instance] | None]:
        """Instances by pair, for the pairs with a kept query; the mask head runs for these pairs only.

        None for a pair whose mask logits are not finite.
        """
        instances: dict[int, list[Instance] | None] = {}
        finite: list[Tensor] = []
        scores = detections.scores
        kept = scores > self.score_threshold
        if self._keeps_best:
            kept |= scores >= scores.amax(dim=1, keepdim=True)
        pairs: list[int] = kept.any(dim=1).nonzero().flatten().tolist()
        for start in range(0, len(pairs), MASK_PAIRS_PER_PASS):
            chunk = pairs[start : start + MASK_PAIRS_PER_PASS]
            index = self._index(chunk)
            features = model.network.pixel_features(
                detections.fused[index],
                detections.prompt[index],
                detections.prompt_valid[index],
                tuple(level[image_index[index]] for level in images.finer),
            )
            for row, pair in enumerate(chunk):
                queries = kept[pair].nonzero().flatten()
                factor, offset = model.network.mask_decoder.embed(detections.queries[-1][pair][queries])
                logits = mask_logits(factor, offset, features[row])
                finite.append(logits.isfinite().all())
                instances[pair] = to_instances(
                    queries,
                    scores[pair][queries],
                    detections.boxes[pair][queries],
                    logits,
                    width=squares[pair].width,
                    height=squares[pair].height,
                )
        if pairs:
            are_finite: list[bool] = torch.stack(finite).tolist()
            instances |= {
                pair: None for pair, is_finite in zip(pairs, are_finite, strict=True) if not is_finite
            }
        return instances

    def _encode_texts(self, model: _LoadedModel, texts: Mapping[str, str]) -> TextFeatures:
        """Features of distinct texts, in their order; from the cache where it has them.

        Args:
            model: in the precision of the pass.
            texts: a prompt by its cleaned text, which is its key in the cache.
        """
        assert self._tokenizer is not None
        cache = model.texts
        misses = [cleaned for cleaned in texts if cleaned not in cache]
        TEXTS.labels("hit").inc(len(texts) - len(misses))
        TEXTS.labels("miss").inc(len(misses))
        if misses:
            tokens = self._tokenizer.encode([texts[cleaned] for cleaned in misses])
            ids, valid = torch.from_numpy(tokens.ids), torch.from_numpy(tokens.valid)
            with self._clock.stage("encode_text"):
                encoded = model.network.encode_text(ids.to(self.device), valid.to(self.device))
            for row, cleaned in enumerate(misses):
                # Clones: a view would keep the whole batch in memory.
                cache[cleaned] = encoded.tokens[row].clone(), encoded.valid[row].clone()
        for cleaned in texts:
            cache.move_to_end(cleaned)
        rows = [cache[cleaned] for cleaned in texts]
        while len(cache) > CACHED_TEXTS:
            cache.popitem(last=False)
        return TextFeatures(
            tokens=torch.stack([tokens for tokens, _ in rows]),
            valid=torch.stack([valid for _, valid in rows]),
        )

    def _check_sides(self, squares: list[SquareImage]) -> None:
        """Refuse other sizes than the model's own: it would run, and its results would be wrong."""
        assert self.checkpoint is not None
        side_px = self.checkpoint.input_side_px
        for square in squares:
            if square.pixels.shape != (side_px, side_px, 3):
                raise InferenceFailed(f"the image is {square.pixels.shape}; the model takes {side_px} px")

    def _pixels(self, squares: list[SquareImage]) -> Tensor:
        """(B, 3, S, S) uint8 on the device, in one transfer."""
        stacked = torch.from_numpy(np.stack([square.pixels for square in squares]))
        return stacked.to(self.device).permute(0, 3, 1, 2)

    def _index(self, rows: list[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.long, device=self.device)


def _version_of(path: Path) -> _FileVersion | None:
    """What changes when a file is written or replaced; None without a file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _are_finite(detections: Detections) -> Tensor:
    """(P,) bool: the scores, the presence and the boxes of a pair are finite."""
    scores, boxes = detections.logits.isfinite(), detections.boxes.isfinite()
    return scores.all(dim=1) & boxes.flatten(1).all(dim=1) & detections.presence_logits.isfinite()


def _to_square(image: ImageSource, side_px: int) -> SquareImage:
    if isinstance(image, Image.Image):
        return to_square(image, side_px)
    data = image if isinstance(image, bytes) else Path(image).read_bytes()
    return decode_square(read_image_file(data, max_pixels=DEFAULT_MAX_PIXELS), side_px)


def _default_weights_path() -> str:
    if Path(DEFAULT_WEIGHTS_PATH).exists():
        return DEFAULT_WEIGHTS_PATH
    logger.warning(
        "nothing at %s: loading the embedded demo checkpoint, which knows coloured shapes only",
        DEFAULT_WEIGHTS_PATH,
    )
    return DEMO
