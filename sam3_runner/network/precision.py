"""Which parts of the network run in which dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from sam3_runner.network.layers import Linear

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sam3_runner.network.model import SAM3Network


def set_precision(network: SAM3Network, dtype: torch.dtype) -> None:
    """Cast the weights of the large products in place; all other weights stay in fp32.

    fp32 are: embeddings, norms, position encodings, rotations, box offsets, presence, scores, and the factors
    of the masks. They are small, and their rounding moves boxes by pixels and scores by thousandths
    (docs/decisions/model.md).
    """
    for part in _large_parts(network):
        for module in part.modules():
            if isinstance(module, Linear | nn.Conv2d | nn.ConvTranspose2d | nn.GroupNorm):
                module.to(dtype)
    if network.position.is_cuda:
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _large_parts(network: SAM3Network) -> Iterator[nn.Module]:
    decoder, masks = network.detr_decoder, network.mask_decoder
    yield from (network.vision_encoder, network.text_encoder, network.text_projection)
    yield from (network.geometry_encoder, network.detr_encoder)
    yield from (decoder.layers, decoder.ref_point_head, decoder.box_rpb_embed_x, decoder.box_rpb_embed_y)
    yield from (masks.pixel_decoder, masks.prompt_cross_attn)
