"""SAM3Predictor: images and prompts in, instances out. Used by the server's runner and by Python callers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from PIL import Image

from sam3_runner.errors import DeviceUnavailable, InferenceFailed, ModelNotLoaded
from sam3_runner.images.decode import decode_image
from sam3_runner.images.decoded import MAX_STORED_PX, DecodedImage
from sam3_runner.images.image_file import DEFAULT_MAX_PIXELS
from sam3_runner.images.read import read_image_file
from sam3_runner.images.square import from_pillow
from sam3_runner.inference.device_errors import (
    device_works,
    out_of_memory_as,
    release_memory,
)
from sam3_runner.inference.loaded_model import Keeping, LoadedModel, ModelRequest
from sam3_runner.inference.pass_clock import PassClock
from sam3_runner.inference.passes import MAX_IMAGES
from sam3_runner.inference.precision import DTypeSetting, Precision, not_finite_message, precision_of
from sam3_runner.inference.staging import StagedImage, Stager
from sam3_runner.inference.warm_up import WARM_UP_PROMPTS, warm_up_squares
from sam3_runner.instances import SCORE_THRESHOLD, PredictResult, UnionResult
from sam3_runner.metrics import PRECISION_FALLBACKS
from sam3_runner.network.precision import set_precision
from sam3_runner.prompts import ConceptPrompt, PromptTokenizer
from sam3_runner.weights.checkpoint import DEFAULT_WEIGHTS_PATH, DEMO, Checkpoint, find_checkpoint
from sam3_runner.weights.load import load_network

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sam3_runner.inference.loaded_model import PairResult
    from sam3_runner.inference.precision import DType
    from sam3_runner.instances import Instance, Results
    from sam3_runner.network.model import SAM3Network
    from sam3_runner.prompts import Box
    from sam3_runner.weights.layouts import Layout

logger = logging.getLogger(__name__)

ImageSource = Image.Image | bytes | str | Path
"""An image as Python callers pass it."""

MAX_FEATURE_BYTES = {"cuda": 2 * 2**30, "cpu": 256 * 2**20}
"""By device: about 34 images of SAM 3."""

_FileVersion = tuple[int, int, int]


class SAM3Predictor:
    """SAM 3 for text prompts.

    Call `load` before anything else. Not safe for use from several threads at once, except on a CPU with
    `max_feature_bytes` 0.

    Args:
        weights_path: `sam3.pt`, a `.safetensors` file, a transformers folder, or `demo` for the embedded
            demo checkpoint. None: `weights/sam3.pt` if it exists, else the demo checkpoint, with a
            warning.
        device: `cuda`, `cpu`, or None for cuda if there is one.
        score_threshold: instances with a higher score are kept.
        dtype: of the large matrix products, as SAM3_DTYPE: `auto` is float16 on a GPU, with bfloat16 for
            requests that float16 overflows on, and float32 on a CPU; or a `Precision`. Scores, boxes and
            positions are float32 in each case.
        max_images: most images encoded at once; the memory of a GPU is taken for so many.
        max_feature_bytes: memory of the device for the features of images whose key is known, so that further
            prompts on them are not encoded again. None: `MAX_FEATURE_BYTES`.
        max_mask_bytes: of the masks of one prompt's instances; more are a MasksTooLarge. None: no limit.
    """

    def __init__(
        self,
        weights_path: str | None = None,
        device: str | None = None,
        *,
        score_threshold: float = SCORE_THRESHOLD,
        dtype: DTypeSetting | Precision = "auto",
        max_images: int = MAX_IMAGES,
        max_feature_bytes: int | None = 0,
        max_mask_bytes: int | None = None,
    ) -> None:
        self._weights_path = weights_path
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._precision = dtype if isinstance(dtype, Precision) else precision_of(dtype, self.device.type)
        self.score_threshold = score_threshold
        self._max_images = max_images
        self._max_feature_bytes = (
            MAX_FEATURE_BYTES[self.device.type] if max_feature_bytes is None else max_feature_bytes
        )
        self._max_mask_bytes = max_mask_bytes
        self._stager: Stager | None = None
        self.checkpoint: Checkpoint | None = None
        self.layout: Layout | None = None
        self._tokenizer: PromptTokenizer | None = None
        self._models: dict[DType, LoadedModel] = {}
        self._file_version: _FileVersion | None = None

    def load(self, report: Callable[[str], None] = lambda _: None) -> None:
        """Read the weights, move them to the device and prepare the passes.

        Args:
            report: is called with a sentence when a step begins that takes seconds.

        Raises:
            WeightsError: the weights cannot be read.
            DeviceUnavailable: there is no such device.
            DeviceFull: its memory is too full.
        """
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise DeviceUnavailable(
                "there is no CUDA GPU that torch can use: start with SAM3_DEVICE=cpu, or check nvidia-smi "
                "and that the container was given the GPU"
            )
        checkpoint = find_checkpoint(self._weights_path or _default_weights_path())
        self._tokenizer = PromptTokenizer(checkpoint.tokenizer_file)
        with out_of_memory_as(
            f"the memory of {self.device} is too full for the model: free it, or set SAM3_MAX_BATCH lower"
        ):
            self._models = {self.dtype: self._load_in(self.dtype, checkpoint, report=report)}
        self._file_version = _version_of(checkpoint.weights_file)
        self._stager = Stager(self.device, checkpoint.input_side_px)
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

    def predict(
        self,
        image: ImageSource,
        text_prompt: str | None = None,
        *,
        boxes: Sequence[Box] = (),
        labels: Sequence[bool] = (),
        score_threshold: float | None = None,
    ) -> PredictResult:
        """Every instance of a concept in `image`, masks at the image's size.

        The concept is given by a text, by boxes, or by both.

        Args:
            image: path or bytes of a PNG, JPEG or WEBP, which is read as the server reads it; or a Pillow
                image of any mode. An image that Pillow opened is processed as its file would be: EXIF
                orientation applied, transparency composited on white, colour profile converted.
            text_prompt: a noun phrase.
            boxes: exemplars, x0 y0 x1 y1 in px of the image as a viewer shows it; clipped to it.
            labels: of each box, True for an object of the concept, False for one that is not to be found.
                Empty: all are True.
            score_threshold: 0..1; None: that of the predictor.

        Raises:
            ModelNotLoaded: `load` was not called.
            PromptTooLong: more than 32 tokens.
            ValueError: neither text nor box, or a value out of its range.
            BoxOutsideImage: a box has no px of the image.
            UnsupportedImage: a file that the server would refuse.
            OSError: the path cannot be read.
        """
        labels = labels or [True] * len(boxes)
        prompt = ConceptPrompt(text_prompt, tuple(boxes), tuple(labels), score_threshold)
        return self.predict_batch(image, [prompt])[0]

    def predict_batch(
        self, image: ImageSource, prompts: Sequence[str | ConceptPrompt]
    ) -> list[PredictResult]:
        """One result per prompt, in their order; the image is encoded once. Raises as `predict`."""
        if self.checkpoint is None:
            raise ModelNotLoaded("call load() first")
        if not prompts:
            return []
        decoded = _decoded(image, self.checkpoint.input_side_px, self.max_stored_px)
        concepts = [ConceptPrompt(each) if isinstance(each, str) else each for each in prompts]
        return self.segment([(decoded, concepts)])[0]

    @property
    def max_stored_px(self) -> int:
        """Images of so many px are resized on the device; 0 on a CPU, where the resize is Pillow's."""
        return MAX_STORED_PX if self.device.type == "cuda" else 0

    def stage(self, image: DecodedImage) -> StagedImage:
        """Move an image to the device, as its square. May run in any thread, beside a pass.

        Raises:
            ModelNotLoaded: `load` was not called.
            OSError: the process that holds the pixels is gone.
        """
        if self._stager is None:
            raise ModelNotLoaded("call load() first")
        return self._stager.stage(image)

    def holds(self, key: str | None) -> bool:
        """Whether the features of the image with this key are held, so that a pass needs no pixels of it."""
        return key is not None and key in self._model_in(self.dtype).features

    def segment(
        self,
        requests: Sequence[tuple[DecodedImage | StagedImage, Sequence[ConceptPrompt]]],
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
            BoxOutsideImage: a box has no px of its image.
            InferenceFailed: an output is not finite.
            FeaturesNotHeld: an image has a key, but no pixels, and its features are not held.
            torch.OutOfMemoryError, RuntimeError: one pair alone does not fit, or the device has failed.
        """
        return cast(
            "list[list[PredictResult]]",
            self.segment_mixed(requests, [True] * len(requests), clock, log_ids=log_ids),
        )

    def segment_united(
        self,
        requests: Sequence[tuple[DecodedImage | StagedImage, Sequence[ConceptPrompt]]],
        clock: PassClock | None = None,
        *,
        log_ids: Sequence[Mapping[str, str]] = (),
    ) -> list[list[UnionResult]]:
        """As `segment`, with the union of each prompt's masks in place of each mask: less to transfer."""
        return cast(
            "list[list[UnionResult]]",
            self.segment_mixed(requests, [False] * len(requests), clock, log_ids=log_ids),
        )

    def segment_mixed(
        self,
        requests: Sequence[tuple[DecodedImage | StagedImage, Sequence[ConceptPrompt]]],
        with_masks: Sequence[bool],
        clock: PassClock | None = None,
        *,
        log_ids: Sequence[Mapping[str, str]] = (),
    ) -> list[Results]:
        """As `segment` for the requests `with_masks`, and as `segment_united` for the others, in one pass."""
        staged = [
            ModelRequest(image if isinstance(image, StagedImage) else self.stage(image), prompts, masks)
            for (image, prompts), masks in zip(requests, with_masks, strict=True)
        ]
        found = self._segment(staged, clock or PassClock(self.device), log_ids)
        return [_results(request, pairs) for request, pairs in zip(staged, found, strict=True)]

    def _segment(
        self, requests: list[ModelRequest], clock: PassClock, log_ids: Sequence[Mapping[str, str]]
    ) -> list[list[PairResult]]:
        """The results of each request; a second time in the fallback's precision where that is needed."""
        keeping = Keeping(self.score_threshold, max_mask_bytes=self._max_mask_bytes)
        dtype, fallback = self._precision.dtype, self._precision.fallback
        results = self._model_in(dtype).segment(requests, keeping, clock)
        overflowed = [row for row, result in enumerate(results) if result is None]
        if overflowed and fallback:
            for row in overflowed:
                PRECISION_FALLBACKS.inc()
                # The second pass needs the pixels; so do later requests for this image.
                self._model_in(dtype).features.remove(requests[row].image.key)
                logger.warning(
                    "the model's output is not finite in %s: running the request again in %s",
                    *(dtype, fallback),
                    extra=log_ids[row] if log_ids else None,
                )
            repeated = [requests[row] for row in overflowed]
            again = self._model_in(fallback).segment(repeated, keeping, clock)
            for row, result in zip(overflowed, again, strict=True):
                results[row] = result
        finite = [result for result in results if result is not None]
        if len(finite) < len(results):
            raise InferenceFailed(
                not_finite_message(fallback, after=dtype) if fallback else not_finite_message(dtype)
            )
        return finite

    def warm_up(self, images: int, report: Callable[[str], None] = lambda _: None) -> None:
        """Run the pass of a batch of `images` once, every part of the model included.

        A model whose output is not finite then runs in the fallback's precision from now on.

        Args:
            images: of the batch.
            report: as for `load`.

        Raises:
            InferenceFailed: the output is not finite, and there is no fallback, or none that helps.
        """
        assert self.checkpoint is not None
        squares = warm_up_squares(images, self.checkpoint.input_side_px)
        requests = [ModelRequest(self.stage(square), WARM_UP_PROMPTS, with_masks=False) for square in squares]
        keeping, clock = Keeping(self.score_threshold, best=True), PassClock(self.device)
        if None not in self._model_in(self.dtype).segment(requests, keeping, clock):
            return
        if self._precision.fallback is None:
            raise InferenceFailed(not_finite_message(self.dtype))
        logger.warning(
            "the model's output is not finite in %s: every request runs in %s; set SAM3_DTYPE=%s to start so",
            *(self.dtype, self._precision.fallback, self._precision.fallback),
        )
        del self._models[self.dtype]
        release_memory()
        self._precision = Precision(self._precision.fallback)
        self._models[self.dtype] = self._load_in(self.dtype, self.checkpoint, report=report)
        self.warm_up(images, report)

    def device_works(self) -> bool:
        """Whether the device still computes in this process; false after some errors of CUDA."""
        return device_works(self.device)

    def _model_in(self, dtype: DType) -> LoadedModel:
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
            # Not recorded: that takes seconds, in which no request is answered, and as much memory again.
            self._models[dtype] = self._load_in(dtype, self.checkpoint, recorded=False)
            logger.info("the model is loaded in %s too", dtype)
        return self._models[dtype]

    def _load_in(
        self,
        dtype: DType,
        checkpoint: Checkpoint,
        *,
        recorded: bool | None = None,
        report: Callable[[str], None] = lambda _: None,
    ) -> LoadedModel:
        assert self._tokenizer is not None
        network, self.layout = load_network(checkpoint, self.device)
        set_precision(network, getattr(torch, dtype))
        return LoadedModel(
            network,
            self._tokenizer,
            self._max_images,
            # Not for the second precision: those requests are rare.
            max_feature_bytes=self._max_feature_bytes if dtype == self.dtype else 0,
            recorded=recorded,
            report=report,
        )


def _results(request: ModelRequest, pairs: list[PairResult]) -> Results:
    image = request.image
    if request.with_masks:
        return [
            PredictResult(
                prompt.model_text,
                pair.presence,
                image.width,
                image.height,
                cast("list[Instance]", pair.found.instances),
            )
            for prompt, pair in zip(request.prompts, pairs, strict=True)
        ]
    return [
        UnionResult(
            prompt.model_text,
            pair.presence,
            image.width,
            image.height,
            pair.found.instances,
            pair.found.union,
        )
        for prompt, pair in zip(request.prompts, pairs, strict=True)
    ]


def _version_of(path: Path) -> _FileVersion | None:
    """What changes when a file is written or replaced; None without a file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _decoded(image: ImageSource, side_px: int, max_stored_px: int) -> DecodedImage:
    if isinstance(image, Image.Image):
        return from_pillow(image, side_px, max_stored_px)
    data = image if isinstance(image, bytes) else Path(image).read_bytes()
    return decode_image(read_image_file(data, max_pixels=DEFAULT_MAX_PIXELS), side_px, max_stored_px)


def _default_weights_path() -> str:
    if Path(DEFAULT_WEIGHTS_PATH).exists():
        return DEFAULT_WEIGHTS_PATH
    logger.warning(
        "nothing at %s: loading the embedded demo checkpoint, which knows coloured shapes only",
        DEFAULT_WEIGHTS_PATH,
    )
    return DEMO
