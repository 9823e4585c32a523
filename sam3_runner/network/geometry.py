"""The geometry encoder, for prompts without a box: one token, which depends on the image alone.

The official model appends this token to every text-only prompt; transformers does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from sam3_runner.network.layers import Attention, FeedForward, LayerNorm, Linear, project_all

if TYPE_CHECKING:
    from torch import Tensor


class GeometryLayer(nn.Module):
    """Self-attention of the token, cross-attention to the image, a feed-forward."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        self.layer_norm1, self.layer_norm2, self.layer_norm3 = (LayerNorm(width) for _ in range(3))
        self.self_attn, self.cross_attn = Attention(width, heads), Attention(width, heads)
        self.mlp = FeedForward(width, config.intermediate_size, config.hidden_act)

    def forward(self, token: Tensor, keys_and_values: tuple[Tensor, ...]) -> Tensor:
        """Tokens (B, 1, D); projected keys and values of the image."""
        normed = self.layer_norm1(token)
        attended = self.self_attn.attend_self(normed, normed)
        token, normed = self.layer_norm2.after_sum(token, attended.to(token.dtype))
        attended = self.cross_attn.attend_other(normed, keys_and_values)
        token, normed = self.layer_norm3.after_sum(token, attended.to(token.dtype))
        output: Tensor = token + self.mlp(normed).to(token.dtype)
        return output


class GeometryEncoder(nn.Module):
    """The layers, and the weights for boxes, which every checkpoint has and a prompt of text does not use."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.hidden_size
        self.label_embed = nn.Embedding(2, width)
        self.cls_embed = nn.Embedding(1, width)
        self.boxes_direct_project = nn.Linear(4, width)
        self.boxes_pool_project = nn.Conv2d(width, width, config.roi_size)
        self.boxes_pos_enc_project = nn.Linear(width + 2, width)
        self.vision_layer_norm = LayerNorm(width)
        self.final_proj = Linear(width, width)
        self.prompt_layer_norm = LayerNorm(width)
        self.layers: Any = nn.ModuleList(GeometryLayer(config) for _ in range(config.num_layers))
        self.output_layer_norm = LayerNorm(width)

    def forward(self, image: Tensor, position: Tensor) -> Tensor:
        """The token (B, 1, D) of image tokens (B, N, D), whose position encoding is (1, N, D)."""
        token = self.prompt_layer_norm(self.final_proj(self.cls_embed.weight))
        token = token.expand(len(image), 1, -1).to(image.dtype)
        attentions = [layer.cross_attn for layer in self.layers]
        keys = project_all(image + position.to(image.dtype), attentions, 1, 2)
        values = project_all(image, attentions, 2, 3)
        for layer, key, value in zip(self.layers, keys, values, strict=True):
            token = layer(token, key + value)
        output: Tensor = self.output_layer_norm(token)
        return output
