"""The decoder: queries attend to each other, to the prompt and to the image; presence, logits and boxes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - torch's usual alias
from torch import Tensor, nn

from sam3_runner.network import operations
from sam3_runner.network.layers import (
    Attention,
    Embedding,
    FeedForward,
    LayerNorm,
    Linear,
    Perceptron,
    project_all,
)
from sam3_runner.network.positions import cells, sine_periods

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_PRESENCE_LOGIT = 10.0
"""transformers' clamp; the official code has none. It moves a score by 5e-5 at most."""
MAX_LOGIT = 12.0
"""The official model's clamp of a query's logit."""

Memory = tuple[Tensor, ...]
"""Projected keys and values, each (P, heads, N, D / heads)."""
Bias = tuple[Tensor, Tensor]
"""Of a grid's rows and columns, each (P, heads, Q, g)."""


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention to the prompt and to the image, a feed-forward; a norm after each."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        self.self_attn = Attention(width, heads)
        self.self_attn_layer_norm = LayerNorm(width)
        self.text_cross_attn = Attention(width, heads)
        self.text_cross_attn_layer_norm = LayerNorm(width)
        self.vision_cross_attn = Attention(width, heads)
        self.vision_cross_attn_layer_norm = LayerNorm(width)
        self.mlp = FeedForward(width, config.intermediate_size, config.hidden_act)
        self.mlp_layer_norm = LayerNorm(width)

    def forward(  # noqa: PLR0917 - of one kind, passed in the order of the steps
        self, x: Tensor, position: Tensor, prompt: Memory, prompt_valid: Tensor, image: Memory, bias: Bias
    ) -> Tensor:
        """The presence token and the queries, (P, 1 + Q, D).

        Args:
            x: (P, 1 + Q, D).
            position: of the queries' boxes, (P, 1 + Q, D).
            prompt: projected keys and values of the prompt.
            prompt_valid: (P, L) bool.
            image: projected keys and values of the fused image tokens.
            bias: of `operations.box_bias`.
        """
        attended = self.self_attn.attend_self(x + position, x)
        _, x, positioned = operations.norm(x, self.self_attn_layer_norm, add=attended, position=position)
        attended = self.text_cross_attn.attend_other(positioned, prompt, prompt_valid)
        norm = self.text_cross_attn_layer_norm
        _, x, positioned = operations.norm(x, norm, add=attended, position=position)
        (query,) = self.vision_cross_attn.project(positioned, 0, 1)
        key, value = image
        attended = self.vision_cross_attn.o_proj(operations.attend_grid(query, key, value, *bias))
        x = self.vision_cross_attn_layer_norm(x, attended)
        output: Tensor = self.mlp_layer_norm(x, self.mlp(x))
        return output


class DecodedLayers(NamedTuple):
    """The decoder's output, one tensor a layer.

    Attributes:
        queries: (P, Q, D) fp32, normed.
        reference_boxes: the layer's input boxes, (P, Q, 4), cx cy w h in 0..1.
        presence_logits: (P,).
    """

    queries: tuple[Tensor, ...]
    reference_boxes: tuple[Tensor, ...]
    presence_logits: tuple[Tensor, ...]


class Decoder(nn.Module):
    """All layers, each of which refines the boxes of the one before.

    Args:
        config: `detr_decoder_config`.
        grid: cells on a side of the image's grid.
    """

    line: Tensor
    periods: Tensor

    def __init__(self, config: Any, grid: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.layers: Any = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.output_layer_norm = LayerNorm(width)
        self.box_head = Perceptron(width, width, width, 4)
        self.query_embed = Embedding(config.num_queries, width)
        self.reference_points = Embedding(config.num_queries, 4)
        self.presence_token = Embedding(1, width)
        self.presence_head = Perceptron(width, width, width, 1)
        self.presence_layer_norm = LayerNorm(width)
        self.ref_point_head = Perceptron(2 * width, width, width)
        self.box_rpb_embed_x = Perceptron(2, width, config.num_attention_heads)
        self.box_rpb_embed_y = Perceptron(2, width, config.num_attention_heads)
        self.register_buffer("line", cells(grid), persistent=False)
        self.register_buffer("periods", sine_periods(width // 2), persistent=False)

    def forward(
        self, image: Tensor, position: Tensor, prompts: Sequence[Memory], prompt_valid: Tensor
    ) -> DecodedLayers:
        """Decode P pairs.

        Args:
            image: fused image tokens, (P, N, D).
            position: their position encoding, (1, N, D).
            prompts: the prompt's keys and values for each layer.
            prompt_valid: (P, L) bool, False for padding.
        """
        dtype = self.layers[0].mlp.fc1.weight.dtype
        attentions = [layer.vision_cross_attn for layer in self.layers]
        keys = project_all(image + position.to(image.dtype), attentions, 1, 2)
        values = project_all(image, attentions, 2, 3)
        tokens = torch.cat((self.presence_token.weight, self.query_embed.weight)).to(dtype)
        x = tokens.expand(len(image), -1, -1)
        boxes = self.reference_points.weight.sigmoid().expand(len(image), -1, -1)
        queries: list[Tensor] = []
        references, presence_logits = [], []
        for layer, prompt, key, value in zip(self.layers, prompts, keys, values, strict=True):
            offset = self.box_head(queries[-1]) if queries else None
            boxes, sine = operations.refined_boxes(offset, boxes, x, self.periods)
            boxes = boxes.detach()
            # The presence token has no position.
            of_boxes = F.pad(self.ref_point_head(sine).to(dtype), (0, 0, 1, 0))
            bias = operations.box_bias(
                boxes, self.box_rpb_embed_x.layers, self.box_rpb_embed_y.layers, self.line, x
            )
            x = layer(x, of_boxes, prompt, prompt_valid, key + value, bias)
            queries.append(self.output_layer_norm(x, dtype=torch.float32))
            references.append(boxes)
            presence = self.presence_head(self.presence_layer_norm(x[:, 0])).float().squeeze(-1)
            presence_logits.append(presence.clamp(-MAX_PRESENCE_LOGIT, MAX_PRESENCE_LOGIT))
        return DecodedLayers(
            queries=tuple(each[:, 1:] for each in queries),
            reference_boxes=tuple(references),
            presence_logits=tuple(presence_logits),
        )


class Scoring(nn.Module):
    """How well each query fits the prompt: a dot product with the mean of the prompt's tokens.

    Args:
        width: D.
        hidden: width of the hidden layer.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.text_mlp = Perceptron(width, hidden, width)
        self.text_mlp_out_norm = LayerNorm(width)
        self.text_proj = Linear(width, width)
        self.query_proj = Linear(width, width)

    def forward(self, queries: Tensor, prompt: Tensor, prompt_valid: Tensor) -> Tensor:
        """Logits (..., P, Q) of queries (..., P, Q, D) for prompts (P, L, D)."""
        tokens = self.text_mlp_out_norm(self.text_mlp(prompt) + prompt)
        weight = prompt_valid[..., None].to(tokens.dtype)
        mean = (tokens * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1.0)
        logits = (self.query_proj(queries) @ self.text_proj(mean)[..., None]).squeeze(-1)
        return (logits / math.sqrt(queries.shape[-1])).clamp(-MAX_LOGIT, MAX_LOGIT)
