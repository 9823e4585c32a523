"""Steps of the forward that have a kernel of their own on a GPU, each with its definition in plain PyTorch.

The definition runs on a CPU, in fp32, and where gradients are needed. The kernel computes the same in half
precision, in fewer passes over the memory. Callers do not know which one runs.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - torch's usual alias

from sam3_runner.network.positions import rotate, sine_of_boxes

try:
    from sam3_runner.network import kernels
except ImportError:  # PyTorch's build for CPUs comes without Triton
    HAS_TRITON = False
else:
    HAS_TRITON = True

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

STEPS = frozenset(
    {
        *("patches", "gelu", "relu", "rotary", "residual", "norm", "attention", "grid_attention"),
        *("box_bias", "boxes", "group_norm"),
    }
)
"""Names of the steps with a kernel."""

plain_steps: set[str] = set()
"""Those whose definition runs instead: for comparisons, or all where kernels cannot be compiled."""

BOX_EPS = 1e-3
"""The official model's bound of a box's side before the inverse sigmoid."""
_DISTANCE_SCALE = 8.0
"""Of the logarithmic distances, as in the official model: log2(8 d + 1) / log2(8)."""
_MIN_PRODUCT_ROWS = 1024
"""The product kernel's tiles of 128 x 256 do not suit fewer rows."""
_MIN_ATTENTION_ROWS = 16
"""PyTorch's kernels split the keys of fewer queries among programs; ours does not."""


def _has_kernel(step: str, tensor: Tensor) -> bool:
    """Whether the step's kernel takes `tensor`, an input or a weight."""
    return (
        HAS_TRITON
        and tensor.is_cuda
        and tensor.dtype in {torch.float16, torch.bfloat16}
        and not torch.is_grad_enabled()
        and step not in plain_steps
    )


def _are_powers_of_2(*sizes: int) -> bool:
    """Triton's blocks have such sizes; other models than SAM 3 of the official size may not."""
    return all(size & (size - 1) == 0 for size in sizes)


