"""Loads a checkpoint's weights, of any layout, into our network, strictly."""

from __future__ import annotations

import pickle
import re
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import Sam3Config

from sam3_runner.errors import WeightsError
from sam3_runner.network.model import SAM3Network
from sam3_runner.weights.header import file_kind, truncated_file, unsupported_model
from sam3_runner.weights.layouts import Layout, detector_state

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from sam3_runner.weights.checkpoint import Checkpoint

WRAPPER_KEYS = ("model", "state_dict")
"""Keys under which training code stores the weights, beside its optimizer."""

SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_LISTED_KEYS = 8

_ATTENTION_KEY = re.compile(r"(?P<attention>.+)\.(?P<part>q|k|v|out)_proj\.(?P<kind>weight|bias)")


def load_network(checkpoint: Checkpoint, device: torch.device) -> tuple[SAM3Network, Layout]:
    """The network in fp32 on `device`, in evaluation mode, and the layout of its file.

    fp16 and bf16 tensors are converted. The file is mapped: its tensors are read one by one while they
    are copied to the device; on a CPU the mapped tensors of an fp32 file are used without a copy, except
    q, k and v, which become one tensor.

    Raises:
        WeightsError: the file is unreadable or holds another model; or a key is missing, unexpected, or has
            another shape or an unsupported dtype. No weight is ever left uninitialised.
    """
    path = checkpoint.weights_file
    stored = read_tensors(path)
    try:
        layout, state = detector_state(stored)
    except WeightsError as error:
        raise unsupported_model(path, error) from error
    network = _empty_network(checkpoint)
    _check_fit(path, to_transformers(network.state_dict()), state)
    for name in list(state):
        state[name] = state[name].to(device=device, dtype=torch.float32)
    network.load_state_dict(to_network(state), strict=True, assign=True)
    return network.to(device).eval().requires_grad_(requires_grad=False), layout


def to_network(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of our network, from those of a `Sam3Model`: q, k and v stacked, others unchanged."""
    network: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if match := _ATTENTION_KEY.fullmatch(key):
            attention, part, kind = match["attention"], match["part"], match["kind"]
            if part == "q":
                parts = [state[f"{attention}.{each}_proj.{kind}"] for each in "qkv"]
                network[f"{attention}.qkv_proj.{kind}"] = torch.cat(parts)
            elif part == "out":  # the name in CLIP's own attention
                network[f"{attention}.o_proj.{kind}"] = tensor
        else:
            network[key] = tensor
    return network


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_network`; the tensors are views."""
    transformers: dict[str, Tensor] = {}
    for key, tensor in state.items():
        attention, _, kind = key.rpartition(".qkv_proj.")
        if attention:
            thirds = zip("qkv", tensor.chunk(3), strict=True)
            transformers.update({f"{attention}.{part}_proj.{kind}": third for part, third in thirds})
        elif key.startswith("text_encoder."):
            transformers[key.replace(".o_proj.", ".out_proj.")] = tensor
        else:
            transformers[key] = tensor
    return transformers


def _empty_network(checkpoint: Checkpoint) -> SAM3Network:
    try:
        # Its weights take no memory until they are replaced by those of the file.
        with torch.device("meta"):
            return SAM3Network(Sam3Config.from_dict(checkpoint.config))
    except Exception as error:  # the kind that transformers raises depends on the invalid value
        reason = " ".join(str(error).split())
        raise WeightsError(f"the configuration of {checkpoint.weights_file} is invalid: {reason}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a `.safetensors` or `.pt` file, recognised by its content; mapped, not copied.

    Raises:
        WeightsError: the file is empty, truncated, holds no weights, or is a pickle with other objects
            than tensors. No code from a file is ever run.
    """
    try:
        if file_kind(path) == "safetensors":
            return load_file(path)
        return _unwrap(path, torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except pickle.UnpicklingError as error:
        requested = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it asks for {requested[1]}, and " if requested else ""
        raise WeightsError(
            f"{path} is refused: {what}only tensors are taken from a pickle, since anything else can run code"
        ) from error
    except (OSError, EOFError, ValueError, RuntimeError, SafetensorError) as error:
        if "TorchScript" in str(error):  # torch's message advises to load it, which would run its code
            raise WeightsError(
                f"{path} is refused: it is a TorchScript program, not weights; torch.save the model's "
                "state_dict() instead"
            ) from error
        raise truncated_file(path, error) from error


def _unwrap(path: Path, stored: Any) -> dict[str, Tensor]:
    if isinstance(stored, dict):
        stored = next((stored[key] for key in WRAPPER_KEYS if isinstance(stored.get(key), dict)), stored)
        tensors = {
            name: each
            for name, each in stored.items()
            if isinstance(name, str) and isinstance(each, torch.Tensor)
        }
        if tensors:
            return tensors
    raise WeightsError(f"{path} holds no named tensors")


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
            if state[name].dtype not in SUPPORTED_DTYPES
        },
    }
    present = [f"{len(keys)} {problem}: {_listed(keys)}" for problem, keys in problems.items() if keys]
    if present:
        raise WeightsError(f"{path} does not fit the model: {'; '.join(present)}")


def _listed(keys: set[str]) -> str:
    names = sorted(keys)
    more = f" and {len(names) - MAX_LISTED_KEYS} more" if len(names) > MAX_LISTED_KEYS else ""
    return ", ".join(names[:MAX_LISTED_KEYS]) + more
