"""A checkpoint's weights into a `transformers.Sam3Model`, strictly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

# By their modules: the package's front door asks for torchvision, which text prompts never use.
from transformers.models.sam3.configuration_sam3 import Sam3Config
from transformers.models.sam3.modeling_sam3 import Sam3Model

from sam3_runner.errors import WeightsError

if TYPE_CHECKING:
    from sam3_runner.checkpoint import Checkpoint


def load_model(checkpoint: Checkpoint, device: torch.device) -> Any:
    """The model in fp32 on `device`, in evaluation mode; fp16 and bf16 files are widened.

    Raises:
        WeightsError: unreadable, or a key is missing, unexpected or of another shape. Nothing is ever
            left random.
    """
    try:
        state = load_file(checkpoint.weights_file)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{checkpoint.weights_file} cannot be read: {error}") from error
    model: Any = Sam3Model(Sam3Config.from_dict(checkpoint.config))
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:  # torch's only word for keys that do not fit; it lists them
        raise WeightsError(f"{checkpoint.weights_file} does not fit its config.json: {error}") from error
    return model.to(device=device, dtype=torch.float32).eval().requires_grad_(requires_grad=False)
