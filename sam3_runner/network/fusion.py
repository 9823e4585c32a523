"""The fusion encoder: image tokens attend to each other and to the prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from sam3_runner.network.layers import Attention, FeedForward, LayerNorm

if TYPE_CHECKING:
    from torch import Tensor


class FusionLayer(nn.Module):
    """Its two halves are functions of their own: the first one of layer 0 does not depend on the prompt."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        self.layer_norm1, self.layer_norm2, self.layer_norm3 = (LayerNorm(width) for _ in range(3))
        self.self_attn, self.cross_attn = Attention(width, heads), Attention(width, heads)
        self.mlp = FeedForward(width, config.intermediate_size, config.hidden_act)

    def attend_image(self, x: Tensor, position: Tensor) -> Tensor:
        """First half: self-attention of image tokens (P, N, D), whose position encoding is (1, N, D)."""
        normed = self.layer_norm1(x)
        return x + self.self_attn.attend_self(normed + position.to(normed.dtype), normed).to(x.dtype)

    def attend_prompt(self, x: Tensor, prompt: Tensor, prompt_mask: Tensor) -> Tensor:
        """Second half: cross-attention to the prompt (P, L, D), then a feed-forward."""
        attended = self.cross_attn.attend_other(self.layer_norm2(x), prompt, prompt, prompt_mask)
        x = x + attended.to(x.dtype)
        output: Tensor = x + self.mlp(self.layer_norm3(x)).to(x.dtype)
        return output


class FusionEncoder(nn.Module):
    """All layers."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.layers: Any = nn.ModuleList(FusionLayer(config) for _ in range(config.num_layers))

    def forward(self, attended: Tensor, position: Tensor, prompt: Tensor, prompt_mask: Tensor) -> Tensor:
        """Fused image tokens (P, N, D) from those after the first half of layer 0."""
        first, *others = self.layers
        x: Tensor = first.attend_prompt(attended, prompt, prompt_mask)
        for layer in others:
            x = layer.attend_prompt(layer.attend_image(x, position), prompt, prompt_mask)
        return x
