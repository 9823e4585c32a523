"""The vision encoder: a transformer over patches, mostly in windows, and a pyramid of feature maps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's usual alias
from torch import nn

from sam3_runner.network import operations
from sam3_runner.network.layers import Attention, FeedForward, LayerNorm
from sam3_runner.network.positions import rotary_angles

if TYPE_CHECKING:
    from torch import Tensor

READ_LEVELS = 3
"""The neck's first levels. Every checkpoint has one more, at half the grid, which nothing reads."""


class VisionLayer(nn.Module):
    """Attention within each sequence, then a feed-forward."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.hidden_size
        self.layer_norm1 = LayerNorm(width, eps=config.layer_norm_eps)
        self.attention = Attention(width, config.num_attention_heads)
        self.layer_norm2 = LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = FeedForward(width, config.intermediate_size, config.hidden_act)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, shifts: Tensor) -> Tensor:
        """S sequences; may overwrite x.

        Args:
            x: (S, N, C), without the biases of `Backbone.shifts`.
            cos: rotary table of the N positions, (N, head width / 2) fp32, as `sin`.
            sin: likewise.
            shifts: the sum of those biases before each of the two norms, (2, C) fp32.
        """
        attention, mlp = self.attention, self.mlp
        normed = self.layer_norm1.after_shift(x, shifts[0])
        qkv = operations.rotated_qkv(normed, attention.qkv_proj, attention.heads, cos, sin)
        x = operations.add_product(x, operations.attend(*qkv), attention.o_proj.weight)
        hidden = mlp.hidden(self.layer_norm2.after_shift(x, shifts[1]))
        return operations.add_product(x, hidden, mlp.fc2.weight)


class Embeddings(nn.Module):
    """Parameters of the patches and of their positions."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.patch_embeddings = nn.Module()
        self.patch_embeddings.projection = nn.Conv2d(
            config.num_channels, config.hidden_size, config.patch_size, stride=config.patch_size, bias=False
        )
        side = config.pretrain_image_size // config.patch_size
        self.position_embeddings = nn.Parameter(torch.zeros(1, side * side, config.hidden_size))


