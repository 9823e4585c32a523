"""The geometry encoder: a token for each box of a prompt, and a class token.

The official model appends these tokens to those of the text. Without a box it is the class token alone, which
depends on the image alone; transformers leaves it out. Formulas: sam3's geometry_encoders.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's usual alias
from torch import nn

from sam3_runner.network import operations
from sam3_runner.network.layers import Attention, Embedding, FeedForward, LayerNorm, Linear, project_all
from sam3_runner.network.positions import sine_of_centres, sine_periods
from sam3_runner.network.roi import pool_boxes

if TYPE_CHECKING:
    from torch import Tensor


class GeometryLayer(nn.Module):
    """Self-attention of the tokens, cross-attention to the image, a feed-forward."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        self.layer_norm1, self.layer_norm2, self.layer_norm3 = (LayerNorm(width) for _ in range(3))
        self.self_attn, self.cross_attn = Attention(width, heads), Attention(width, heads)
        self.mlp = FeedForward(width, config.intermediate_size, config.hidden_act)

    def forward(
        self, token: Tensor, keys_and_values: tuple[Tensor, ...], valid: Tensor | None = None
    ) -> Tensor:
        """Tokens (B, G, D), of which `valid` (B, G) bool count; projected keys and values of the image."""
        normed = self.layer_norm1(token)
        attended = self.self_attn.attend_self(normed, normed, valid)
        token, normed = self.layer_norm2.after_sum(token, attended.to(token.dtype))
        attended = self.cross_attn.attend_other(normed, keys_and_values)
        token, normed = self.layer_norm3.after_sum(token, attended.to(token.dtype))
        output: Tensor = token + self.mlp(normed).to(token.dtype)
        return output


class GeometryEncoder(nn.Module):
    """The layers, and the embeddings of boxes."""

    periods: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.hidden_size
        self.label_embed = Embedding(2, width)
        self.cls_embed = Embedding(1, width)
        self.boxes_direct_project = nn.Linear(4, width)
        self.boxes_pool_project = nn.Conv2d(width, width, config.roi_size)
        self.boxes_pos_enc_project = nn.Linear(width + 2, width)
        self.vision_layer_norm = LayerNorm(width)
        self.final_proj = Linear(width, width)
        self.prompt_layer_norm = LayerNorm(width)
        self.layers: Any = nn.ModuleList(GeometryLayer(config) for _ in range(config.num_layers))
        self.output_layer_norm = LayerNorm(width)
        self.register_buffer("periods", sine_periods(width // 2), persistent=False)

    def forward(self, image: Tensor, position: Tensor) -> Tensor:
        """The token (B, 1, D) of image tokens (B, N, D), whose position encoding is (1, N, D)."""
        token = self.prompt_layer_norm(self.final_proj(self.cls_embed.weight))
        return self._attend(token.expand(len(image), 1, -1).to(image.dtype), image, position, None)

    def encode_boxes(
        self, image: Tensor, position: Tensor, boxes: Tensor, labels: Tensor, valid: Tensor
    ) -> Tensor:
        """The tokens (P, K + 1, D) of K boxes and, last, the class token, for P pairs.

        Args:
            image: coarse tokens of each pair's image, (P, N, D).
            position: their position encoding, (1, N, D).
            boxes: (P, K, 4) fp32, cx cy w h in 0..1.
            labels: (P, K) bool, True for positive.
            valid: (P, K) bool, False for padding, whose tokens have no meaning.
        """
        embedded = self._embed(image, boxes, labels)
        tokens = torch.cat((embedded, self.cls_embed.weight.expand(len(boxes), 1, -1)), dim=1)
        tokens = self.prompt_layer_norm(self.final_proj(tokens).float()).to(image.dtype)
        return self._attend(tokens, image, position, F.pad(valid, (0, 1), value=True))

    def _embed(self, image: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
        """The embeddings (P, K, D) fp32 of boxes: numbers, features of the image, position, label."""
        side = round(image.shape[1] ** 0.5)
        features = self.vision_layer_norm(image, dtype=torch.float32).unflatten(1, (side, side))
        centre, half = boxes[..., :2], boxes[..., 2:] / 2
        pooled = pool_boxes(
            features,
            torch.cat((centre - half, centre + half), dim=-1),
            self.boxes_pool_project.kernel_size[0],
        )
        # A convolution whose kernel covers its whole input is a product.
        weight = self.boxes_pool_project.weight.permute(0, 2, 3, 1).flatten(1)
        embedded = operations.linear(pooled.flatten(2), weight, self.boxes_pool_project.bias).float()
        embedded = embedded + self.boxes_direct_project(boxes)
        embedded = embedded + self.boxes_pos_enc_project(sine_of_centres(boxes, self.periods))
        output: Tensor = embedded + self.label_embed(labels.long())
        return output

    def _attend(self, tokens: Tensor, image: Tensor, position: Tensor, valid: Tensor | None) -> Tensor:
        """The tokens (B, G, D) after all layers."""
        attentions = [layer.cross_attn for layer in self.layers]
        keys = project_all(image + position.to(image.dtype), attentions, 1, 2)
        values = project_all(image, attentions, 2, 3)
        for layer, key, value in zip(self.layers, keys, values, strict=True):
            tokens = layer(tokens, key + value, valid)
        output: Tensor = self.output_layer_norm(tokens)
        return output
