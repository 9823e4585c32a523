"""Saves and loads weights: a transformers folder with a half-precision safetensors file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from transformers import Sam3Config

from sam3_runner.network.model import SAM3Network
from sam3_runner.weights.load import to_network, to_transformers

if TYPE_CHECKING:
    from pathlib import Path


def save_weights(network: SAM3Network, folder: Path) -> None:
    """Write config.json and, atomically, the weights in fp16."""
    folder.mkdir(parents=True, exist_ok=True)
    network.config.architectures = ["Sam3Model"]
    network.config.save_pretrained(folder)
    weights = {
        name: value.to(torch.float16).contiguous().cpu()
        for name, value in to_transformers(network.state_dict()).items()
    }
    unfinished = folder / "model.unfinished"
    save_file(weights, unfinished, metadata={"format": "pt"})
    unfinished.replace(folder / "model.safetensors")


def load_weights(folder: Path) -> SAM3Network:
    """The network of a folder, in fp32 and evaluation mode."""
    network = SAM3Network(Sam3Config.from_pretrained(folder))
    network.load_state_dict(to_network(load_file(folder / "model.safetensors")))
    return network.float().eval()
