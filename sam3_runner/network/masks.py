"""The mask head: pixel features from the pyramid and the fused tokens, and the mask of each query."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from sam3_runner.network import operations
from sam3_runner.network.layers import Attention, LayerNorm, Linear

if TYPE_CHECKING:
    from torch import Tensor

GROUPS = 8
"""Of the pixel decoder's GroupNorms, as in the official model."""


class PixelDecoder(nn.Module):
    """Adds the finer levels of the pyramid to the coarse map, one after the other."""

    def __init__(self, width: int, stages: int) -> None:
        super().__init__()
        self.conv_layers: Any = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(stages))
        self.norms: Any = nn.ModuleList(nn.GroupNorm(GROUPS, width) for _ in range(stages))

    def forward(self, coarse: Tensor, finer: tuple[Tensor, ...]) -> Tensor:
        """(M, D, 4g, 4g) from (M, D, g, g) and the maps of twice and four times its side."""
        x = operations.double_and_add(coarse, finer[0])
        # A checkpoint may have one stage more than there are finer levels.
        stages = zip(self.conv_layers, self.norms, (*finer[1:], None), strict=False)
        for conv, norm, level in stages:
            x = operations.convolve_and_norm(x, conv, norm, level)
        return x


class MaskEmbedder(nn.Module):
    """Three products with ReLU between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers: Any = nn.ModuleList(Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        *hidden, last = self.layers
        for layer in hidden:
            x = operations.linear_relu(x, layer.weight, layer.bias)
        output: Tensor = last(x)
        return output


class MaskHead(nn.Module):
    """Its two halves are functions of their own: the first runs once a pair, the second for kept queries.

    The projection of semantic segmentation is in every checkpoint, and nothing reads it.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.hidden_size
        self.pixel_decoder = PixelDecoder(width, config.num_upsampling_stages)
        self.mask_embedder = MaskEmbedder(width)
        self.instance_projection = nn.Conv2d(width, width, 1)
        self.semantic_projection = nn.Conv2d(width, 1, 1)
        self.prompt_cross_attn = Attention(width, config.num_attention_heads)
        self.prompt_cross_attn_norm = LayerNorm(width)

    def pixel_features(
        self, fused: Tensor, prompt: tuple[Tensor, ...], prompt_valid: Tensor, finer: tuple[Tensor, ...]
    ) -> Tensor:
        """Pixel features (M, D, 4g, 4g) of M pairs.

        Args:
            fused: image tokens, (M, g * g, D).
            prompt: projected keys and values of the prompt.
            prompt_valid: (M, L) bool.
            finer: the pyramid's maps of each pair's image, (M, D, 2g, 2g) and (M, D, 4g, 4g).
        """
        normed = self.prompt_cross_attn_norm(fused)
        attended = self.prompt_cross_attn.attend_other(normed, prompt, prompt_valid)
        side = finer[0].shape[-1] // 2
        coarse = (fused + attended.to(fused.dtype)).unflatten(1, (side, side)).permute(0, 3, 1, 2)
        features: Tensor = self.pixel_decoder(coarse.to(finer[0].dtype), finer)
        return features

    def embed(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Factors (..., D) and offsets (...) of queries (..., D): a mask is factor . features + offset."""
        embedding = self.mask_embedder(queries)
        # The 1x1 instance projection is applied to the queries, not to the pixels, which are many more:
        # e.(Wx + b) = (eW).x + e.b
        weight, bias = self.instance_projection.weight.flatten(1), self.instance_projection.bias
        return embedding @ weight, embedding @ bias


def mask_logits(factor: Tensor, offset: Tensor, features: Tensor) -> Tensor:
    """Mask logits (..., K, h, w) fp32, from `MaskHead.embed` of K queries and pixels (..., D, h, w)."""
    product = factor.to(features.dtype) @ features.flatten(-2)
    return (product.float() + offset[..., None]).unflatten(-1, features.shape[-2:])
