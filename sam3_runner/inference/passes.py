"""The steps of a pass, as a device runs them best: eagerly on a CPU, as CUDA graphs on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from sam3_runner.inference.graphs import GraphedFunction
from sam3_runner.prompts import CONTEXT_TOKENS, MAX_BOXES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

    from sam3_runner.network.model import Detections, ImageFeatures, SAM3Network, TextFeatures

MAX_IMAGES = 8
MAX_TEXTS = 16
MAX_PAIRS = 16
"""Pairs decoded at once; bounds the memory of the fusion encoder."""
SEVERAL_PAIRS = 4
"""From so many on, some kernels are compiled in another variant."""
MAX_MASK_PAIRS = 4
"""Pairs whose pixel features are in memory at once: 4g x 4g x D each, 42 MB in fp16 at SAM 3's full size."""
BOX_PAIRS = (1, 4)
"""Numbers of pairs with boxes that are decoded at once. Each has `MAX_BOXES` boxes, with padding: one shape
for all of them needs few graphs. On an H100 such a pair takes 1 ms more than one without boxes."""
TEXT_PROMPT_TOKENS = CONTEXT_TOKENS + 1
"""Of a prompt without boxes; one with boxes has more, and steps of its own."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """What serving needs of P decoded pairs with Q queries each.

    Attributes:
        summary: (P, 1 + 5 Q) fp32: presence, then the scores, then the boxes x0 y0 x1 y1 in 0..1. One tensor,
            so that one transfer brings it to the host.
        mask_factors: (P, Q, D) fp32, see `MaskHead.embed`.
        mask_offsets: (P, Q) fp32.
        fused: (P, g * g, D), as `prompt` and `prompt_valid` an input of the mask head.
        prompt: (P, L + G, D) fp32.
        prompt_valid: (P, L + G) bool.
    """

    summary: Tensor
    mask_factors: Tensor
    mask_offsets: Tensor
    fused: Tensor
    prompt: Tensor
    prompt_valid: Tensor


class Passes:
    """The steps of a pass. Each takes at most so many rows; what it returns is valid until its next call.

    Args:
        network: in inference mode. On a GPU its functions are recorded as CUDA graphs here.
        max_images: most images of one pass.
        recorded: record them; None: where the device is a GPU.
        report: is called with a sentence when a step begins that takes seconds.

    Attributes:
        max_images, max_texts, max_pairs, max_mask_pairs: most rows of each step; of pairs with boxes only one
            at a time is given to the mask head. On a GPU whose memory is too full for a size, that size is
            left out.

    Raises:
        RuntimeError: torch's, of a full memory: there is no room for the smallest pass.
    """

    def __init__(
        self,
        network: SAM3Network,
        max_images: int = MAX_IMAGES,
        *,
        recorded: bool | None = None,
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        device, side_px = network.position.device, network.input_side_px
        if recorded is None:
            recorded = device.type == "cuda"
        step: Callable[..., Any]
        if recorded:
            report("the model's passes are being recorded")
            step = partial(GraphedFunction, pool=torch.cuda.graph_pool_handle())
        else:
            step = partial(EagerFunction, device=device)
        pixels = torch.zeros(1, side_px, side_px, 3, dtype=torch.uint8, device=device)
        ids = torch.zeros(1, CONTEXT_TOKENS, dtype=torch.long, device=device)

        self._example = (pixels, ids, ids == 0)
        self._encode_images = step(
            lambda pixels: network.encode_image(pixels.permute(0, 3, 1, 2)),
            lambda: self._example[:1],
            _sizes(max_images),
        )
        self._encode_texts = step(network.encode_text, lambda: self._example[1:], _sizes(MAX_TEXTS))
        self._decode = step(
            lambda *inputs: _decoded(network, network.decode(*inputs)), self._example_pair, _sizes(MAX_PAIRS)
        )
        self._pixel_features = step(
            lambda fused, prompt, valid, *finer: network.pixel_features(fused, prompt, valid, finer),
            self._example_mask_input,
            _sizes(MAX_MASK_PAIRS),
        )
        self._decode_with_boxes = step(
            lambda attended, coarse, tokens, valid, *boxes: _decode_with_boxes(
                network, attended, coarse, (tokens, valid), *boxes
            ),
            self._example_box_pair,
            BOX_PAIRS,
        )
        self._pixel_features_with_boxes = step(
            lambda fused, prompt, valid, *finer: network.pixel_features(fused, prompt, valid, finer),
            self._example_box_mask_input,
            (1,),
        )
        self.max_images, self.max_texts = self._encode_images.max_rows, self._encode_texts.max_rows
        self.max_pairs, self.max_mask_pairs = self._decode.max_rows, self._pixel_features.max_rows

    def image_parts(self, images: int) -> list[int]:
        """Numbers of images to encode at once, for so many in all; see `GraphedFunction.parts`."""
        parts: list[int] = self._encode_images.parts(images)
        return parts

    def pairs_at_once(self, pairs: int, *, with_boxes: bool = False) -> int:
        """How many of so many pairs to decode next; all of them have boxes, or none."""
        step = self._decode_with_boxes if with_boxes else self._decode
        parts: list[int] = step.parts(pairs)
        return parts[0]

    def run_all(self) -> None:
        """Run each step for a black picture, with one pair and with as many as need other kernels."""
        self.pixel_features(*self._example_mask_input())
        self.decode(*(each.expand(SEVERAL_PAIRS, *each.shape[1:]) for each in self._example_pair()))
        self.pixel_features(*self._example_box_mask_input())
        self.decode_with_boxes(
            *(each.expand(SEVERAL_PAIRS, *each.shape[1:]) for each in self._example_box_pair())
        )

    def encode_images(self, pixels: Tensor) -> ImageFeatures:
        """Features of images (B, S, S, 3) uint8 RGB, which may be on the host."""
        features: ImageFeatures = self._encode_images(pixels)
        return features

    def encode_texts(self, input_ids: Tensor, valid: Tensor) -> TextFeatures:
        """Features of texts (T, L) int64 and bool, which may be on the host."""
        features: TextFeatures = self._encode_texts(input_ids, valid)
        return features

    def decode(
        self, attended: Tensor, geometry_token: Tensor, text_tokens: Tensor, text_valid: Tensor
    ) -> Decoded:
        """Decode P pairs; the arguments are those of `SAM3Network.decode`."""
        decoded: Decoded = self._decode(attended, geometry_token, text_tokens, text_valid)
        return decoded

    def decode_with_boxes(
        self, attended: Tensor, coarse: Tensor, text_tokens: Tensor, text_valid: Tensor, *boxes: Tensor
    ) -> Decoded:
        """Decode P pairs with `MAX_BOXES` boxes each, padding included.

        The arguments are those of `SAM3Network.decode`, with those of `encode_boxes` for the geometry;
        `boxes` are the boxes, their labels and which of them are valid.
        """
        decoded: Decoded = self._decode_with_boxes(attended, coarse, text_tokens, text_valid, *boxes)
        return decoded

    def pixel_features(self, fused: Tensor, prompt: Tensor, prompt_valid: Tensor, *finer: Tensor) -> Tensor:
        """Pixel features of M pairs; the arguments are those of `SAM3Network.pixel_features`."""
        if prompt.shape[1] != TEXT_PROMPT_TOKENS:
            of_boxes: Tensor = self._pixel_features_with_boxes(fused, prompt, prompt_valid, *finer)
            return of_boxes
        features: Tensor = self._pixel_features(fused, prompt, prompt_valid, *finer)
        return features

    def _example_pair(self) -> tuple[Tensor, ...]:
        pixels, ids, valid = self._example
        image, text = self.encode_images(pixels), self.encode_texts(ids, valid)
        return image.attended, image.geometry_token, text.tokens, text.valid

    def _example_box_pair(self) -> tuple[Tensor, ...]:
        pixels, ids, valid = self._example
        image, text = self.encode_images(pixels), self.encode_texts(ids, valid)
        boxes = torch.full((1, MAX_BOXES, 4), 0.5, device=pixels.device)
        is_box = torch.ones(1, MAX_BOXES, dtype=torch.bool, device=pixels.device)
        return image.attended, image.coarse, text.tokens, text.valid, boxes, is_box, is_box

    def _example_box_mask_input(self) -> tuple[Tensor, ...]:
        decoded = self.decode_with_boxes(*self._example_box_pair())
        image = self.encode_images(self._example[0])
        return decoded.fused, decoded.prompt, decoded.prompt_valid, *image.finer

    def _example_mask_input(self) -> tuple[Tensor, ...]:
        decoded, image = self.decode(*self._example_pair()), self.encode_images(self._example[0])
        return decoded.fused, decoded.prompt, decoded.prompt_valid, *image.finer


class EagerFunction:
    """A function of tensors, called as it is; the counterpart of `GraphedFunction`, with its arguments."""

    def __init__(
        self,
        function: Callable[..., Any],
        _example: Callable[[], tuple[Tensor, ...]],
        sizes: Iterable[int],
        device: torch.device,
    ) -> None:
        self._function, self._device = function, device
        self.max_rows = max(sizes)

    def parts(self, rows: int) -> list[int]:
        """As `GraphedFunction.parts`: all at once."""
        return [min(rows, self.max_rows)]

    def __call__(self, *inputs: Tensor) -> Any:
        """The function of inputs of any number of rows, which may be on the host."""
        return self._function(*(each.to(self._device) for each in inputs))


def _decoded(network: SAM3Network, found: Detections) -> Decoded:
    factors, offsets = network.mask_decoder.embed(found.queries[-1])
    return Decoded(
        summary=torch.cat((found.presence[:, None], found.scores, found.boxes.flatten(1)), dim=1),
        mask_factors=factors,
        mask_offsets=offsets,
        fused=found.fused,
        prompt=found.prompt,
        prompt_valid=found.prompt_valid,
    )


def _decode_with_boxes(
    network: SAM3Network, attended: Tensor, coarse: Tensor, text: tuple[Tensor, Tensor], *boxes: Tensor
) -> Decoded:
    tokens, valid = network.encode_boxes(coarse, *boxes)
    return _decoded(network, network.decode(attended, tokens, *text, geometry_valid=valid))


def _sizes(largest: int) -> list[int]:
    """Powers of two up to `largest`, and `largest` itself."""
    return [*(2**power for power in range(largest.bit_length()) if 2**power < largest), largest]
