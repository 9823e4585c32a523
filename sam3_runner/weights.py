"""A checkpoint's weights into a `transformers.Sam3Model`, strictly, whatever layout they come in."""

from __future__ import annotations

import pickle
import re
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.initialization import no_init_weights

# By their modules: the package's front door asks for torchvision, which text prompts never use.
from transformers.models.sam3.configuration_sam3 import Sam3Config
from transformers.models.sam3.modeling_sam3 import Sam3Model

from sam3_runner.errors import WeightsError
from sam3_runner.layouts import Layout, detector_state, find_layout
from sam3_runner.weights_header import cut_short, file_kind, not_served

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from sam3_runner.checkpoint import Checkpoint

WRAPPERS = ("model", "state_dict")
"""Names under which training code keeps the weights beside its optimizer."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LISTED_KEYS = 8


def load_model(checkpoint: Checkpoint, device: torch.device) -> tuple[Any, Layout]:
    """The model in fp32 on `device`, in evaluation mode, and the layout of its file.

    fp16 and bf16 files are widened. The file is mapped: its tensors are read one by one on their way to
    the device, and on a CPU an fp32 file is used as it lies.

    Raises:
        WeightsError: unreadable, another model's, or a key is missing, unexpected, of another shape or
            of a type that is no floating-point number. Nothing is ever left random.
    """
    path = checkpoint.weights_file
    stored = read_tensors(path)
    try:
        layout, _ = find_layout(stored)
        state = detector_state(stored)
    except WeightsError as error:
        raise not_served(path, error) from error
    model = _empty_model(checkpoint)
    _check_fit(path, model.state_dict(), state)
    for name in list(state):
        state[name] = state[name].to(device=device, dtype=torch.float32)
    model.load_state_dict(state, strict=True, assign=True)
    return model.to(device).eval().requires_grad_(requires_grad=False), layout


def _empty_model(checkpoint: Checkpoint) -> Any:
    try:
        # Its own tensors are never touched: no memory goes into them before they are replaced.
        with no_init_weights():
            return Sam3Model(Sam3Config.from_dict(checkpoint.config))
    except Exception as error:  # what transformers raises depends on which number makes no sense
        reason = " ".join(str(error).split())
        raise WeightsError(
            f"the configuration of {checkpoint.weights_file} makes no model: {reason}"
        ) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a `.safetensors` or `.pt` file, told apart by content and mapped, not copied.

    Raises:
        WeightsError: empty, torn, no weights at all, or a pickle with anything but tensors in it: nothing
            in a file is ever run.
    """
    try:
        if file_kind(path) == "safetensors":
            return load_file(path)
        return _unwrap(path, torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it asks for {asked[1]}, and " if asked else ""
        raise WeightsError(
            f"{path} is refused: {what}only tensors are taken from a pickle, since anything else can run code"
        ) from error
    except (OSError, EOFError, ValueError, RuntimeError, SafetensorError) as error:
        if "TorchScript" in str(error):  # torch's own words advise to read it with code and all
            raise WeightsError(
                f"{path} is refused: it is a TorchScript program, not weights; torch.save the model's "
                "state_dict() instead"
            ) from error
        raise cut_short(path, error) from error


def _unwrap(path: Path, stored: Any) -> dict[str, Tensor]:
    if isinstance(stored, dict):
        stored = next((stored[name] for name in WRAPPERS if isinstance(stored.get(name), dict)), stored)
        tensors = {
            name: each
            for name, each in stored.items()
            if isinstance(name, str) and isinstance(each, torch.Tensor)
        }
        if tensors:
            return tensors
    raise WeightsError(f"{path} holds no tensors under names")


def _check_fit(path: Path, expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    common = expected.keys() & state.keys()
    problems = {
        "missing": expected.keys() - state.keys(),
        "unexpected": state.keys() - expected.keys(),
        "of another shape": {
            f"{name} {tuple(state[name].shape)} instead of {tuple(expected[name].shape)}"
            for name in common
            if state[name].shape != expected[name].shape
        },
        "of a type that is not read (float32, float16 and bfloat16 are)": {
            f"{name} {str(state[name].dtype).removeprefix('torch.')}"
            for name in common
            if state[name].dtype not in DTYPES
        },
    }
    found = [f"{len(keys)} {what}: {_listed(keys)}" for what, keys in problems.items() if keys]
    if found:
        raise WeightsError(f"{path} does not fit the model: {'; '.join(found)}")


def _listed(keys: set[str]) -> str:
    names = sorted(keys)
    more = f" and {len(names) - LISTED_KEYS} more" if len(names) > LISTED_KEYS else ""
    return ", ".join(names[:LISTED_KEYS]) + more
