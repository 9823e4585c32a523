"""The fusion encoder: image tokens attend to each other and to the prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from sam3_runner.network import operations
from sam3_runner.network.layers import Attention, FeedForward, LayerNorm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class FusionLayer(nn.Module):
    """Its two halves are functions of their own: the first one of layer 0 does not depend on the prompt."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        self.layer_norm1, self.layer_norm2, self.layer_norm3 = (LayerNorm(width) for _ in range(3))
        self.self_attn, self.cross_attn = Attention(width, heads), Attention(width, heads)
        self.mlp = FeedForward(width, config.intermediate_size, config.hidden_act)

    def attend_image(self, x: Tensor, add: Tensor | None, position: Tensor) -> tuple[Tensor, Tensor]:
        """First half: self-attention of the tokens x + add.

        Args:
            x: image tokens, (P, N, D).
            add: what is to be added to them; None: nothing.
            position: their position encoding, (1, N, D).

        Returns:
            The sum, and what is to be added to it.
        """
        total, normed, positioned = operations.norm(x, self.layer_norm1, add=add, position=position)
        return total, self.self_attn.attend_self(positioned, normed).to(x.dtype)

    def attend_prompt(
        self, x: Tensor, add: Tensor | None, prompt: tuple[Tensor, ...], prompt_valid: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Second half: cross-attention of x + add to the prompt, then a feed-forward.

        Args:
            x: image tokens, (P, N, D).
            add: what is to be added to them; None: nothing.
            prompt: projected keys and values.
            prompt_valid: (P, L) bool.

        Returns:
            The sum, and what is to be added to it.
        """
        x, normed = self.layer_norm2.after_sum(x, add)
        attended = self.cross_attn.attend_other(normed, prompt, prompt_valid)
        x, normed = self.layer_norm3.after_sum(x, attended.to(x.dtype))
        return x, self.mlp(normed).to(x.dtype)


class FusionEncoder(nn.Module):
    """All layers."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.layers: Any = nn.ModuleList(FusionLayer(config) for _ in range(config.num_layers))

    def forward(
        self,
        attended: Tensor,
        position: Tensor,
        prompts: Sequence[tuple[Tensor, ...]],
        prompt_valid: Tensor,
    ) -> Tensor:
        """Fused image tokens (P, N, D).

        Args:
            attended: image tokens after the first half of layer 0, (P, N, D).
            position: their position encoding, (1, N, D).
            prompts: the prompt's keys and values for each layer.
            prompt_valid: (P, L) bool, False for padding.
        """
        first, *others = self.layers
        x, add = first.attend_prompt(attended, None, prompts[0], prompt_valid)
        for layer, prompt in zip(others, prompts[1:], strict=True):
            x, add = layer.attend_image(x, add, position)
            x, add = layer.attend_prompt(x, add, prompt, prompt_valid)
        fused: Tensor = x + add
        return fused
