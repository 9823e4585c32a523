"""The faster layers compared with those that they replace."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from sam3_runner.model import encode_image
from sam3_runner.optimize import RotaryTable, optimize
from sam3_runner.weights.load import load_model

if TYPE_CHECKING:
    from sam3_runner.weights.checkpoint import Checkpoint

ATOL = 2e-5


def test_optimized_model_computes_the_same(tiny_checkpoint: Checkpoint) -> None:
    """The optimized model has the same image features and number of weights as the plain one."""
    plain, _ = load_model(tiny_checkpoint, torch.device("cpu"))
    fast = copy.deepcopy(plain)
    optimize(fast)
    layers = fast.vision_encoder.backbone.layers
    assert {layer.window_size for layer in layers} > {0}, "the model has windowed and global layers"
    assert all(isinstance(layer.rotary_emb, RotaryTable) for layer in layers)
    pixels = torch.randint(0, 256, (2, 3, 112, 112), dtype=torch.uint8)
    with torch.inference_mode():
        expected, actual = encode_image(plain, pixels), encode_image(fast, pixels)
    for level, other in zip(expected.levels, actual.levels, strict=True):
        assert torch.allclose(level, other, atol=ATOL)
    assert torch.allclose(expected.attended, actual.attended, atol=ATOL)
    counts = [sum(weight.numel() for weight in model.parameters()) for model in (plain, fast)]
    assert counts[0] == counts[1]
