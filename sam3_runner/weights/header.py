"""Identifies a weights file by its first bytes and its index, without reading a tensor or importing torch."""

from __future__ import annotations

import zipfile
from typing import TYPE_CHECKING, Literal

from safetensors import SafetensorError, safe_open

from sam3_runner.errors import WeightsError
from sam3_runner.weights.layouts import find_layout

if TYPE_CHECKING:
    from pathlib import Path

START_BYTES = 9
"""Of a safetensors file: 8 for the header's length, 1 for the opening brace of its JSON."""


def file_kind(path: Path) -> Literal["torch", "safetensors"]:
    """The kind of a file, whatever its name. Raises `WeightsError`: neither, empty, or unreadable."""
    try:
        with path.open("rb") as file:
            start = file.read(START_BYTES)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
    if start.startswith(b"PK"):
        return "torch"
    if start[START_BYTES - 1 :] == b"{":
        return "safetensors"
    raise WeightsError(f"{path} {_description(start)}")


def check_header(path: Path) -> None:
    """Refuse a file whose index shows that it is no SAM 3; a file that passes may still not fit.

    For a safetensors file this checks the tensors' names and the file's length; for a torch file the list
    of its parts, which is at its end.

    Raises:
        WeightsError: another kind of file, truncated, or without SAM 3's detector.
    """
    try:
        if file_kind(path) == "torch":
            with zipfile.ZipFile(path) as archive:
                parts = archive.namelist()
            if not any(part.endswith("/data.pkl") for part in parts):
                raise WeightsError(f"{path} is a zip file without weights in it")
            return
        with safe_open(path, framework="numpy") as tensors:
            names = list(tensors.keys())
    except (OSError, zipfile.BadZipFile, SafetensorError) as error:
        raise truncated_file(path, error) from error
    try:
        find_layout(names)
    except WeightsError as error:
        raise unsupported_model(path, error) from error


def truncated_file(path: Path, error: Exception) -> WeightsError:
    """The error for a file that cannot be parsed."""
    reason = str(error).partition("\n")[0] or type(error).__name__
    return WeightsError(f"{path} cannot be read, it may be cut short: {reason}")


def unsupported_model(path: Path, error: WeightsError) -> WeightsError:
    """The error for a file of another model."""
    return WeightsError(f"{path} cannot be served: {error}")


def _description(start: bytes) -> str:
    if not start:
        return "is empty"
    if start.startswith(b"version "):
        return "is a Git LFS pointer, not the weights: `git lfs pull` fetches them"
    if start.startswith(b"\x80"):
        return "is a bare pickle, which is not read; torch.save of torch 1.6 or newer writes a readable file"
    return "is neither a torch nor a safetensors file"
