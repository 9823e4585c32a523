"""SAM3Predictor: images and prompts in, instances out. Used by the server's runner and by Python callers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from sam3_runner.errors import DeviceUnavailable, InferenceFailed, ModelNotLoaded
from sam3_runner.images.decode import decode_square
from sam3_runner.images.image_file import DEFAULT_MAX_PIXELS
from sam3_runner.images.read import read_image_file
from sam3_runner.images.square import SquareImage, to_square
from sam3_runner.inference.device_errors import (
    device_works,
    out_of_memory_as,
    release_memory,
)
from sam3_runner.inference.loaded_model import Keeping, LoadedModel
from sam3_runner.inference.pass_clock import PassClock
from sam3_runner.inference.passes import MAX_IMAGES
from sam3_runner.inference.precision import DTypeSetting, Precision, not_finite_message, precision_of
from sam3_runner.inference.warm_up import WARM_UP_PROMPTS, warm_up_squares
from sam3_runner.instances import SCORE_THRESHOLD, PredictResult
from sam3_runner.metrics import PRECISION_FALLBACKS
from sam3_runner.network.precision import set_precision
from sam3_runner.prompts import PromptTokenizer
from sam3_runner.weights.checkpoint import DEFAULT_WEIGHTS_PATH, DEMO, Checkpoint, find_checkpoint
from sam3_runner.weights.load import load_network

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sam3_runner.inference.precision import DType
    from sam3_runner.network.model import SAM3Network
    from sam3_runner.weights.layouts import Layout

logger = logging.getLogger(__name__)

ImageSource = Image.Image | bytes | str | Path
"""An image as Python callers pass it."""

_FileVersion = tuple[int, int, int]


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
        max_images: most images encoded at once; the memory of a GPU is taken for so many.
    """

    def __init__(
        self,
        weights_path: str | None = None,
        device: str | None = None,
        *,
        score_threshold: float = SCORE_THRESHOLD,
        dtype: DTypeSetting | Precision = "auto",
        max_images: int = MAX_IMAGES,
    ) -> None:
        self._weights_path = weights_path
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._precision = dtype if isinstance(dtype, Precision) else precision_of(dtype, self.device.type)
        self.score_threshold = score_threshold
        self._max_images = max_images
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
        clock, keeping = clock or PassClock(self.device), Keeping(self.score_threshold)
        dtype, fallback = self._precision.dtype, self._precision.fallback
        results = self._model_in(dtype).segment(requests, keeping, clock)
        overflowed = [row for row, result in enumerate(results) if result is None]
        if overflowed and fallback:
            for row in overflowed:
                PRECISION_FALLBACKS.inc()
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
        requests = [(square, WARM_UP_PROMPTS) for square in squares]
        keeping = Keeping(self.score_threshold, best=True)
        if None not in self._model_in(self.dtype).segment(requests, keeping, PassClock(self.device)):
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
        return LoadedModel(network, self._tokenizer, self._max_images, recorded=recorded, report=report)

    def _check_sides(self, squares: list[SquareImage]) -> None:
        """Refuse other sizes than the model's own: it would run, and its results would be wrong."""
        assert self.checkpoint is not None
        side_px = self.checkpoint.input_side_px
        for square in squares:
            if square.pixels.shape != (side_px, side_px, 3):
                raise InferenceFailed(f"the image is {square.pixels.shape}; the model takes {side_px} px")


def _version_of(path: Path) -> _FileVersion | None:
    """What changes when a file is written or replaced; None without a file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


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
