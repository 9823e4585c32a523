"""The layouts of SAM 3's weights files, and the translation of each to `transformers.Sam3Model`.

official        `sam3.pt` of the hub, and files of Meta's training code: `detector.*` or bare keys
transformers    `model.safetensors` of the hub, and fine-tuned ones: `detector_model.*` or bare keys

The names come from the keys of the PyPI package sam3 0.1.4 and of transformers' Sam3Model.
benchmarks/parity.py measures that both models compute the same.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

from sam3_runner.errors import WeightsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor

Layout = Literal["official", "transformers"]

PREFIXES: dict[Layout, tuple[str, ...]] = {
    "official": ("detector.", ""),
    "transformers": ("detector_model.", ""),
}
_MARKER_KEYS: dict[Layout, str] = {
    "official": "backbone.vision_backbone.trunk.patch_embed.proj.weight",
    "transformers": "vision_encoder.backbone.embeddings.patch_embeddings.projection.weight",
}
"""A key of the detector that only this layout has."""

_OTHER_MODEL_PREFIXES: dict[Layout, tuple[str, ...]] = {
    "official": ("tracker.", "inst_interactive_predictor."),
    "transformers": ("tracker_model.", "tracker_neck."),
}
"""Other models in the same file: the video tracker, and the interactive predictor for single objects."""

_UNUSED_KEYS: dict[Layout, re.Pattern[str]] = {
    # The tracker's neck; weights of point prompts, which text prompts do not use; computed tables.
    "official": re.compile(
        r"backbone\.vision_backbone\.sam2_convs\..*"
        r"|geometry_encoder\.points_\w+\..*"
        r"|.*\.attn\.freqs_cis(_real|_imag)?"
    ),
    "transformers": re.compile(r"text_encoder\.text_model\.embeddings\.position_ids"),
}
"""Keys of the detector that `Sam3Model` does not have."""

FOREIGN_CHECKPOINTS = (
    (
        re.compile(r".*\.(interactive_convs|propagation_convs)\..*|tracker\.model\..*"),
        "a SAM 3.1 (multiplex) checkpoint: this server serves SAM 3",
    ),
    (
        re.compile(r"(.*\.)?(image_encoder\.trunk|memory_attention|memory_encoder|sam_mask_decoder)\..*"),
        "a SAM 2 checkpoint: this server serves SAM 3",
    ),
    (
        re.compile(r"(.*\.)?image_encoder\.blocks\..*"),
        "a SAM 1 checkpoint: this server serves SAM 3",
    ),
)
"""Patterns of other models' keys, and what the error message calls each model."""

_FEED_FORWARD = {"linear1": "mlp.fc1", "linear2": "mlp.fc2"}
_FUSION_LAYER = {
    **{f"norm{number}": f"layer_norm{number}" for number in (1, 2, 3)},
    "self_attn": "self_attn",
    "cross_attn_image": "cross_attn",
    **_FEED_FORWARD,
}
_DECODER_LAYER = {
    "cross_attn": "vision_cross_attn",
    "norm1": "vision_cross_attn_layer_norm",
    "self_attn": "self_attn",
    "norm2": "self_attn_layer_norm",
    "ca_text": "text_cross_attn",
    "catext_norm": "text_cross_attn_layer_norm",
    "norm3": "mlp_layer_norm",
    **_FEED_FORWARD,
}
_VISION_LAYER = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn": "attention",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_TEXT_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn": "self_attn",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_NECK_LEVEL = {
    "dconv_2x2": "scale_layers.0",
    "dconv_2x2_0": "scale_layers.0",
    "dconv_2x2_1": "scale_layers.2",
    "conv_1x1": "proj1",
    "conv_3x3": "proj2",
}
_LAYER_STACKS = {
    "backbone.vision_backbone.trunk.blocks": ("vision_encoder.backbone.layers", _VISION_LAYER),
    "backbone.vision_backbone.convs": ("vision_encoder.neck.fpn_layers", _NECK_LEVEL),
    "backbone.language_backbone.encoder.transformer.resblocks": (
        "text_encoder.text_model.encoder.layers",
        _TEXT_LAYER,
    ),
    "geometry_encoder.encode": ("geometry_encoder.layers", _FUSION_LAYER),
    "transformer.encoder.layers": ("detr_encoder.layers", _FUSION_LAYER),
    "transformer.decoder.layers": ("detr_decoder.layers", _DECODER_LAYER),
}
"""Official stack of layers: its name in transformers, and the names of the modules in a layer."""

