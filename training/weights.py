"""Saves and loads weights: a transformers folder with a half-precision safetensors file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Sam3Config, Sam3Model

if TYPE_CHECKING:
    from pathlib import Path


def save_weights(model: Any, folder: Path) -> None:
    """Write config.json and, atomically, the weights in fp16."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = ["Sam3Model"]
    model.config.save_pretrained(folder)
    weights = {name: value.to(torch.float16).contiguous().cpu() for name, value in model.state_dict().items()}
    unfinished = folder / "model.unfinished"
    save_file(weights, unfinished, metadata={"format": "pt"})
    unfinished.replace(folder / "model.safetensors")


def load_weights(folder: Path) -> Any:
    """The model of a folder, in fp32 and evaluation mode."""
    model: Any = Sam3Model(Sam3Config.from_pretrained(folder))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.float().eval()
