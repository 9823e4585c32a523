"""Writes the weights of a `Sam3Model` under the official names, as input for the loader.

The inverse of sam3_runner/weights/layouts.py, written independently of it from the key list of Meta's model;
a test compares the names with that list by a digest.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

_TRUNK, _TEXT = "backbone.vision_backbone.trunk", "backbone.language_backbone.encoder"
_NAMES = (
    (r"vision_encoder\.backbone\.embeddings\.patch_embeddings\.projection", rf"{_TRUNK}.patch_embed.proj"),
    (r"vision_encoder\.backbone\.embeddings\.position_embeddings", rf"{_TRUNK}.pos_embed"),
    (r"vision_encoder\.backbone\.layer_norm", rf"{_TRUNK}.ln_pre"),
    (r"vision_encoder\.backbone\.layers\.(\d+)\.layer_norm", rf"{_TRUNK}.blocks.\1.norm"),
    (r"vision_encoder\.backbone\.layers\.(\d+)\.attention\.qkv_proj", rf"{_TRUNK}.blocks.\1.attn.qkv"),
    (r"vision_encoder\.backbone\.layers\.(\d+)\.attention\.o_proj", rf"{_TRUNK}.blocks.\1.attn.proj"),
    (r"vision_encoder\.backbone\.layers\.(\d+)\.mlp", rf"{_TRUNK}.blocks.\1.mlp"),
    (
        r"vision_encoder\.neck\.fpn_layers\.0\.scale_layers\.0",
        r"backbone.vision_backbone.convs.0.dconv_2x2_0",
    ),
    (
        r"vision_encoder\.neck\.fpn_layers\.0\.scale_layers\.2",
        r"backbone.vision_backbone.convs.0.dconv_2x2_1",
    ),
    (r"vision_encoder\.neck\.fpn_layers\.1\.scale_layers\.0", r"backbone.vision_backbone.convs.1.dconv_2x2"),
    (r"vision_encoder\.neck\.fpn_layers\.(\d)\.proj1", r"backbone.vision_backbone.convs.\1.conv_1x1"),
    (r"vision_encoder\.neck\.fpn_layers\.(\d)\.proj2", r"backbone.vision_backbone.convs.\1.conv_3x3"),
    (r"text_encoder\.text_model\.embeddings\.token_embedding", rf"{_TEXT}.token_embedding"),
    (r"text_encoder\.text_model\.embeddings\.position_embedding\.weight", rf"{_TEXT}.positional_embedding"),
    (r"text_encoder\.text_model\.final_layer_norm", rf"{_TEXT}.ln_final"),
    (r"text_encoder\.text_projection\.weight", rf"{_TEXT}.text_projection"),
    (
        r"text_encoder\.text_model\.encoder\.layers\.(\d+)\.self_attn",
        rf"{_TEXT}.transformer.resblocks.\1.attn",
    ),
    (
        r"text_encoder\.text_model\.encoder\.layers\.(\d+)\.layer_norm",
        rf"{_TEXT}.transformer.resblocks.\1.ln_",
    ),
    (
        r"text_encoder\.text_model\.encoder\.layers\.(\d+)\.mlp\.fc1",
        rf"{_TEXT}.transformer.resblocks.\1.mlp.c_fc",
    ),
    (
        r"text_encoder\.text_model\.encoder\.layers\.(\d+)\.mlp\.fc2",
        rf"{_TEXT}.transformer.resblocks.\1.mlp.c_proj",
    ),
    (r"text_projection\.", r"backbone.language_backbone.resizer."),
    (r"geometry_encoder\.prompt_layer_norm", r"geometry_encoder.norm"),
    (r"geometry_encoder\.vision_layer_norm", r"geometry_encoder.img_pre_norm"),
    (r"geometry_encoder\.output_layer_norm", r"geometry_encoder.encode_norm"),
    (r"geometry_encoder\.layers\.", r"geometry_encoder.encode."),
    (r"detr_encoder\.", r"transformer.encoder."),
    (r"detr_decoder\.output_layer_norm", r"transformer.decoder.norm"),
    (r"detr_decoder\.presence_layer_norm", r"transformer.decoder.presence_token_out_norm"),
    (r"detr_decoder\.presence_head", r"transformer.decoder.presence_token_head"),
    (r"detr_decoder\.box_head", r"transformer.decoder.bbox_embed"),
    (r"detr_decoder\.box_rpb_embed_", r"transformer.decoder.boxRPB_embed_"),
    (r"detr_decoder\.", r"transformer.decoder."),
    (r"mask_decoder\.prompt_cross_attn_norm", r"segmentation_head.cross_attn_norm"),
    (r"mask_decoder\.prompt_cross_attn", r"segmentation_head.cross_attend_prompt"),
    (r"mask_decoder\.instance_projection", r"segmentation_head.instance_seg_head"),
    (r"mask_decoder\.semantic_projection", r"segmentation_head.semantic_seg_head"),
    (r"mask_decoder\.mask_embedder", r"segmentation_head.mask_predictor.mask_embed"),
    (r"mask_decoder\.pixel_decoder", r"segmentation_head.pixel_decoder"),
    (r"dot_product_scoring\.text_mlp_out_norm", r"dot_prod_scoring.prompt_mlp.out_norm"),
    (r"dot_product_scoring\.text_mlp", r"dot_prod_scoring.prompt_mlp"),
    (r"dot_product_scoring\.text_proj", r"dot_prod_scoring.prompt_proj"),
    (r"dot_product_scoring\.query_proj", r"dot_prod_scoring.hs_proj"),
)
_LAYER_NAMES = (
    (r"(geometry_encoder\.encode\.\d+|transformer\.encoder\.layers\.\d+)\.layer_norm", r"\1.norm"),
    (
        r"(geometry_encoder\.encode\.\d+|transformer\.encoder\.layers\.\d+)\.cross_attn",
        r"\1.cross_attn_image",
    ),
    (r"(transformer\.decoder\.layers\.\d+)\.vision_cross_attn_layer_norm", r"\1.norm1"),
    (r"(transformer\.decoder\.layers\.\d+)\.self_attn_layer_norm", r"\1.norm2"),
    (r"(transformer\.decoder\.layers\.\d+)\.mlp_layer_norm", r"\1.norm3"),
    (r"(transformer\.decoder\.layers\.\d+)\.text_cross_attn_layer_norm", r"\1.catext_norm"),
    (r"(transformer\.decoder\.layers\.\d+)\.text_cross_attn", r"\1.ca_text"),
    (r"(transformer\.decoder\.layers\.\d+)\.vision_cross_attn", r"\1.cross_attn"),
    (r"(geometry_encoder\.encode\.\d+|transformer\.\w+\.layers\.\d+)\.mlp\.fc", r"\1.linear"),
    (r"\.o_proj", ".out_proj"),
    (r"\.qkv_proj\.", ".in_proj_"),
)
EXTRA_SHAPES = {
    "geometry_encoder.points_direct_project.weight": (256, 2),
    "geometry_encoder.points_direct_project.bias": (256,),
    "geometry_encoder.points_pool_project.weight": (256, 256),
    "geometry_encoder.points_pool_project.bias": (256,),
    "geometry_encoder.points_pos_enc_project.weight": (256, 256),
    "geometry_encoder.points_pos_enc_project.bias": (256,),
    **{
        f"backbone.vision_backbone.trunk.blocks.{block}.attn.freqs_cis": (
            5184 if block in {7, 15, 23, 31} else 576,
            32,
        )
        for block in range(32)
    },
}
"""Tensors of the official model of full size that `Sam3Model` does not have."""

TRACKER = {
    "tracker.maskmem_backbone.fuser.layers.0.gamma": (8,),
    "tracker.sam_mask_decoder.iou_token.weight": (1, 8),
}


def as_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a `Sam3Model`, under the official model's bare names and in its shapes."""
    official: dict[str, Tensor] = {}
    for name, tensor in _fused(state).items():
        renamed = _official_name(name)
        if renamed.endswith("trunk.pos_embed"):
            tensor = torch.cat([torch.ones_like(tensor[:, :1]), tensor], dim=1)  # noqa: PLW2901
        elif renamed.endswith("encoder.text_projection"):
            tensor = tensor.T.contiguous()  # noqa: PLW2901
        official[renamed] = tensor
    return official


def _fused(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with q, k and v of each attention concatenated."""
    fused: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".q_proj." in name:
            parts = [state[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            fused[name.replace(".q_proj.", ".qkv_proj.")] = torch.cat(parts)
        elif ".k_proj." not in name and ".v_proj." not in name:
            fused[name] = tensor
    return fused


def _official_name(name: str) -> str:
    for pattern, official in _NAMES:
        renamed, found = re.subn(f"^{pattern}", official, name)
        if found:
            name = renamed
            break
    for pattern, official in _LAYER_NAMES:
        name = re.sub(pattern, official, name)
    mlp_layer = r"(bbox_embed|boxRPB_embed_[xy]|presence_token_head|ref_point_head|prompt_mlp)\.layer(\d)"
    return re.sub(mlp_layer, lambda found: f"{found[1]}.layers.{int(found[2]) - 1}", name)
