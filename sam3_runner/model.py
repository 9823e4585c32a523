"""The eager reference path: SAM 3's forward over the weights of `transformers.Sam3Model`.

Three verbs: `encode_image` once per image, `encode_text` once per text, `decode_prompts` for pairs of
the two; `decode_masks` then draws only what was kept. Every function is differentiable, so that the
training script learns through the very code that serves.

transformers holds the weights and the layers; the order of the steps is ours wherever its forward
differs from the official model (docs/architecture.md, "Fidelity"): the geometry token that the
official model adds to a text-only prompt, and masks only for the queries that were kept.

Under bf16 autocast the text encoder, the decoder with its heads, and the product that draws the masks
stay in fp32: together they are a few per cent of the work, and half of the error that bf16 would bring.

Knows tensors, and nothing of files, images' own sizes or thresholds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name that every PyTorch reader knows

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """What the model keeps of B images; g is the side of the patch grid, D the model's width.

    Attributes:
        levels: feature maps from fine to coarse, (B, D, 4g, 4g), (B, D, 2g, 2g) and (B, D, g, g).
        position: sine position encoding of the coarse level, (1, g*g, D).
        attended: coarse tokens after the fusion encoder's first self-attention, (B, g*g, D): that
            step sees no prompt, so it is done once per image.
        geometry_token: what the geometry encoder says of "no box given", (B, 1, D).
    """

    levels: tuple[Tensor, ...]
    position: Tensor
    attended: Tensor
    geometry_token: Tensor


@dataclass(frozen=True, slots=True)
class TextFeatures:
    """T encoded texts: `tokens` (T, L, D), `valid` (T, L) bool, False where padded."""

    tokens: Tensor
    valid: Tensor


@dataclass(frozen=True, slots=True)
class Detections:
    """What the decoder says of P (image, text) pairs with Q queries each, before any threshold.

    Attributes:
        logits: (P, Q), one a query; clamped to +-12.
        presence_logits: (P,), is the concept in the image at all; clamped to +-10.
        boxes: (P, Q, 4), x0 y0 x1 y1 in 0..1 of the image's own sides.
        queries: (decoder layers, P, Q, D); the last layer draws the masks.
        reference_boxes: (decoder layers, P, Q, 4), cx cy w h in 0..1 that each layer started from.
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


def encode_image(model: Any, pixels: Tensor) -> ImageFeatures:
    """Encode B images, (B, 3, S, S) uint8 RGB squares of the model's own side S."""
    # mean = std = 0.5, as the official processor normalises.
    vision: Any = model.vision_encoder(pixels.to(torch.float32) / 127.5 - 1.0)
    # The 0.5x level is computed by transformers and used by nobody.
    levels = tuple(vision.fpn_hidden_states[:-1])
    coarse = levels[-1].flatten(2).transpose(1, 2)
    # Drawn anew in fp32: under autocast transformers draws it in bf16, off by up to 0.034.
    grid = model.vision_encoder.neck.position_encoding(levels[-1][:1].shape, levels[-1].device, torch.float32)
    position = grid.flatten(2).transpose(1, 2)
    return ImageFeatures(
        levels=levels,
        position=position,
        attended=_attend_image(model.detr_encoder.layers[0], coarse, position),
        geometry_token=_encode_no_geometry(model.geometry_encoder, coarse, position),
    )


def encode_text(model: Any, input_ids: Tensor, valid: Tensor) -> TextFeatures:
    """Encode T texts in fp32: `input_ids` (T, L) int64, `valid` (T, L) bool, False where padded."""
    with _float32(input_ids.device):
        features: Any = model.get_text_features(
            input_ids=input_ids, attention_mask=valid.long(), return_dict=True
        )
    return TextFeatures(tokens=features.pooler_output, valid=valid)


