"""Faster layers for serving. Each computes the same function as the layer that it replaces.

The layers are replaced once, after loading. The server also works without this module, only more slowly.
Training does not use it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's usual alias
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor


def optimize(model: Any) -> None:
    """Replace layers of a `Sam3Model` in place by faster equivalents."""
    for layer in model.vision_encoder.backbone.layers:
        layer.rotary_emb = RotaryTable(layer.rotary_emb, layer.position_ids)
        layer.attention = FusedRotaryAttention(layer.attention)


class RotaryTable(nn.Module):
    """The rotary position encoding of one layer's grid, computed once; transformers does so in every call.

    Attributes:
        freqs_cis: (1, N, 1, 1, head width / 2) complex64, the factor of each pair of channels.
    """

    freqs_cis: Tensor

    def __init__(self, rotary_emb: Any, position_ids: Tensor) -> None:
        super().__init__()
        cos, sin = rotary_emb(position_ids, position_ids)  # each (1, N, head width), every value twice
        freqs_cis = torch.complex(cos[..., ::2], sin[..., ::2])[:, :, None, None]
        self.register_buffer("freqs_cis", freqs_cis, persistent=False)

    def forward(self, _hidden: Tensor, _position_ids: Tensor) -> Tensor:
        """Return `freqs_cis`; it does not depend on the input."""
        return self.freqs_cis


class FusedRotaryAttention(nn.Module):
    """Attention of a vision layer, with one matrix product for q, k and v.

    The rotation is one product of complex numbers in fp32, as in the official model.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.weight = nn.Parameter(torch.cat([each.weight for each in projections]), requires_grad=False)
        self.bias = nn.Parameter(torch.cat([each.bias for each in projections]), requires_grad=False)
        self.o_proj = attention.o_proj
        self._heads, self._scaling = attention.num_attention_heads, attention.scaling

    def forward(self, hidden: Tensor, freqs_cis: Tensor) -> tuple[Tensor, None]:
        """Attend within each of B windows: `hidden` (B, h, w, C), `freqs_cis` of its N = h x w positions."""
        count, height, width, channels = hidden.shape
        shape = (count, height * width, 3, self._heads, channels // self._heads)
        qkv = F.linear(hidden, self.weight, self.bias).view(shape)
        pairs = torch.view_as_complex(qkv[:, :, :2].float().reshape(*shape[:2], 2, self._heads, -1, 2))
        query, key = torch.view_as_real(pairs * freqs_cis).flatten(-2).type_as(qkv).permute(2, 0, 3, 1, 4)
        value = qkv[:, :, 2].transpose(1, 2)
        attended = F.scaled_dot_product_attention(query, key, value, scale=self._scaling)
        output: Tensor = self.o_proj(attended.transpose(1, 2).reshape(hidden.shape))
        return output, None
