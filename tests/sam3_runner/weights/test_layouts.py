"""Checkpoints with a tensor under two names."""

from __future__ import annotations

import pytest
import torch

from sam3_runner import WeightsError
from sam3_runner.weights.layouts import detector_state

TRUNK, CONV = "backbone.vision_backbone.trunk", "backbone.vision_backbone.convs.1"
PATCH_EMBEDDING = "vision_encoder.backbone.embeddings.patch_embeddings.projection.weight"


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ([f"detector.{TRUNK}.patch_embed.proj.weight", f"{TRUNK}.patch_embed.proj.weight"], PATCH_EMBEDDING),
        ([f"detector_model.{PATCH_EMBEDDING}", PATCH_EMBEDDING], PATCH_EMBEDDING),
        ([f"detector.{TRUNK}.patch_embed.proj.weight", PATCH_EMBEDDING], PATCH_EMBEDDING),
        (
            [f"{TRUNK}.patch_embed.proj.weight", f"{CONV}.dconv_2x2.bias", f"{CONV}.dconv_2x2_0.bias"],
            "vision_encoder.neck.fpn_layers.1.scale_layers.0.bias",
        ),
    ],
)
def test_tensor_under_two_names(keys: list[str], name: str) -> None:
    """A tensor with and without the prefix, or under two names, is refused, in any order of the keys."""
    for ordered in (keys, keys[::-1]):
        with pytest.raises(WeightsError, match=f"it holds 1 tensors twice: {name}"):
            detector_state({key: torch.zeros(1) for key in ordered})
