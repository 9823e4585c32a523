"""What a weights file is, by its first bytes and its index: no tensor is read. Knows nothing of torch."""

from __future__ import annotations

import zipfile
from typing import TYPE_CHECKING, Literal

from safetensors import SafetensorError, safe_open

from sam3_runner.errors import WeightsError
from sam3_runner.layouts import find_layout

if TYPE_CHECKING:
    from pathlib import Path

START_BYTES = 9
"""Of a safetensors file: the header's length in 8, and the brace with which its JSON begins."""


def file_kind(path: Path) -> Literal["torch", "safetensors"]:
    """What kind of file it is, whatever its name. Raises `WeightsError`: neither, empty, or unreadable."""
    try:
        with path.open("rb") as file:
            start = file.read(START_BYTES)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
    if start.startswith(b"PK"):
        return "torch"
    if start[START_BYTES - 1 :] == b"{":
        return "safetensors"
    raise WeightsError(f"{path} {_what_it_is(start)}")


def check_header(path: Path) -> None:
    """Refuse what is seen to be no SAM 3 without reading it; a file that passes may still not fit.

    Of a safetensors file the names of its tensors and its length are checked, of a torch file the list of
    its parts, which lies at its end.

    Raises:
        WeightsError: another kind of file, cut short, or without SAM 3's detector.
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
        raise cut_short(path, error) from error
    try:
        find_layout(names)
    except WeightsError as error:
        raise not_served(path, error) from error


def cut_short(path: Path, error: Exception) -> WeightsError:
    """The error for a file that is torn."""
    reason = str(error).partition("\n")[0] or type(error).__name__
    return WeightsError(f"{path} cannot be read, it may be cut short: {reason}")


def not_served(path: Path, error: WeightsError) -> WeightsError:
    """The error for a file of another model."""
    return WeightsError(f"{path} cannot be served: {error}")


def _what_it_is(start: bytes) -> str:
    if not start:
        return "is empty"
    if start.startswith(b"version "):
        return "is a Git LFS pointer, not the weights: `git lfs pull` fetches them"
    if start.startswith(b"\x80"):
        return "is a bare pickle, which is not read; torch.save of torch 1.6 or newer writes what is"
    return "is neither a torch nor a safetensors file"
