"""The decoder: queries attend to each other, to the prompt and to the image; presence, logits and boxes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - torch's usual alias
from torch import nn

from sam3_runner.network.layers import Attention, FeedForward, LayerNorm, Linear, Perceptron
from sam3_runner.network.positions import cells, sine_of_boxes, sine_periods

if TYPE_CHECKING:
    from torch import Tensor

MAX_PRESENCE_LOGIT = 10.0
"""transformers' clamp; the official code has none. It moves a score by 5e-5 at most."""
MAX_LOGIT = 12.0
"""The official model's clamp of a query's logit."""
BOX_EPS = 1e-3
"""The official model's bound of a box's side before the inverse sigmoid."""
_RPB_SCALE = 8.0
"""Of the logarithmic distances, as in the official model: log2(8 d + 1) / log2(8)."""


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

    def forward(  # noqa: PLR0917 - only tensors, so that all layers share one compilation
        self,
        x: Tensor,
        position: Tensor,
        prompt: Tensor,
        prompt_mask: Tensor,
        image: Tensor,
        positioned: Tensor,
        box_bias: Tensor,
    ) -> Tensor:
        """The presence token and the queries, (P, 1 + Q, D) fp32.

        Args:
            x: (P, 1 + Q, D).
            position: of the queries' boxes, (P, 1 + Q, D).
            prompt: (P, L, D).
            prompt_mask: (P, 1, 1, L) bool.
            image: fused image tokens, (P, N, D).
            positioned: the same with their position encoding.
            box_bias: (P, heads, 1 + Q, N), see `Decoder.box_bias`.
        """
        x = self.self_attn_layer_norm(x + self.self_attn.attend_self(x + position, x))
        attended = self.text_cross_attn.attend_other(x + position, prompt, prompt, prompt_mask)
        x = self.text_cross_attn_layer_norm(x + attended)
        attended = self.vision_cross_attn.attend_other(x + position, positioned, image, box_bias)
        x = self.vision_cross_attn_layer_norm(x + attended)
        output: Tensor = self.mlp_layer_norm(x + self.mlp(x))
        return output


class DecodedLayers(NamedTuple):
    """The decoder's output, one tensor a layer.

    Attributes:
        queries: (P, Q, D) fp32.
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
        self.query_embed = nn.Embedding(config.num_queries, width)
        self.reference_points = nn.Embedding(config.num_queries, 4)
        self.presence_token = nn.Embedding(1, width)
        self.presence_head = Perceptron(width, width, width, 1)
        self.presence_layer_norm = LayerNorm(width)
        self.ref_point_head = Perceptron(2 * width, width, width)
        self.box_rpb_embed_x = Perceptron(2, width, config.num_attention_heads)
        self.box_rpb_embed_y = Perceptron(2, width, config.num_attention_heads)
        self.register_buffer("line", cells(grid), persistent=False)
        self.register_buffer("periods", sine_periods(width // 2), persistent=False)

    def forward(self, image: Tensor, position: Tensor, prompt: Tensor, prompt_mask: Tensor) -> DecodedLayers:
        """Decode P pairs.

        Args:
            image: fused image tokens, (P, N, D).
            position: their position encoding, (1, N, D).
            prompt: (P, L, D).
            prompt_mask: (P, 1, 1, L) bool, False for padding.
        """
        boxes = self.reference_points.weight.sigmoid().expand(len(image), -1, -1)
        x = torch.cat((self.presence_token.weight, self.query_embed.weight)).expand(len(image), -1, -1)
        positioned = image + position.to(image.dtype)
        queries, references, presence_logits = [], [], []
        for layer in self.layers:
            # The presence token has neither a position nor a bias.
            of_boxes = F.pad(self.ref_point_head(sine_of_boxes(boxes, self.periods)), (0, 0, 1, 0))
            x = layer(x, of_boxes, prompt, prompt_mask, image, positioned, self.box_bias(boxes))
            queries.append(self.output_layer_norm(x[:, 1:]))
            references.append(boxes)
            boxes = refine(boxes, self.box_head(queries[-1])).detach()
            presence = self.presence_head(self.presence_layer_norm(x[:, 0])).squeeze(-1)
            presence_logits.append(presence.clamp(-MAX_PRESENCE_LOGIT, MAX_PRESENCE_LOGIT))
        return DecodedLayers(tuple(queries), tuple(references), tuple(presence_logits))

    def box_bias(self, boxes: Tensor) -> Tensor:
        """The bias of attention from Q queries to N cells, by the distances of each cell to the box's sides.

        Args:
            boxes: (P, Q, 4), cx cy w h in 0..1.

        Returns:
            (P, heads, 1 + Q, N), contiguous and in the dtype of the attention's products: any other layout or
            dtype makes PyTorch choose a slow kernel. Row 0, of the presence token, is 0.
        """
        center_x, center_y, width, height = boxes.unbind(-1)
        along_x = self.box_rpb_embed_x(self._distances(center_x, width))
        along_y = self.box_rpb_embed_y(self._distances(center_y, height))
        along_x, along_y = along_x.permute(0, 3, 1, 2), along_y.permute(0, 3, 1, 2)  # (P, heads, Q, g)
        bias = (along_y[..., :, None] + along_x[..., None, :]).flatten(3)
        dtype = self.layers[0].vision_cross_attn.qkv_proj.weight.dtype
        return F.pad(bias.to(dtype), (0, 0, 1, 0)).contiguous()

    def _distances(self, center: Tensor, size: Tensor) -> Tensor:
        """Logarithmic distances along one axis from g cells to both sides of the boxes, (P, Q, g, 2)."""
        sides = torch.stack((center - size / 2, center + size / 2), dim=-1)
        scaled = (self.line[:, None] - sides[:, :, None]) * _RPB_SCALE
        return scaled.sign() * torch.log2(scaled.abs() + 1.0) / math.log2(_RPB_SCALE)


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


def refine(reference: Tensor, offset: Tensor) -> Tensor:
    """Boxes (..., 4), cx cy w h in 0..1, moved by offsets of their logits."""
    bounded = reference.clamp(0.0, 1.0)
    logits = torch.log(bounded.clamp(min=BOX_EPS) / (1.0 - bounded).clamp(min=BOX_EPS))
    return (logits + offset).sigmoid()
