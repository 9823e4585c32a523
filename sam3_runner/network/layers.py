"""Layers that several parts of the network share.

A product runs in the dtype of its weights and casts its input. A norm runs in fp32 and returns its input's
dtype. So the dtype of the weights decides the precision of a part, and nothing else does.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import nn

from sam3_runner.network import operations
from sam3_runner.network.operations import split_heads

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

QUICK_GELU_SLOPE = 1.702
"""Of CLIP's approximation of GELU, x * sigmoid(1.702 x)."""


class Linear(nn.Linear):
    """A product in the dtype of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) of any dtype to (..., out)."""
        return operations.linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    """A table of vectors. On the meta device it has no values to begin with."""

    def reset_parameters(self) -> None:
        """Draw the values. For a draw on the meta device torch would load its compiler: seconds of a core."""
        if not self.weight.is_meta:
            super().reset_parameters()


class LayerNorm(nn.LayerNorm):
    """A norm in fp32."""

    def forward(self, x: Tensor, add: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The norm of x + add (..., C), in `dtype`; None: in that of x."""
        return operations.norm(x, self, add=add, dtype=dtype).normed

    def after_shift(self, x: Tensor, shift: Tensor) -> Tensor:
        """The norm of x + shift; `shift` (C,) fp32."""
        return operations.norm(x, self, shift=shift).normed

    def after_sum(self, x: Tensor, add: Tensor | None) -> tuple[Tensor, Tensor]:
        """The sum x + add, and its norm."""
        total, normed, _ = operations.norm(x, self, add=add)
        return total, normed


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

    def rows(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Weight and bias of the products `first` to `last` - 1 of (q, k, v)."""
        rows = slice(first * self.width, last * self.width)
        return self.qkv_proj.weight[rows], self.qkv_proj.bias[rows]

    def project(self, x: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        """The products `first` to `last` - 1 of (q, k, v) of x (B, N, C), each (B, heads, N, C / heads)."""
        return split_heads(operations.linear(x, *self.rows(first, last)), last - first, self.heads)

    def attend_self(self, positioned: Tensor, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Self-attention of (B, N, C), of which `valid` (B, N) bool count: q, k of `positioned`, v of `x`."""
        query, key = self.project(positioned, 0, 2)
        (value,) = self.project(x, 2, 3)
        output: Tensor = self.o_proj(operations.attend(query, key, value, valid))
        return output

    def attend_other(
        self, query: Tensor, keys_and_values: tuple[Tensor, ...], valid: Tensor | None = None
    ) -> Tensor:
        """Cross-attention from (B, N, C) to projected keys and values, of which `valid` (B, M) bool count."""
        (projected,) = self.project(query, 0, 1)
        key, value = keys_and_values
        output: Tensor = self.o_proj(operations.attend(projected, key, value, valid))
        return output


def project_all(
    x: Tensor, attentions: Sequence[Attention], first: int, last: int
) -> list[tuple[Tensor, ...]]:
    """`Attention.project` of the same x for several layers of one width, in one product."""
    weights, biases = zip(*(attention.rows(first, last) for attention in attentions), strict=True)
    product = operations.linear(x, torch.cat(weights), torch.cat(biases))
    parts = last - first
    views = split_heads(product, parts * len(attentions), attentions[0].heads)
    return [views[start : start + parts] for start in range(0, len(views), parts)]


class FeedForward(nn.Module):
    """Two products with an activation between them: `relu`, `gelu` or `quick_gelu`."""

    def __init__(self, width: int, hidden: int, activation: str = "relu") -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C), in the dtype of the weights."""
        output: Tensor = self.fc2(self.hidden(x))
        return output

    def hidden(self, x: Tensor) -> Tensor:
        """The first product and the activation."""
        match self.activation:
            case "gelu":
                return operations.linear_gelu(x, self.fc1.weight, self.fc1.bias)
            case "quick_gelu":
                hidden: Tensor = self.fc1(x)
                return hidden * torch.sigmoid(QUICK_GELU_SLOPE * hidden)
            case _:
                return operations.linear_relu(x, self.fc1.weight, self.fc1.bias)


class Perceptron(nn.Module):
    """Products with ReLU between them.

    Args:
        widths: of the input, of each hidden layer and of the output.
    """

    def __init__(self, *widths: int) -> None:
        super().__init__()
        for number, (before, after) in enumerate(pairwise(widths), 1):
            self.add_module(f"layer{number}", Linear(before, after))

    @property
    def layers(self) -> list[Linear]:
        """The products, in their order."""
        return [each for each in self.children() if isinstance(each, Linear)]

    def forward(self, x: Tensor) -> Tensor:
        """(..., first width) to (..., last width), in the dtype of the weights."""
        *hidden, last = self.layers
        for layer in hidden:
            x = operations.linear_relu(x, layer.weight, layer.bias)
        output: Tensor = last(x)
        return output
