"""The layouts that SAM 3's weights are passed round in, and the way from each to `transformers.Sam3Model`.

official        `sam3.pt` of the hub, and what Meta's training code writes: `detector.*` or bare keys
transformers    `model.safetensors` of the hub, and fine-tuned ones: `detector_model.*` or bare keys

Read off the keys of the PyPI package sam3 0.1.4 and of transformers' Sam3Model; that the two then
compute the same is measured by benchmarks/parity.py.
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
_SIGNS: dict[Layout, str] = {
    "official": "backbone.vision_backbone.trunk.patch_embed.proj.weight",
    "transformers": "vision_encoder.backbone.embeddings.patch_embeddings.projection.weight",
}
"""One key of the detector that tells its layout."""

_OTHERS_PARTS: dict[Layout, tuple[str, ...]] = {
    "official": ("tracker.", "inst_interactive_predictor."),
    "transformers": ("tracker_model.", "tracker_neck."),
}
"""Whole models that lie in the same file: the video tracker, and clicks on single objects."""

_UNUSED: dict[Layout, re.Pattern[str]] = {
    # The tracker's neck; weights of point prompts, which text never reaches; tables that are computed.
    "official": re.compile(
        r"backbone\.vision_backbone\.sam2_convs\..*"
        r"|geometry_encoder\.points_\w+\..*"
        r"|.*\.attn\.freqs_cis(_real|_imag)?"
    ),
    "transformers": re.compile(r"text_encoder\.text_model\.embeddings\.position_ids"),
}
"""Keys of the detector that have no place in `Sam3Model`."""

_STRANGERS = (
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
"""Families that are taken for SAM 3 by mistake, and what to say of them."""

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
_LAYERED = {
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
"""Official stack of layers: that of transformers, and the names of the modules in a layer."""

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
_PERCEPTRONS = {
    "transformer.decoder.bbox_embed": "detr_decoder.box_head",
    "transformer.decoder.boxRPB_embed_x": "detr_decoder.box_rpb_embed_x",
    "transformer.decoder.boxRPB_embed_y": "detr_decoder.box_rpb_embed_y",
    "transformer.decoder.presence_token_head": "detr_decoder.presence_head",
    "transformer.decoder.ref_point_head": "detr_decoder.ref_point_head",
    "dot_prod_scoring.prompt_mlp": "dot_product_scoring.text_mlp",
}
"""Official `layers.0`, `layers.1` are `layer1`, `layer2` in transformers."""

_NUMBERED = {
    "segmentation_head.pixel_decoder.conv_layers": "mask_decoder.pixel_decoder.conv_layers",
    "segmentation_head.pixel_decoder.norms": "mask_decoder.pixel_decoder.norms",
    "segmentation_head.mask_predictor.mask_embed.layers": "mask_decoder.mask_embedder.layers",
}
_BARE_TENSORS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    # The first row is the class token's, which the model was pretrained with and does not use.
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
_FUSED = re.compile(r"(?P<attention>.+)\.(in_proj_|qkv\.)(?P<kind>weight|bias)")
_LAYER_KEY = re.compile(r"(?P<stack>[^\d]+)\.(?P<number>\d+)\.(?P<rest>.+)")


def find_layout(keys: Iterable[str]) -> tuple[Layout, str]:
    """The layout of a checkpoint with these `keys`, and the prefix of its detector's.

    Raises:
        WeightsError: it is no SAM 3 image model; the message says what it is, as far as can be told.
    """
    names = list(keys)
    for pattern, what in _STRANGERS:
        # A file of SAM 3 holds the tracker too, whose parts have the names of SAM 2.
        if any(pattern.fullmatch(key) for key in names if not _is_tracker_of_sam3(key)):
            raise WeightsError(f"it is {what}")
    known = set(names)
    for layout, sign in _SIGNS.items():
        for prefix in PREFIXES[layout]:
            if prefix + sign in known:
                return layout, prefix
    raise WeightsError(
        "it holds no SAM 3 detector; its first keys: " + (", ".join(sorted(names)[:3]) or "it has none")
    )


def detector_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The detector of a checkpoint, under the keys of `Sam3Model`.

    Keys that this server has no use for (tracker, point prompts) are left out by name; keys that are
    not known keep their name, so that a strict load meets them. The tensors are views: of a file that
    is mapped, nothing is read yet.

    Raises:
        WeightsError: as `find_layout`; or a tensor is there twice, say with the prefix and without.
    """
    layout, prefix = find_layout(state)
    found: dict[str, Tensor] = {}
    twice: set[str] = set()
    for key, tensor in state.items():
        if key.startswith(_OTHERS_PARTS[layout]):
            continue
        name = key.removeprefix(prefix)
        if _UNUSED[layout].fullmatch(name):
            continue
        renamed = _from_official(name, tensor) if layout == "official" else {name: tensor}
        twice |= found.keys() & renamed.keys()
        found.update(renamed)
    if twice:
        # Which of the two is meant cannot be told: the order of the keys would decide.
        raise WeightsError(f"it holds {len(twice)} tensors twice: " + ", ".join(sorted(twice)[:3]))
    return found


def _is_tracker_of_sam3(key: str) -> bool:
    parts = ("tracker.", "tracker_model.", "inst_interactive_predictor.")
    return key.startswith(parts) and not key.startswith("tracker.model.")


def _from_official(key: str, tensor: Tensor) -> dict[str, Tensor]:
    """What one official tensor is in transformers: one tensor, or the three that were fused."""
    if key in _BARE_TENSORS:
        name, change = _BARE_TENSORS[key]
        return {name: change(tensor)}
    if fused := _FUSED.fullmatch(key):
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
    """The module of transformers for the official one at `path`; None: there is none."""
    if path in _MODULES:
        return _MODULES[path]
    head, _, last = path.rpartition(".")
    if last in {"proj", "out_proj"} and (attention := _module(head)):
        # CLIP's own attention keeps the name.
        return f"{attention}.{'out_proj' if attention.startswith('text_encoder') else 'o_proj'}"
    if last.isdecimal():
        stack = head.removesuffix(".layers")
        if stack in _PERCEPTRONS:
            return f"{_PERCEPTRONS[stack]}.layer{int(last) + 1}"
        return f"{_NUMBERED[head]}.{last}" if head in _NUMBERED else None
    if (layer := _LAYER_KEY.fullmatch(path)) and layer["stack"] in _LAYERED:
        stack, parts = _LAYERED[layer["stack"]]
        return f"{stack}.{layer['number']}.{parts[layer['rest']]}" if layer["rest"] in parts else None
    return None
