"""SAM3Predictor: images and prompts in, instances out. Used by the server's runner and by Python callers."""

from __future__ import annotations

import logging
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from PIL import Image

from sam3_runner.errors import DeviceUnavailable, InferenceFailed, ModelNotLoaded
from sam3_runner.images.decode import decode_square
from sam3_runner.images.image_file import DEFAULT_MAX_PIXELS
from sam3_runner.images.read import read_image_file
from sam3_runner.images.square import SquareImage, to_square
from sam3_runner.inference.masks import to_instances
from sam3_runner.inference.memory import out_of_memory_as
from sam3_runner.inference.pass_clock import PassClock
from sam3_runner.instances import SCORE_THRESHOLD, Instance, PredictResult
from sam3_runner.metrics import TEXTS
from sam3_runner.network.masks import mask_logits
from sam3_runner.network.model import SAM3Network, TextFeatures
from sam3_runner.network.precision import set_precision
from sam3_runner.prompts import PromptTokenizer
from sam3_runner.weights.checkpoint import DEFAULT_WEIGHTS_PATH, DEMO, Checkpoint, find_checkpoint
from sam3_runner.weights.load import load_network

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

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
"""Encoded prompts in the cache: 16 to 32 KB each at full size."""


class SAM3Predictor:
    """SAM 3 for text prompts.

    Call `load` before anything else. Not safe for use from several threads at once.

    Args:
        weights_path: `sam3.pt`, a `.safetensors` file, a transformers folder, or `demo` for the embedded
            demo checkpoint. None: `weights/sam3.pt` if it exists, else the demo checkpoint, with a
            warning.
        device: `cuda`, `cpu`, or None for cuda if there is one.
        score_threshold: instances with a higher score are kept.
        dtype: of the large matrix products; None for float16 on a GPU, float32 on a CPU. Scores, boxes
            and positions are float32 in either case.
    """

    def __init__(
        self,
        weights_path: str | None = None,
        device: str | None = None,
        *,
        score_threshold: float = SCORE_THRESHOLD,
        dtype: Literal["float16", "bfloat16", "float32"] | None = None,
    ) -> None:
        self._weights_path = weights_path
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = dtype or ("float16" if self.device.type == "cuda" else "float32")
        self.score_threshold = score_threshold
        self.checkpoint: Checkpoint | None = None
        self.layout: Layout | None = None
        self._network: SAM3Network | None = None
        self._tokenizer: PromptTokenizer | None = None
        self._text_cache: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()
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
            network, self.layout = load_network(checkpoint, self.device)
            set_precision(network, getattr(torch, self.dtype))
        self._network = network
        self.checkpoint = checkpoint

    @property
    def parameters(self) -> int:
        """Number of weights of the loaded model."""
        assert self._network is not None
        return sum(parameter.numel() for parameter in self._network.parameters())

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

    @torch.inference_mode()
    def segment(
        self, requests: Sequence[tuple[SquareImage, Sequence[str]]], clock: PassClock | None = None
    ) -> list[list[PredictResult]]:
        """Several images at once, each with its own prompts: one list of results per image.

        The images are encoded in one pass, each distinct text once, and the pairs are decoded together.

        Args:
            requests: images and prompts.
            clock: records the times of the stages.
        """
        if self._network is None:
            raise ModelNotLoaded("call load() first")
        self._check_sides([square for square, _ in requests])
        self._clock = clock or PassClock(self.device)
        with self._clock.stage("encode_image"):
            images = self._network.encode_image(self._pixels([square for square, _ in requests]))
        pairs = [(row, prompt) for row, (_, prompts) in enumerate(requests) for prompt in prompts]
        texts = list(dict.fromkeys(prompt for _, prompt in pairs))
        text = self._encode_texts(texts)
        results = [
            result
            for start in range(0, len(pairs), PAIRS_PER_PASS)
            for result in self._decode(images, text, texts, pairs[start : start + PAIRS_PER_PASS], requests)
        ]
        ordered = iter(results)
        return [[next(ordered) for _ in prompts] for _, prompts in requests]

    def _decode(
        self,
        images: ImageFeatures,
        text: TextFeatures,
        texts: list[str],
        pairs: list[tuple[int, str]],
        requests: Sequence[tuple[SquareImage, Sequence[str]]],
    ) -> list[PredictResult]:
        assert self._network is not None
        image_index = self._index([row for row, _ in pairs])
        text_index = self._index([texts.index(prompt) for _, prompt in pairs])
        with self._clock.stage("decode_prompts"):
            detections = self._network.decode(
                images.attended[image_index],
                images.geometry_token[image_index],
                text.tokens[text_index],
                text.valid[text_index],
            )
        squares = [requests[row][0] for row, _ in pairs]
        with self._clock.stage("draw_masks"):  # a label of the metrics
            instances = self._kept_instances(images, detections, image_index, squares)
        return [
            PredictResult(
                prompt=prompt,
                presence=presence,
                image_width=square.width,
                image_height=square.height,
                instances=instances.get(pair, []),
            )
            for pair, ((_, prompt), square, presence) in enumerate(
                zip(pairs, squares, detections.presence.tolist(), strict=True)
            )
        ]

    def _kept_instances(
        self, images: ImageFeatures, detections: Detections, image_index: Tensor, squares: list[SquareImage]
    ) -> dict[int, list[Instance]]:
        """Instances by pair, for the pairs with a kept query; the mask head runs for these pairs only."""
        assert self._network is not None
        instances: dict[int, list[Instance]] = {}
        scores = detections.scores
        kept = scores > self.score_threshold
        pairs: list[int] = kept.any(dim=1).nonzero().flatten().tolist()
        for start in range(0, len(pairs), MASK_PAIRS_PER_PASS):
            chunk = pairs[start : start + MASK_PAIRS_PER_PASS]
            index = self._index(chunk)
            features = self._network.pixel_features(
                detections.fused[index],
                detections.prompt[index],
                detections.prompt_valid[index],
                tuple(level[image_index[index]] for level in images.finer),
            )
            for row, pair in enumerate(chunk):
                queries = kept[pair].nonzero().flatten()
                factor, offset = self._network.mask_decoder.embed(detections.queries[-1][pair][queries])
                instances[pair] = to_instances(
                    queries,
                    scores[pair][queries],
                    detections.boxes[pair][queries],
                    mask_logits(factor, offset, features[row]),
                    width=squares[pair].width,
                    height=squares[pair].height,
                )
        return instances

    def _encode_texts(self, texts: list[str]) -> TextFeatures:
        """Features of distinct texts, in their order; from the cache where it has them."""
        assert self._tokenizer is not None
        assert self._network is not None
        misses = [text for text in texts if text not in self._text_cache]
        TEXTS.labels("hit").inc(len(texts) - len(misses))
        TEXTS.labels("miss").inc(len(misses))
        if misses:
            tokens = self._tokenizer.encode(misses)
            ids, valid = torch.from_numpy(tokens.ids), torch.from_numpy(tokens.valid)
            with self._clock.stage("encode_text"):
                encoded = self._network.encode_text(ids.to(self.device), valid.to(self.device))
            self._text_cache.update(zip(misses, zip(encoded.tokens, encoded.valid, strict=True), strict=True))
        for text in texts:
            self._text_cache.move_to_end(text)
        rows = [self._text_cache[text] for text in texts]
        while len(self._text_cache) > CACHED_TEXTS:
            self._text_cache.popitem(last=False)
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