class Backbone(nn.Module):
    """The transformer. Tokens are in window order through all layers, so that no layer reorders them.

    Window order: the windows row by row, and the cells of a window row by row. Attention does not depend on
    the order of tokens, so a global layer needs only rotary tables in the same order.

    Attributes:
        grid: cells on a side.
        window: cells on a side of a window; divides the grid.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embeddings: Any = Embeddings(config)
        self.layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers: Any = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))
        self.grid, self.window = config.image_size // config.patch_size, config.window_size
        self._global_layers = frozenset(config.global_attn_indexes)
        self._add_rotary_tables(config)

    def forward(self, pixels: Tensor) -> Tensor:
        """Image tokens (B, g * g, C), row by row, of pixels (B, 3, S, S) uint8."""
        shifts = self.shifts()
        x = self._embed(pixels)
        for number, layer in enumerate(self.layers):
            shift = shifts[2 * number : 2 * number + 2]
            if number in self._global_layers:
                x = layer(x, self.global_cos, self.global_sin, shift)
            else:
                windows = x.view(-1, self.window**2, x.shape[-1])
                x = layer(windows, self.window_cos, self.window_sin, shift).view(x.shape)
        return self._from_windows(x + shifts[-1].to(x.dtype))

    def shifts(self) -> Tensor:
        """Sums of the biases of o_proj and fc2 before each norm and after all layers, (2 layers + 1, C) fp32.

        A layer adds only its products to the tokens, in place; the norms add the biases to what they read.
        """
        biases = [bias for layer in self.layers for bias in (layer.attention.o_proj.bias, layer.mlp.fc2.bias)]
        return F.pad(torch.stack(biases).float().cumsum(0), (0, 0, 1, 0))

    def _add_rotary_tables(self, config: Any) -> None:
        head_width = config.hidden_size // config.num_attention_heads
        theta = config.rope_parameters["rope_theta"]
        of_window = rotary_angles(self.window, head_width, theta, 1.0)
        of_grid = rotary_angles(self.grid, head_width, theta, self.window / self.grid)
        for name, angles in (("window", of_window), ("global", self._to_windows(of_grid[None])[0])):
            self.register_buffer(f"{name}_cos", angles.cos(), persistent=False)
            self.register_buffer(f"{name}_sin", angles.sin(), persistent=False)

    def _embed(self, pixels: Tensor) -> Tensor:
        """The norm of patches with their positions, (B, g * g, C) in window order."""
        weight = self.embeddings.patch_embeddings.projection.weight.flatten(1)
        patches = operations.patches(pixels, self.grid, self.window, weight.dtype)
        tokens = F.linear(patches, F.pad(weight, (0, patches.shape[-1] - weight.shape[-1])))
        return self.layer_norm(tokens, self._positions().to(tokens.dtype))

    def _positions(self) -> Tensor:
        """Position embeddings in window order, (1, g * g, C)."""
        table = self.embeddings.position_embeddings
        side = round(table.shape[1] ** 0.5)
        # The grid of the pretraining is repeated, as in the official model.
        repeats = -(-self.grid // side)
        tiled = table.view(side, side, -1).repeat(repeats, repeats, 1)[: self.grid, : self.grid]
        return self._to_windows(tiled.reshape(1, self.grid**2, -1))

    def _to_windows(self, x: Tensor) -> Tensor:
        """(B, g * g, C) from rows to window order."""
        count = self.grid // self.window
        return x.unflatten(1, (count, self.window, count, self.window)).transpose(2, 3).flatten(1, 4)

    def _from_windows(self, x: Tensor) -> Tensor:
        """(B, g * g, C) from window order to rows."""
        count = self.grid // self.window
        return x.unflatten(1, (count, count, self.window, self.window)).transpose(2, 3).flatten(1, 4)


class NeckLevel(nn.Module):
    """One level of the pyramid: `scale` times the grid, (B, C, g, g) to (B, D, scale * g, scale * g)."""

    def __init__(self, width: int, output_width: int, scale: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if scale == 4.0:
            layers = [_doubled(width, width // 2), nn.GELU(), _doubled(width // 2, width // 4)]
            width //= 4
        elif scale == 2.0:
            layers = [_doubled(width, width // 2)]
            width //= 2
        self.scale_layers = nn.ModuleList(layers)
        self.proj1 = nn.Conv2d(width, output_width, 1)
        self.proj2 = nn.Conv2d(output_width, output_width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        for layer in self.scale_layers:
            x = layer(x)
        output: Tensor = self.proj2(self.proj1(x))
        return output


class Neck(nn.Module):
    """The pyramid of feature maps."""

    def __init__(self, width: int, output_width: int, scales: list[float]) -> None:
        super().__init__()
        self.fpn_layers: Any = nn.ModuleList(NeckLevel(width, output_width, scale) for scale in scales)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, C, g, g) to maps (B, D, 4g, 4g), (B, D, 2g, 2g) and (B, D, g, g)."""
        return tuple(level(x) for level in self.fpn_layers[:READ_LEVELS])


class VisionEncoder(nn.Module):
    """Pixels to the pyramid."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.backbone = Backbone(config.backbone_config)
        width = config.backbone_config.hidden_size
        self.neck = Neck(width, config.fpn_hidden_size, config.scale_factors)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, S, S) uint8 RGB to the maps of `Neck`."""
        tokens = self.backbone(pixels)
        dtype = self.neck.fpn_layers[0].proj1.weight.dtype
        # (B, g, g, C) seen as (B, C, g, g): channels last, without a copy.
        grid = tokens.to(dtype).unflatten(1, (self.backbone.grid, -1)).permute(0, 3, 1, 2)
        maps: tuple[Tensor, ...] = self.neck(grid)
        return maps


def _doubled(width: int, output_width: int) -> nn.Module:
    return nn.ConvTranspose2d(width, output_width, 2, stride=2)