_MODULES = {
    "backbone.vision_backbone.trunk.patch_embed.proj": (
        "vision_encoder.backbone.embeddings.patch_embeddings.projection"
    ),
    "backbone.vision_backbone.trunk.ln_pre": "vision_encoder.backbone.layer_norm",
    "backbone.language_backbone.encoder.token_embedding": (
        "text_encoder.text_model.embeddings.token_embedding"
    ),
    "backbone.language_backbone.encoder.ln_final": "text_encoder.text_model.final_layer_norm",
    "backbone.language_backbone.resizer": "text_projection",
    **{
        f"geometry_encoder.{name}": f"geometry_encoder.{name}"
        for name in (
            *("label_embed", "cls_embed", "final_proj"),
            *("boxes_direct_project", "boxes_pool_project", "boxes_pos_enc_project"),
        )
    },
    "geometry_encoder.norm": "geometry_encoder.prompt_layer_norm",
    "geometry_encoder.img_pre_norm": "geometry_encoder.vision_layer_norm",
    "geometry_encoder.encode_norm": "geometry_encoder.output_layer_norm",
    "transformer.decoder.norm": "detr_decoder.output_layer_norm",
    "transformer.decoder.query_embed": "detr_decoder.query_embed",
    "transformer.decoder.reference_points": "detr_decoder.reference_points",
    "transformer.decoder.presence_token": "detr_decoder.presence_token",
    "transformer.decoder.presence_token_out_norm": "detr_decoder.presence_layer_norm",
    "segmentation_head.cross_attend_prompt": "mask_decoder.prompt_cross_attn",
    "segmentation_head.cross_attn_norm": "mask_decoder.prompt_cross_attn_norm",
    "segmentation_head.instance_seg_head": "mask_decoder.instance_projection",
    "segmentation_head.semantic_seg_head": "mask_decoder.semantic_projection",
    "dot_prod_scoring.prompt_mlp.out_norm": "dot_product_scoring.text_mlp_out_norm",
    "dot_prod_scoring.prompt_proj": "dot_product_scoring.text_proj",
    "dot_prod_scoring.hs_proj": "dot_product_scoring.query_proj",
}
MLPS = {
    "transformer.decoder.bbox_embed": "detr_decoder.box_head",
    "transformer.decoder.boxRPB_embed_x": "detr_decoder.box_rpb_embed_x",
    "transformer.decoder.boxRPB_embed_y": "detr_decoder.box_rpb_embed_y",
    "transformer.decoder.presence_token_head": "detr_decoder.presence_head",
    "transformer.decoder.ref_point_head": "detr_decoder.ref_point_head",
    "dot_prod_scoring.prompt_mlp": "dot_product_scoring.text_mlp",
}
"""Their `layers.0`, `layers.1` are `layer1`, `layer2` in transformers."""

_NUMBERED_MODULES = {
    "segmentation_head.pixel_decoder.conv_layers": "mask_decoder.pixel_decoder.conv_layers",
    "segmentation_head.pixel_decoder.norms": "mask_decoder.pixel_decoder.norms",
    "segmentation_head.mask_predictor.mask_embed.layers": "mask_decoder.mask_embedder.layers",
}
_BARE_TENSORS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    # The first row belongs to the class token of the pretraining, which the model does not use.
    "backbone.vision_backbone.trunk.pos_embed": (
        "vision_encoder.backbone.embeddings.position_embeddings",
        lambda tensor: tensor[:, 1:],
    ),
    "backbone.language_backbone.encoder.positional_embedding": (
        "text_encoder.text_model.embeddings.position_embedding.weight",
        lambda tensor: tensor,
    ),
    "backbone.language_backbone.encoder.text_projection": (
        "text_encoder.text_projection.weight",
        lambda tensor: tensor.T,
    ),
}
_FUSED_QKV = re.compile(r"(?P<attention>.+)\.(in_proj_|qkv\.)(?P<kind>weight|bias)")
_LAYER_KEY = re.compile(r"(?P<stack>[^\d]+)\.(?P<number>\d+)\.(?P<rest>.+)")


