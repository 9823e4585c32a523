"""Layers that several parts of the network share.

A product runs in the dtype of its weights and casts its input. A norm runs in fp32 and returns its input's
dtype. So the dtype of the weights decides the precision of a part, and nothing else does.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 - torch's usual alias
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

QUICK_GELU_SLOPE = 1.702
"""Of CLIP's approximation of GELU, x * sigmoid(1.702 x)."""


class Linear(nn.Linear):
    """A product in the dtype of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) of any dtype to (..., out)."""
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """A norm in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C) of the same dtype."""
        return F.layer_norm(x.float(), self.normalized_shape, self.weight, self.bias, self.eps).to(x.dtype)


class Attention(nn.Module):
    """Attention with several heads. q, k and v are rows of one weight, so equal inputs share a product.

    Args:
        width: of the tokens.
        heads: divide the width.

    Raises:
        ValueError: they do not.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"{width} channels cannot be divided among {heads} heads")
        self.qkv_proj = Linear(width, 3 * width)
        self.o_proj = Linear(width, width)
        self.width, self.heads = width, heads

    def project(self, x: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        """The products `first` to `last` - 1 of (q, k, v) of x (B, N, C), each (B, heads, N, C / heads)."""
        rows = slice(first * self.width, last * self.width)
        weight, bias = self.qkv_proj.weight[rows], self.qkv_proj.bias[rows]
        projected = F.linear(x.to(weight.dtype), weight, bias)
        return projected.unflatten(-1, (last - first, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, N, C) from projected q, k and v; `mask` is bool, or a bias in their dtype."""
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        output: Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return output

    def attend_self(self, positioned: Tensor, x: Tensor) -> Tensor:
        """Self-attention of (B, N, C): q and k from `positioned`, v from `x`."""
        query, key = self.project(positioned, 0, 2)
        (value,) = self.project(x, 2, 3)
        return self.attend(query, key, value)

    def attend_other(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Cross-attention from (B, N, C) to `key` and `value` (B, M, C)."""
        (projected,) = self.project(query, 0, 1)
        if key is value:
            projected_key, projected_value = self.project(key, 1, 3)
        else:
            (projected_key,), (projected_value,) = self.project(key, 1, 2), self.project(value, 2, 3)
        return self.attend(projected, projected_key, projected_value, mask)


class FeedForward(nn.Module):
    """Two products with an activation between them.

    Attributes:
        activation: `relu`, `gelu`, `quick_gelu`, or `gelu_tanh`, which a GPU computes inside the product.
    """

    def __init__(self, width: int, hidden: int, activation: str = "relu") -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C), in the dtype of the weights."""
        output: Tensor = self.fc2(self._hidden(x))
        return output

    def _hidden(self, x: Tensor) -> Tensor:
        match self.activation:
            case "gelu_tanh":
                rows = x.to(self.fc1.weight.dtype).flatten(0, -2)
                hidden: Tensor = torch.ops.aten._addmm_activation(  # noqa: SLF001 - the only way to this epilogue
                    self.fc1.bias, rows, self.fc1.weight.T, use_gelu=True
                )
                return hidden.unflatten(0, x.shape[:-1])
            case "gelu":
                return F.gelu(self.fc1(x))
            case "quick_gelu":
                hidden = self.fc1(x)
                return hidden * torch.sigmoid(QUICK_GELU_SLOPE * hidden)
            case _:
                return F.relu(self.fc1(x))


class Perceptron(nn.Module):
    """Products with ReLU between them.

    Args:
        widths: of the input, of each hidden layer and of the output.
    """

    def __init__(self, *widths: int) -> None:
        super().__init__()
        for number, (before, after) in enumerate(pairwise(widths), 1):
            self.add_module(f"layer{number}", Linear(before, after))

    def forward(self, x: Tensor) -> Tensor:
        """(..., first width) to (..., last width), in the dtype of the weights."""
        *hidden, last = self.children()
        for layer in hidden:
            x = F.relu(layer(x))
        output: Tensor = last(x)
        return output
