"""SAM 3's forward pass in eager PyTorch, over the weights of `transformers.Sam3Model`.

`encode_image` runs once per image, `encode_text` once per text, and `decode_prompts` once per
(image, text) pair. `pixel_features` and `predict_masks` then run for the queries that were kept. Every
function is differentiable: training uses the same code as serving.

transformers provides the weights and the layers. The order of the steps is ours wherever its forward
differs from the official model (docs/architecture.md, "Fidelity"): the official model appends a geometry
token to a text-only prompt, and we predict masks only for kept queries.

Under bf16 autocast the text encoder, the decoder with its heads, and the final product of the masks
stay in fp32. They are a few per cent of the work, and would cause half of the error of bf16.

This module handles tensors only: no files, no original image sizes, no thresholds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's usual alias

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """Features of B images; g is the side of the patch grid, D the model's width.

    Attributes:
        levels: feature maps from fine to coarse, (B, D, 4g, 4g), (B, D, 2g, 2g) and (B, D, g, g).
        position: sine position encoding of the coarse level, (1, g*g, D).
        attended: coarse tokens after the first self-attention of the fusion encoder, (B, g*g, D). This
            step does not depend on the prompt, so it runs once per image.
        geometry_token: output of the geometry encoder without a box, (B, 1, D).
    """

    levels: tuple[Tensor, ...]
    position: Tensor
    attended: Tensor
    geometry_token: Tensor


@dataclass(frozen=True, slots=True)
class TextFeatures:
    """T encoded texts: `tokens` (T, L, D), `valid` (T, L) bool, False for padding."""

    tokens: Tensor
    valid: Tensor


@dataclass(frozen=True, slots=True)
class Detections:
    """The decoder's output for P (image, text) pairs with Q queries each, before any threshold.

    Attributes:
        logits: (P, Q), one per query; clamped to +-12.
        presence_logits: (P,), whether the concept is in the image at all; clamped to +-10.
        boxes: (P, Q, 4), x0 y0 x1 y1 in 0..1 of the image's own sides.
        queries: (decoder layers, P, Q, D); masks are predicted from the last layer.
        reference_boxes: (decoder layers, P, Q, 4), cx cy w h in 0..1, the input boxes of each layer.
        layer_presence_logits: (decoder layers, P).
        fused: image tokens after the fusion encoder, (P, g*g, D).
        prompt: text tokens and the geometry token, (P, L + 1, D).
        prompt_valid: (P, L + 1) bool.
    """

    logits: Tensor
    presence_logits: Tensor
    boxes: Tensor
    queries: Tensor
    reference_boxes: Tensor
    layer_presence_logits: Tensor
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


def encode_image(model: Any, pixels: Tensor) -> ImageFeatures:
    """Encode B images, (B, 3, S, S) uint8 RGB squares of the model's input side S."""
    # mean = std = 0.5, as in the official processor.
    vision: Any = model.vision_encoder(pixels.to(torch.float32) / 127.5 - 1.0)
    # transformers computes a 0.5x level as well; nothing uses it.
    levels = tuple(vision.fpn_hidden_states[:-1])
    coarse = levels[-1].flatten(2).transpose(1, 2)
    # Computed again in fp32: under autocast transformers computes it in bf16, off by up to 0.034.
    grid = model.vision_encoder.neck.position_encoding(levels[-1][:1].shape, levels[-1].device, torch.float32)
    position = grid.flatten(2).transpose(1, 2)
    return ImageFeatures(
        levels=levels,
        position=position,
        attended=_self_attention(model.detr_encoder.layers[0], coarse, position),
        geometry_token=_geometry_token(model.geometry_encoder, coarse, position),
    )


def encode_text(model: Any, input_ids: Tensor, valid: Tensor) -> TextFeatures:
    """Encode T texts in fp32: `input_ids` (T, L) int64, `valid` (T, L) bool, False for padding."""
    with _float32(input_ids.device):
        features: Any = model.get_text_features(
            input_ids=input_ids, attention_mask=valid.long(), return_dict=True
        )
    return TextFeatures(tokens=features.pooler_output, valid=valid)


def decode_prompts(
    model: Any, image: ImageFeatures, text: TextFeatures, image_index: Tensor, text_index: Tensor
) -> Detections:
    """Detect text `text_index[p]` in image `image_index[p]`, for P pairs at once (both (P,) int64)."""
    geometry_token = image.geometry_token[image_index]
    prompt = torch.cat([text.tokens[text_index], geometry_token.float()], dim=1)
    prompt_valid = F.pad(text.valid[text_index], (0, 1), value=True)
    fused = _fuse(model.detr_encoder.layers, image, image_index, prompt, prompt_valid)
    side = image.levels[-1].shape[-1]
    with _float32(fused.device):
        decoded = model.detr_decoder(
            vision_features=fused.float(),
            text_features=prompt,
            vision_pos_encoding=image.position.expand(len(image_index), -1, -1),
            text_mask=prompt_valid,
            spatial_shapes=torch.full((1, 2), side, device=fused.device),
        )
    queries = decoded.intermediate_hidden_states
    layer_presence_logits = decoded.presence_logits.squeeze(-1)
    return Detections(
        logits=score_queries(model, queries[-1:], prompt, prompt_valid)[0],
        presence_logits=layer_presence_logits[-1],
        boxes=refine_boxes(model, queries[-1], decoded.reference_boxes[-1]),
        queries=queries,
        reference_boxes=decoded.reference_boxes,
        layer_presence_logits=layer_presence_logits,
        fused=fused,
        prompt=prompt,
        prompt_valid=prompt_valid,
    )