def find_layout(keys: Iterable[str]) -> tuple[Layout, str]:
    """The layout of a checkpoint with these `keys`, and the prefix of its detector's keys.

    Raises:
        WeightsError: it is no SAM 3 image model; the message names the model where it is a known one.
    """
    names = set(keys)
    for pattern, description in FOREIGN_CHECKPOINTS:
        # A SAM 3 file holds the tracker too, whose modules have SAM 2's names.
        if any(pattern.fullmatch(name) for name in names if not _is_sam3_tracker(name)):
            raise WeightsError(f"it is {description}")
    for layout, marker in _MARKER_KEYS.items():
        for prefix in PREFIXES[layout]:
            if prefix + marker in names:
                return layout, prefix
    raise WeightsError(
        "it holds no SAM 3 detector; its first keys: " + (", ".join(sorted(names)[:3]) or "it has none")
    )


def detector_state(state: Mapping[str, Tensor]) -> tuple[Layout, dict[str, Tensor]]:
    """The layout of a checkpoint, and its detector under the keys of `Sam3Model`.

    Keys of the tracker and of point prompts are left out. Unknown keys keep their name, so that a strict
    load reports them. The tensors are views: of a mapped file, nothing is read yet.

    Raises:
        WeightsError: as `find_layout`; or a tensor is there twice, for example with and without prefix.
    """
    layout, prefix = find_layout(state)
    detector: dict[str, Tensor] = {}
    duplicates: set[str] = set()
    for key, tensor in state.items():
        if key.startswith(_OTHER_MODEL_PREFIXES[layout]):
            continue
        name = key.removeprefix(prefix)
        if _UNUSED_KEYS[layout].fullmatch(name):
            continue
        renamed = _from_official(name, tensor) if layout == "official" else {name: tensor}
        duplicates |= detector.keys() & renamed.keys()
        detector.update(renamed)
    if duplicates:
        # Otherwise the order of the keys would decide which one is used.
        raise WeightsError(f"it holds {len(duplicates)} tensors twice: " + ", ".join(sorted(duplicates)[:3]))
    return layout, detector


def _is_sam3_tracker(key: str) -> bool:
    prefixes = ("tracker.", "tracker_model.", "inst_interactive_predictor.")
    return key.startswith(prefixes) and not key.startswith("tracker.model.")


def _from_official(key: str, tensor: Tensor) -> dict[str, Tensor]:
    """The tensors of transformers for one official tensor: one, or three where q, k and v are fused."""
    if key in _BARE_TENSORS:
        name, convert = _BARE_TENSORS[key]
        return {name: convert(tensor)}
    if fused := _FUSED_QKV.fullmatch(key):
        attention = _module(fused["attention"])
        if attention is None or tensor.shape[0] % 3:
            return {key: tensor}
        return {
            f"{attention}.{part}_proj.{fused['kind']}": third
            for part, third in zip("qkv", tensor.chunk(3), strict=True)
        }
    path, _, kind = key.rpartition(".")
    module = _module(path)
    return {key if module is None else f"{module}.{kind}": tensor}


def _module(path: str) -> str | None:
    """The module of transformers for the official one at `path`, or None."""
    if path in _MODULES:
        return _MODULES[path]
    head, _, last = path.rpartition(".")
    if last in {"proj", "out_proj"} and (attention := _module(head)):
        # CLIP's own attention is the only one that keeps this name.
        return f"{attention}.{'out_proj' if attention.startswith('text_encoder') else 'o_proj'}"
    if last.isdecimal():
        stack = head.removesuffix(".layers")
        if stack in MLPS:
            return f"{MLPS[stack]}.layer{int(last) + 1}"
        return f"{_NUMBERED_MODULES[head]}.{last}" if head in _NUMBERED_MODULES else None
    if (layer := _LAYER_KEY.fullmatch(path)) and layer["stack"] in _LAYER_STACKS:
        stack, modules = _LAYER_STACKS[layer["stack"]]
        return f"{stack}.{layer['number']}.{modules[layer['rest']]}" if layer["rest"] in modules else None
    return None
