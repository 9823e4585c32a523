"""SAM 3's image model, and the order of its steps.

`encode_image` runs once per image, `encode_text` once per text, and `decode` once per (image, text) pair.
`pixel_features` and `mask_logits` then run for the queries that were kept. Serving, training and evaluation
use this code.

This module handles tensors only: no files, no original image sizes, no thresholds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's usual alias
from torch import nn

from sam3_runner.network.decoder import Decoder, Scoring
from sam3_runner.network.fusion import FusionEncoder
from sam3_runner.network.geometry import GeometryEncoder
from sam3_runner.network.layers import Linear, project_all
from sam3_runner.network.masks import MaskHead
from sam3_runner.network.operations import inverse_sigmoid
from sam3_runner.network.positions import sine_of_grid
from sam3_runner.network.text import TextEncoder
from sam3_runner.network.vision import VisionEncoder

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """Features of B images; g is the side of the grid, D the model's width.

    Attributes:
        finer: feature maps (B, D, 2g, 2g) and (B, D, 4g, 4g).
        attended: coarse tokens after the first self-attention of the fusion encoder, (B, g * g, D). This
            step does not depend on the prompt, so it runs once per image.
        geometry_token: output of the geometry encoder without a box, (B, 1, D).
        coarse: coarse tokens as the vision encoder returns them, (B, g * g, D); for prompts with boxes.
    """

    finer: tuple[Tensor, ...]
    attended: Tensor
    geometry_token: Tensor
    coarse: Tensor


@dataclass(frozen=True, slots=True)
class TextFeatures:
    """T encoded texts: `tokens` (T, L, D) fp32, `valid` (T, L) bool, False for padding."""

    tokens: Tensor
    valid: Tensor


@dataclass(frozen=True, slots=True)
class Detections:
    """The decoder's output for P (image, text) pairs with Q queries each, before any threshold.

    Attributes:
        logits: (P, Q), one per query; clamped to +-12.
        presence_logits: (P,), whether the concept is in the image at all; clamped to +-10.
        boxes: (P, Q, 4), x0 y0 x1 y1 in 0..1 of the image's own sides.
        queries: (P, Q, D), one tensor a decoder layer; masks are predicted from the last layer.
        reference_boxes: (P, Q, 4), cx cy w h in 0..1, the input boxes of each layer.
        layer_presence_logits: (P,), one tensor a layer.
        fused: image tokens after the fusion encoder, (P, g * g, D).
        prompt: text tokens, then the G geometry tokens, (P, L + G, D) fp32.
        prompt_valid: (P, L + G) bool.
    """

    logits: Tensor
    presence_logits: Tensor
    boxes: Tensor
    queries: tuple[Tensor, ...]
    reference_boxes: tuple[Tensor, ...]
    layer_presence_logits: tuple[Tensor, ...]
    fused: Tensor
    prompt: Tensor
    prompt_valid: Tensor

    @property
    def presence(self) -> Tensor:
        """(P,), probability that the concept is in the image."""
        return self.presence_logits.sigmoid()

    @property
    def scores(self) -> Tensor:
        """(P, Q), probability of each query times that of presence; compared with `SCORE_THRESHOLD`."""
        return self.logits.sigmoid() * self.presence[:, None]


class SAM3Network(nn.Module):
    """SAM 3's detector for concept prompts: a text, boxes, or both.

    Args:
        config: a transformers `Sam3Config`.
    """

    position: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        decoder = config.detr_decoder_config
        self.vision_encoder = VisionEncoder(config.vision_config)
        self.text_encoder = TextEncoder(config.text_config)
        self.text_projection = Linear(config.text_config.hidden_size, config.detr_encoder_config.hidden_size)
        self.geometry_encoder = GeometryEncoder(config.geometry_encoder_config)
        self.detr_encoder = FusionEncoder(config.detr_encoder_config)
        grid = self.vision_encoder.backbone.grid
        self.detr_decoder = Decoder(decoder, grid)
        self.dot_product_scoring = Scoring(decoder.hidden_size, decoder.intermediate_size)
        self.mask_decoder = MaskHead(config.mask_decoder_config)
        self.register_buffer("position", sine_of_grid(grid, decoder.hidden_size)[None], persistent=False)

    @property
    def input_side_px(self) -> int:
        """S, the side of the model's square input."""
        backbone = self.config.vision_config.backbone_config
        side_px: int = backbone.image_size
        return side_px

    def encode_image(self, pixels: Tensor) -> ImageFeatures:
        """Encode B images, (B, 3, S, S) uint8 RGB squares of the model's input side S."""
        *finer, coarse_map = self.vision_encoder(pixels)
        coarse = coarse_map.flatten(2).transpose(1, 2)
        x, add = self.detr_encoder.layers[0].attend_image(coarse, None, self.position)
        return ImageFeatures(
            finer=tuple(reversed(finer)),
            attended=x + add,
            geometry_token=self.geometry_encoder(coarse, self.position),
            coarse=coarse,
        )

    def encode_boxes(
        self, coarse: Tensor, boxes: Tensor, labels: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Geometry tokens for P pairs with up to K boxes each.

        Args:
            coarse: of each pair's image, (P, g * g, D), as in `ImageFeatures`.
            boxes: (P, K, 4) fp32, cx cy w h in 0..1 of the image's own sides.
            labels: (P, K) bool, True for positive.
            valid: (P, K) bool, False for padding.

        Returns:
            Tokens (P, K + 1, D) and their validity (P, K + 1) bool, for `decode`.
        """
        tokens = self.geometry_encoder.encode_boxes(coarse, self.position, boxes, labels, valid)
        return tokens, F.pad(valid, (0, 1), value=True)

    def encode_text(self, input_ids: Tensor, valid: Tensor) -> TextFeatures:
        """Encode T texts: `input_ids` (T, L) int64, `valid` (T, L) bool, False for padding."""
        tokens = self.text_projection(self.text_encoder(input_ids, valid))
        return TextFeatures(tokens=tokens.float(), valid=valid)

    def decode(
        self,
        attended: Tensor,
        geometry_tokens: Tensor,
        text_tokens: Tensor,
        text_valid: Tensor,
        *,
        geometry_valid: Tensor | None = None,
    ) -> Detections:
        """Detect one concept in one image for each of P pairs.

        Args:
            attended: of each pair's image, (P, g * g, D), as in `ImageFeatures`.
            geometry_tokens: (P, G, D): `geometry_token` of `ImageFeatures`, or those of `encode_boxes`.
            text_tokens: of each pair's text, (P, L, D), as in `TextFeatures`.
            text_valid: (P, L), as in `TextFeatures`.
            geometry_valid: (P, G) bool; None: all are.
        """
        prompt = torch.cat((text_tokens, geometry_tokens.float()), dim=1)
        if geometry_valid is None:
            prompt_valid = F.pad(text_valid, (0, geometry_tokens.shape[1]), value=True)
        else:
            prompt_valid = torch.cat((text_valid, geometry_valid), dim=1)
        attentions = [layer.cross_attn for layer in self.detr_encoder.layers]
        attentions += [layer.text_cross_attn for layer in self.detr_decoder.layers]
        prompts = project_all(prompt, attentions, 1, 3)
        fused_layers = len(self.detr_encoder.layers)
        fused = self.detr_encoder(attended, self.position, prompts[:fused_layers], prompt_valid)
        layers = self.detr_decoder(fused, self.position, prompts[fused_layers:], prompt_valid)
        queries = layers.queries[-1]
        return Detections(
            logits=self.dot_product_scoring(queries, prompt, prompt_valid),
            presence_logits=layers.presence_logits[-1],
            boxes=self.boxes(queries, layers.reference_boxes[-1]),
            queries=layers.queries,
            reference_boxes=layers.reference_boxes,
            layer_presence_logits=layers.presence_logits,
            fused=fused,
            prompt=prompt,
            prompt_valid=prompt_valid,
        )

    def boxes(self, queries: Tensor, reference_boxes: Tensor) -> Tensor:
        """Boxes x0 y0 x1 y1 in 0..1, (..., Q, 4), from `queries` (..., Q, D) and their reference boxes."""
        offset = self.detr_decoder.box_head(queries).float()
        refined = (inverse_sigmoid(reference_boxes) + offset).sigmoid()
        center, half = refined[..., :2], refined[..., 2:] / 2
        return torch.cat((center - half, center + half), dim=-1)

    def pixel_features(
        self, fused: Tensor, prompt: Tensor, prompt_valid: Tensor, finer: tuple[Tensor, ...]
    ) -> Tensor:
        """Pixel features (M, D, 4g, 4g) of M pairs, from fields of `Detections` and `ImageFeatures`."""
        memory = self.mask_decoder.prompt_cross_attn.project(prompt, 1, 3)
        return self.mask_decoder.pixel_features(fused, memory, prompt_valid, finer)