def decode_prompts(
    model: Any, image: ImageFeatures, text: TextFeatures, image_index: Tensor, text_index: Tensor
) -> Detections:
    """Look for text `text_index[p]` in image `image_index[p]`, for P pairs at once (both (P,) int64)."""
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
    """Boxes x0 y0 x1 y1 in 0..1, (..., Q, 4), from `queries` (..., Q, D) and where they started."""
    with _float32(queries.device):
        offset = model.detr_decoder.box_head(queries)
    center_x, center_y, width, height = (_logit(reference_boxes) + offset).sigmoid().unbind(-1)
    half_width, half_height = width / 2, height / 2
    corners = (center_x - half_width, center_y - half_height, center_x + half_width, center_y + half_height)
    return torch.stack(corners, dim=-1)


def decode_masks(
    model: Any, image: ImageFeatures, detections: Detections, image_index: Tensor, pair_index: Tensor
) -> Tensor:
    """Pixel features (M, D, 4g, 4g) of the M pairs in `pair_index`; `draw_masks` reads masks from them."""
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
    pixels: Tensor = head.pixel_decoder([*finer, coarse])
    return pixels


def draw_masks(model: Any, pixels: Tensor, queries: Tensor) -> Tensor:
    """Mask logits (K, 4g, 4g) in fp32 of K queries (K, D) over the pixel features (D, 4g, 4g) of one pair."""
    head = model.mask_decoder
    with _float32(pixels.device):
        embedding = head.mask_embedder(queries)
        # The 1x1 instance projection, moved from the many pixels to the K queries: e.(Wx + b) = (eW).x + e.b
        weight, bias = head.instance_projection.weight.flatten(1), head.instance_projection.bias
        logits = torch.einsum("kd,dhw->khw", embedding @ weight, pixels.float())
        masks: Tensor = logits + (embedding @ bias)[:, None, None]
    return masks


def _fuse(
    layers: Any, image: ImageFeatures, image_index: Tensor, prompt: Tensor, prompt_valid: Tensor
) -> Tensor:
    mask = _attention_mask(prompt_valid)
    hidden = _attend_prompt(layers[0], image.attended[image_index], prompt, mask)
    for layer in layers[1:]:
        hidden = _attend_prompt(layer, _attend_image(layer, hidden, image.position), prompt, mask)
    return hidden


def _attend_image(layer: Any, hidden: Tensor, position: Tensor) -> Tensor:
    """First half of a fusion layer: image tokens look at each other."""
    normed = layer.layer_norm1(hidden)
    placed = normed + position
    attended, _ = layer.self_attn(query=placed, key=placed, value=normed)
    seen: Tensor = hidden + layer.dropout(attended)
    return seen


def _attend_prompt(layer: Any, hidden: Tensor, prompt: Tensor, mask: Tensor) -> Tensor:
    """Second half of a fusion layer: image tokens look at the prompt, then think."""
    attended, _ = layer.cross_attn(
        query=layer.layer_norm2(hidden), key=prompt, value=prompt, attention_mask=mask
    )
    hidden = hidden + layer.dropout(attended)
    thought: Tensor = hidden + layer.dropout(layer.mlp(layer.layer_norm3(hidden)))
    return thought


def _encode_no_geometry(encoder: Any, coarse: Tensor, position: Tensor) -> Tensor:
    """The geometry encoder with no box: its class token, (B, 1, D), after it has looked at the image.

    The official model appends it to every text-only prompt; transformers leaves it out.
    """
    token = encoder.cls_embed.weight.expand(len(coarse), 1, -1)
    token = encoder.prompt_layer_norm(encoder.final_proj(token))
    for layer in encoder.layers:
        token = layer(prompt_feats=token, vision_feats=coarse, vision_pos_encoding=position, prompt_mask=None)
    normed: Tensor = encoder.output_layer_norm(token)
    return normed


def _float32(device: torch.device) -> torch.autocast:
    """What runs inside is left out of autocast; its inputs are given in fp32."""
    return torch.autocast(device.type, enabled=False)


def _attention_mask(valid: Tensor) -> Tensor:
    """(P, 1, 1, L) bool for scaled dot product attention, from (P, L)."""
    return valid[:, None, None, :]


def _logit(probability: Tensor, eps: float = 1e-3) -> Tensor:
    """Inverse sigmoid; `eps` is the official model's."""
    bounded = probability.clamp(0.0, 1.0)
    return torch.log(bounded.clamp(min=eps) / (1.0 - bounded).clamp(min=eps))
