"""Writes checkpoints that overflow in float16: the demo rescaled, so that float32 answers as before."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from safetensors.torch import load_file, save_file

from sam3_runner.weights.checkpoint import DEMO_FOLDER

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

WEIGHTS = "model.safetensors"
VISION_VALUES = "vision_encoder.backbone.layers.7.attention"
FUSION_VALUES = "detr_encoder.layers.0.self_attn"
MASK_CONVOLUTION = "mask_decoder.pixel_decoder.conv_layers.1"
"""A group norm follows, which removes the factor again."""


def overflowing_folder(folder: Path, layer: str, exponent: float) -> Path:
    """A checkpoint whose `layer` gives values 2**exponent times as large, and the same output in the end.

    An attention's output projection is divided by the same factor, exactly for a whole exponent.
    """
    state = demo_state()
    factor = 2.0**exponent
    values = f"{layer}.v_proj" if "attn" in layer or "attention" in layer else layer
    for name in (f"{values}.weight", f"{values}.bias"):
        state[name] *= factor
    if values != layer:
        state[f"{layer}.o_proj.weight"] /= factor
    return write(folder, state)


def damaged_folder(folder: Path) -> Path:
    """A checkpoint with a weight that is not a number: no precision gives a finite output."""
    state = demo_state()
    state[f"{VISION_VALUES}.v_proj.weight"][0, 0] = float("nan")
    return write(folder, state)


def demo_state() -> dict[str, Tensor]:
    """The demo's weights in float32."""
    return {name: tensor.float() for name, tensor in load_file(DEMO_FOLDER / WEIGHTS).items()}


def write(folder: Path, state: dict[str, Tensor]) -> Path:
    """Write the demo's folder with other weights."""
    shutil.copytree(DEMO_FOLDER, folder)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    return folder