def score_queries(model: Any, queries: Tensor, prompt: Tensor, prompt_valid: Tensor) -> Tensor:
    """Logits (layers, P, Q) of `queries` (layers, P, Q, D)."""
    with _float32(queries.device):
        logits: Tensor = model.dot_product_scoring(
            decoder_hidden_states=queries, text_features=prompt, text_mask=prompt_valid
        )
    return logits.squeeze(-1)


def refine_boxes(model: Any, queries: Tensor, reference_boxes: Tensor) -> Tensor:
    """Boxes x0 y0 x1 y1 in 0..1, (..., Q, 4), from `queries` (..., Q, D) and their reference boxes."""
    with _float32(queries.device):
        offset = model.detr_decoder.box_head(queries)
    refined = (_inverse_sigmoid(reference_boxes) + offset).sigmoid()
    center_x, center_y, width, height = refined.unbind(-1)
    half_width, half_height = width / 2, height / 2
    corners = (center_x - half_width, center_y - half_height, center_x + half_width, center_y + half_height)
    return torch.stack(corners, dim=-1)


def pixel_features(
    model: Any, image: ImageFeatures, detections: Detections, image_index: Tensor, pair_index: Tensor
) -> Tensor:
    """Pixel features (M, D, 4g, 4g) of the M pairs in `pair_index`: the input of `predict_masks`."""
    head = model.mask_decoder
    fused = detections.fused[pair_index]
    attended, _ = head.prompt_cross_attn(
        query=head.prompt_cross_attn_norm(fused),
        key=detections.prompt[pair_index],
        value=detections.prompt[pair_index],
        attention_mask=_attention_mask(detections.prompt_valid[pair_index]),
    )
    coarse = (fused + attended).transpose(1, 2).unflatten(2, image.levels[-1].shape[-2:])
    finer = [level[image_index[pair_index]] for level in image.levels[:-1]]
    features: Tensor = head.pixel_decoder([*finer, coarse])
    return features


def predict_masks(model: Any, features: Tensor, queries: Tensor) -> Tensor:
    """fp32 mask logits (K, 4g, 4g) of K queries (K, D), from the pixel features (D, 4g, 4g) of one pair."""
    head = model.mask_decoder
    with _float32(features.device):
        embedding = head.mask_embedder(queries)
        # The 1x1 instance projection is applied to the K queries, not to the pixels, which are many more:
        # e.(Wx + b) = (eW).x + e.b
        weight, bias = head.instance_projection.weight.flatten(1), head.instance_projection.bias
        logits = torch.einsum("kd,dhw->khw", embedding @ weight, features.float())
        masks: Tensor = logits + (embedding @ bias)[:, None, None]
    return masks


def _fuse(
    layers: Any, image: ImageFeatures, image_index: Tensor, prompt: Tensor, prompt_valid: Tensor
) -> Tensor:
    mask = _attention_mask(prompt_valid)
    hidden = _cross_attention_and_mlp(layers[0], image.attended[image_index], prompt, mask)
    for layer in layers[1:]:
        hidden = _self_attention(layer, hidden, image.position)
        hidden = _cross_attention_and_mlp(layer, hidden, prompt, mask)
    return hidden


def _self_attention(layer: Any, hidden: Tensor, position: Tensor) -> Tensor:
    """First half of a fusion layer: self-attention over the image tokens."""
    normed = layer.layer_norm1(hidden)
    with_position = normed + position
    attended, _ = layer.self_attn(query=with_position, key=with_position, value=normed)
    output: Tensor = hidden + layer.dropout(attended)
    return output


def _cross_attention_and_mlp(layer: Any, hidden: Tensor, prompt: Tensor, mask: Tensor) -> Tensor:
    """Second half of a fusion layer: cross-attention from the image tokens to the prompt, then the MLP."""
    attended, _ = layer.cross_attn(
        query=layer.layer_norm2(hidden), key=prompt, value=prompt, attention_mask=mask
    )
    hidden = hidden + layer.dropout(attended)
    output: Tensor = hidden + layer.dropout(layer.mlp(layer.layer_norm3(hidden)))
    return output


def _geometry_token(encoder: Any, coarse: Tensor, position: Tensor) -> Tensor:
    """The geometry encoder's class token without a box, (B, 1, D), after cross-attention to the image.

    The official model appends it to every text-only prompt; transformers does not.
    """
    token = encoder.cls_embed.weight.expand(len(coarse), 1, -1)
    token = encoder.prompt_layer_norm(encoder.final_proj(token))
    for layer in encoder.layers:
        token = layer(prompt_feats=token, vision_feats=coarse, vision_pos_encoding=position, prompt_mask=None)
    normed: Tensor = encoder.output_layer_norm(token)
    return normed


def _float32(device: torch.device) -> torch.autocast:
    """Disable autocast for the block; its inputs must be fp32."""
    return torch.autocast(device.type, enabled=False)


def _attention_mask(valid: Tensor) -> Tensor:
    """(P, 1, 1, L) bool for scaled dot product attention, from (P, L)."""
    return valid[:, None, None, :]


def _inverse_sigmoid(probability: Tensor, eps: float = 1e-3) -> Tensor:
    """Inverse of the sigmoid; `eps` is the official model's."""
    bounded = probability.clamp(0.0, 1.0)
    return torch.log(bounded.clamp(min=eps) / (1.0 - bounded).clamp(min=eps))