def _in_16_bytes(*sizes: int) -> bool:
    """Whether rows of so many 2-byte values begin at multiples of 16 bytes, as the product kernel needs."""
    return all(size % 8 == 0 for size in sizes)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product of x (..., in) of any dtype with `weight` (out, in), in the weight's dtype."""
    return F.linear(x.to(weight.dtype), weight, bias)


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """ReLU of `linear`; on a GPU in the same kernel."""
    if _has_kernel("relu", weight):
        rows = x.to(weight.dtype).reshape(-1, x.shape[-1])
        product = torch.ops.aten._addmm_activation(bias, rows, weight.T)  # noqa: SLF001 - no public name
        return product.view(*x.shape[:-1], -1)
    return F.relu(linear(x, weight, bias))


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU of `linear`; the kernel's tanh form differs by less than half precision's rounding."""
    many = x.numel() >= _MIN_PRODUCT_ROWS * x.shape[-1]
    if _has_kernel("gelu", weight) and many and _in_16_bytes(*weight.shape):
        return kernels.product(x.to(weight.dtype), weight, bias, gelu=True)
    return F.gelu(linear(x, weight, bias))


def add_product(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """The sum x + y @ weight.T, in the dtype of x; the kernel overwrites x."""
    if _has_kernel("residual", x) and x.dtype == weight.dtype:
        x.view(-1, x.shape[-1]).addmm_(y.reshape(-1, y.shape[-1]), weight.T)
        return x
    return x + linear(y, weight).to(x.dtype)


def split_heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """`parts` views (B, heads, N, d) of x (B, N, parts * heads * d)."""
    views: tuple[Tensor, ...] = x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return views


def rotated_qkv(x: Tensor, projection: nn.Linear, heads: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """q, k and v, each (B, heads, N, d), of x (B, N, C); q and k rotated.

    Args:
        x: normed tokens.
        projection: the product of q, k and v.
        heads: of the attention.
        cos: of the rotary angles, (N, d / 2) fp32.
        sin: likewise.
    """
    weight, bias = projection.weight, projection.bias
    rotated = 2 * x.shape[-1]
    # A tile of columns is rotated as a whole or not at all.
    if (
        _has_kernel("rotary", weight)
        and rotated % kernels.TILE_COLUMNS == 0
        and _are_powers_of_2(cos.shape[-1])
    ):
        return split_heads(
            kernels.product(x.to(weight.dtype), weight, bias, cos=cos, sin=sin, rotated=rotated), 3, heads
        )
    query, key, value = split_heads(linear(x, weight, bias), 3, heads)
    return rotate(query, cos, sin), rotate(key, cos, sin), value


def patches(pixels: Tensor, grid: int, window: int, dtype: torch.dtype) -> Tensor:
    """Patches of pixels (B, 3, S, S) uint8, in window order and normalised to -1..1, in `dtype`.

    Returns:
        (B, grid * grid, 3 * p * p), p = S / grid, and zeros up to a multiple of 8 values, which lets the
        product read 16 bytes at a time.
    """
    count, side = grid // window, pixels.shape[-1] // grid
    if HAS_TRITON and pixels.is_cuda and dtype != torch.float32 and "patches" not in plain_steps:
        return kernels.patches(pixels, grid, window, side, dtype)
    cells = pixels.reshape(-1, 3, count, window, side, count, window, side).permute(0, 2, 5, 3, 6, 1, 4, 7)
    # mean = std = 0.5, as in the official processor.
    rows = cells.reshape(-1, grid**2, 3 * side * side).float() / 127.5 - 1.0
    return F.pad(rows.to(dtype), (0, -rows.shape[-1] % 8))


def attend(query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None = None) -> Tensor:
    """Attention of q, k and v (B, heads, N, d), to (B, N, heads * d).

    Args:
        query: (B, heads, N, d).
        key: (B, heads, M, d), as `value`.
        value: likewise.
        valid: (B, M) bool, False for keys that do not count.
    """
    many = query.shape[2] >= _MIN_ATTENTION_ROWS
    if _has_kernel("attention", query) and many and _are_powers_of_2(query.shape[-1]):
        return kernels.attend(query, key, value, valid).flatten(2)
    mask = None if valid is None else valid[:, None, None, :]
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return attended.transpose(1, 2).flatten(2)


def attend_grid(query: Tensor, key: Tensor, value: Tensor, along_y: Tensor, along_x: Tensor) -> Tensor:
    """Attention of queries to the cells of a grid, with a bias by `box_bias`, to (P, 1 + Q, heads * d).

    Args:
        query: (P, heads, 1 + Q, d); row 0, the presence token, has no bias.
        key: (P, heads, g * g, d), as `value`.
        value: likewise.
        along_y: (P, heads, Q, g); the bias of a cell is that of its row plus that of its column.
        along_x: likewise.
    """
    if (
        _has_kernel("grid_attention", query)
        and along_y.shape[-1] % kernels.PATCH == 0
        and _are_powers_of_2(query.shape[-1])
    ):
        return kernels.attend_grid(query, key, value, along_y, along_x).flatten(2)
    bias = (along_y[..., :, None] + along_x[..., None, :]).flatten(3).to(query.dtype)
    # Contiguous, since PyTorch chooses a slow kernel otherwise.
    bias = F.pad(bias, (0, 0, 1, 0)).contiguous()
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return attended.transpose(1, 2).flatten(2)


class Normed(NamedTuple):
    """What `norm` returns.

    Attributes:
        total: x + add.
        normed: its norm.
        positioned: the norm plus the position encoding; without one, the norm.
    """

    total: Tensor
    normed: Tensor
    positioned: Tensor


def norm(
    x: Tensor,
    layer: nn.LayerNorm,
    *,
    add: Tensor | None = None,
    shift: Tensor | None = None,
    position: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Normed:
    """The norm of x + add + shift, in fp32.

    Args:
        x: (..., C).
        layer: its weights and eps.
        add: of the shape of x, or of its last dimensions.
        shift: (C,) fp32, added for the norm alone: it is not part of `total`.
        position: (1, N, C), added to the norm.
        dtype: of the norm; None: that of x.
    """
    if _has_kernel("norm", x) and _are_powers_of_2(x.shape[-1]):
        return Normed(*kernels.norm(x, layer.weight, layer.bias, layer.eps, add, shift, position, dtype))
    total = x if add is None else x + add.to(x.dtype)
    wide = total.float() if shift is None else total.float() + shift
    normed = F.layer_norm(wide, layer.normalized_shape, layer.weight, layer.bias, layer.eps)
    normed = normed.to(dtype or x.dtype)
    return Normed(total, normed, normed if position is None else normed + position.to(normed.dtype))


def refined_boxes(
    offset: Tensor | None, reference: Tensor, like: Tensor, periods: Tensor
) -> tuple[Tensor, Tensor]:
    """Boxes moved by offsets of their logits, and their sine encoding.

    Args:
        offset: (P, 1 + Q, 4), of which row 0 is the presence token's; None: the boxes stay.
        reference: (P, Q, 4) fp32, cx cy w h in 0..1.
        like: a tensor of the dtype of the encoding.
        periods: of the encoding, (D / 2,).

    Returns:
        Boxes (P, Q, 4) fp32, cx cy w h in 0..1, and their encoding (P, Q, 2 * D).
    """
    if _has_kernel("boxes", like) and _are_powers_of_2(len(periods)):
        return kernels.refined_boxes(offset, reference, 2 * len(periods), like.dtype)
    if offset is not None:
        reference = (inverse_sigmoid(reference) + offset[:, 1:].float()).sigmoid()
    return reference, sine_of_boxes(reference, periods).to(like.dtype)


def inverse_sigmoid(boxes: Tensor) -> Tensor:
    """Logits of boxes in 0..1, bounded as in the official model."""
    bounded = boxes.clamp(0.0, 1.0)
    return torch.log(bounded.clamp(min=BOX_EPS) / (1.0 - bounded).clamp(min=BOX_EPS))


def box_bias(
    boxes: Tensor, x_layers: Sequence[nn.Linear], y_layers: Sequence[nn.Linear], line: Tensor, like: Tensor
) -> tuple[Tensor, Tensor]:
    """The bias of attention from queries to a grid's rows and columns, by their distances to a box's sides.

    Args:
        boxes: (P, Q, 4), cx cy w h in 0..1.
        x_layers: two products for the columns' distances, with ReLU between them.
        y_layers: likewise for the rows.
        line: position of each row or column, (g,) in 0..1.
        like: a tensor of the dtype of the attention.

    Returns:
        Of rows and of columns, each (P, heads, Q, g).
    """
    if (
        _has_kernel("box_bias", like)
        and x_layers[1].out_features <= kernels.MAX_HEADS
        and _are_powers_of_2(x_layers[1].in_features)
    ):
        return kernels.box_bias(boxes, x_layers, y_layers, len(line))
    center_x, center_y, width, height = boxes.unbind(-1)
    return (
        _axis_bias(_distances(line, center_y, height), *y_layers),
        _axis_bias(_distances(line, center_x, width), *x_layers),
    )


def _distances(line: Tensor, center: Tensor, size: Tensor) -> Tensor:
    """Logarithmic distances from g cells to both sides of boxes along one axis, (P, Q, g, 2)."""
    sides = torch.stack((center - size / 2, center + size / 2), dim=-1)
    scaled = (line[:, None] - sides[:, :, None]) * _DISTANCE_SCALE
    return scaled.sign() * torch.log2(scaled.abs() + 1.0) / math.log2(_DISTANCE_SCALE)


def _axis_bias(distances: Tensor, first: nn.Linear, second: nn.Linear) -> Tensor:
    hidden = linear_relu(distances, first.weight, first.bias)
    return linear(hidden, second.weight, second.bias).permute(0, 3, 1, 2)


def convolve_and_norm(x: Tensor, conv: nn.Conv2d, layer: nn.GroupNorm, finer: Tensor | None = None) -> Tensor:
    """ReLU of the norm of a convolution of x; with `finer`, doubled and added to it.

    Args:
        x: (M, D, h, w).
        conv: 3 x 3, from D to D channels.
        layer: its weights and eps.
        finer: (M, D, 2h, 2w).
    """
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    if _has_kernel("group_norm", x) and channels_last and _are_powers_of_2(x.shape[1], layer.num_groups):
        assert conv.bias is not None
        product = F.conv2d(x, conv.weight, padding=1).contiguous(memory_format=torch.channels_last)
        return kernels.group_norm_relu(
            product, conv.bias, layer.num_groups, layer.weight, layer.bias, layer.eps, finer
        )
    x = F.conv2d(x, conv.weight, conv.bias, padding=1)
    x = F.relu(F.group_norm(x, layer.num_groups, layer.weight, layer.bias, layer.eps))
    return x if finer is None else double_and_add(x, finer)


def double_and_add(x: Tensor, finer: Tensor) -> Tensor:
    """Each cell of x (M, D, h, w) as four, plus `finer` (M, D, 2h, 2w)."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest") + finer
