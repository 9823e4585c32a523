"""Faster layers for serving, each the same function as the one it replaces; put in once, after loading.

Removing this file would leave a working, slower server. Training never sees it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name that every PyTorch reader knows
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor


def optimize(model: Any) -> None:
    """Replace, in place, what has a faster equal."""
    for layer in model.vision_encoder.backbone.layers:
        layer.rotary_emb = RotaryTable(layer.rotary_emb, layer.position_ids)
        layer.attention = FusedRotaryAttention(layer.attention)


class RotaryTable(nn.Module):
    """The rotary position encoding of one layer's grid, computed once: transformers does it in every call.

    Attributes:
        turns: (1, N, 1, 1, head width / 2) complex64, what each pair of channels is multiplied by.
    """

    turns: Tensor

    def __init__(self, rotary_emb: Any, position_ids: Tensor) -> None:
        super().__init__()
        cos, sin = rotary_emb(position_ids, position_ids)  # each (1, N, head width), every value twice
        turns = torch.complex(cos[..., ::2], sin[..., ::2])[:, :, None, None]
        self.register_buffer("turns", turns, persistent=False)

    def forward(self, _hidden: Tensor, _position_ids: Tensor) -> Tensor:
        """The table, whatever the input."""
        return self.turns


class FusedRotaryAttention(nn.Module):
    """Attention of a vision layer, with one matrix product for q, k and v.

    The rotation is one product of complex numbers in fp32, as the official model does it.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.weight = nn.Parameter(torch.cat([part.weight for part in parts]), requires_grad=False)
        self.bias = nn.Parameter(torch.cat([part.bias for part in parts]), requires_grad=False)
        self.o_proj = attention.o_proj
        self._heads, self._scaling = attention.num_attention_heads, attention.scaling

    def forward(self, hidden: Tensor, turns: Tensor) -> tuple[Tensor, None]:
        """Attend within each of B windows: `hidden` (B, h, w, C), `turns` of its N = h x w places."""
        count, height, width, channels = hidden.shape
        shape = (count, height * width, 3, self._heads, channels // self._heads)
        qkv = F.linear(hidden, self.weight, self.bias).view(shape)
        pairs = torch.view_as_complex(qkv[:, :, :2].float().reshape(*shape[:2], 2, self._heads, -1, 2))
        query, key = torch.view_as_real(pairs * turns).flatten(-2).type_as(qkv).permute(2, 0, 3, 1, 4)
        value = qkv[:, :, 2].transpose(1, 2)
        attended = F.scaled_dot_product_attention(query, key, value, scale=self._scaling)
        output: Tensor = self.o_proj(attended.transpose(1, 2).reshape(hidden.shape))
        return output, None
