"""Finds a checkpoint's files and reads its configuration. Does not import torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sam3_runner.errors import WeightsError

DEMO = "demo"
"""In place of a path: the embedded demo checkpoint."""
DEMO_FOLDER = Path(__file__).parent.parent / "demo_checkpoint"
CLIP_TOKENIZER_FILE = DEMO_FOLDER / "tokenizer.json"
"""CLIP's complete vocabulary, which SAM 3 uses as well; `sam3.pt` has no tokenizer."""

DEFAULT_WEIGHTS_PATH = "weights/sam3.pt"

SAM3_SIDE_PX = 1008
SAM3_VISION_EPS = 1e-5
"""Of the vision encoder's LayerNorms in the official code; transformers' configuration has 1e-6."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One checkpoint on disk.

    Attributes:
        weights_file: in any layout that `load.py` reads.
        tokenizer_file: a `tokenizer.json`.
        config: for `Sam3Config`, as in config.json; SAM 3's own values are the defaults.
        name: its name in logs and in `/api/v1/model/info`.
        demo: it is the embedded demo checkpoint, which knows coloured shapes and nothing else.
    """

    weights_file: Path
    tokenizer_file: Path
    config: dict[str, Any]
    name: str
    demo: bool = False

    @property
    def input_side_px(self) -> int:
        """Side of the model's square input."""
        return _side_px(self.config)


@dataclass(frozen=True, slots=True)
class HubSource:
    """The repository that missing weights are downloaded from.

    Attributes:
        repo: `owner/name` on the hub that HF_ENDPOINT names, by default huggingface.co.
        revision: a commit, tag or branch.
        token: of an account with access to the repository, in printable ASCII: the HTTP client logs a
            header that it cannot encode. Not part of the repr.
    """

    repo: str
    revision: str
    token: str | None = field(default=None, repr=False)


def is_missing(weights_path: str) -> bool:
    """Whether nothing exists at `weights_path`, or only a transformers folder without its weights."""
    path = Path(weights_path)
    return weights_path != DEMO and not (path / "model.safetensors" if path.is_dir() else path).exists()


def find_checkpoint(weights_path: str, *, to_be_downloaded: bool = False) -> Checkpoint:
    """Find the checkpoint that `weights_path` names.

    The path is `demo`, a file (`sam3.pt`, `model.safetensors`, a fine-tuned one), or a transformers folder
    (config.json, model.safetensors, tokenizer.json). For a file, config.json and tokenizer.json are read
    from the same folder if they exist; without them it is taken for a SAM 3 of the official size.

    Args:
        weights_path: as in the setting SAM3_WEIGHTS_PATH.
        to_be_downloaded: where nothing exists yet, describe Meta's SAM 3, which will be downloaded.

    Raises:
        WeightsError: nothing is there, files are missing, or this process may not enter the folder.
    """
    try:
        return _find(weights_path, to_be_downloaded=to_be_downloaded)
    except PermissionError as error:
        raise WeightsError(
            f"{error.filename} cannot be read ({error.strerror}): let this server's user enter the folders "
            "above it, or name another place"
        ) from error


def _find(weights_path: str, *, to_be_downloaded: bool) -> Checkpoint:
    if weights_path == DEMO:
        return _from_folder(DEMO_FOLDER, name=DEMO, demo=True)
    path = Path(weights_path)
    if to_be_downloaded and is_missing(weights_path):
        weights_file = path if path.suffix else path / "model.safetensors"
        return Checkpoint(weights_file, CLIP_TOKENIZER_FILE, _official_config(), path.name)
    if path.is_dir():
        return _from_folder(path, name=path.resolve().name)
    if path.exists():
        return _from_file(path)
    raise WeightsError(
        f"no weights at {path}: put sam3.pt or a transformers folder of SAM 3 there, or set HF_TOKEN to "
        "download them, or choose the embedded demo checkpoint with SAM3_WEIGHTS_PATH=demo"
    )


def _from_folder(folder: Path, *, name: str, demo: bool = False) -> Checkpoint:
    files = [folder / each for each in ("config.json", "model.safetensors", "tokenizer.json")]
    for file in files:
        if not file.is_file():
            raise WeightsError(f"{folder} holds no {file.name}")
    return Checkpoint(files[1], files[2], _read_config(files[0]), name, demo)


def _from_file(path: Path) -> Checkpoint:
    config_file, tokenizer_file = path.parent / "config.json", path.parent / "tokenizer.json"
    return Checkpoint(
        weights_file=path,
        tokenizer_file=tokenizer_file if tokenizer_file.is_file() else CLIP_TOKENIZER_FILE,
        config=_read_config(config_file) if config_file.is_file() else _official_config(),
        name=path.name,
    )


def _read_config(path: Path) -> dict[str, Any]:
    """The part of a config.json that describes a `Sam3Config`."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        match config:
            case {"model_type": "sam3"}:
                pass
            case {"model_type": "sam3_video"}:  # Meta's own file: the detector beside the video tracker
                config = _official_config(_section(config, "detector_config"))
            case {"model_type": other}:
                raise WeightsError(f"{path} describes a {other!r} model, not 'sam3'")
            case _:
                raise WeightsError(f"{path} does not say that it describes a 'sam3' model")
        _side_px(config)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    sam3_config: dict[str, Any] = config
    return sam3_config


def _side_px(config: dict[str, Any]) -> int:
    side = _section(_section(config, "vision_config"), "backbone_config").get("image_size") or SAM3_SIDE_PX
    if not isinstance(side, int):
        raise ValueError(f"image_size is {side!r}, not a number of pixels")  # noqa: TRY004 - as for bad JSON
    return side


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name) or {}
    if not isinstance(section, dict):
        raise ValueError(f"{name} is {section!r}, not an object")  # noqa: TRY004 - as for bad JSON
    return section


def _official_config(config: dict[str, Any] | None = None) -> dict[str, Any]:
    """`config` with the official model's LayerNorm eps; without `config`, SAM 3 of the official size."""
    config = dict(config or {}) | {"model_type": "sam3"}
    vision = _section(config, "vision_config")
    backbone = {"model_type": "sam3_vit_model"} | _section(vision, "backbone_config")
    backbone["layer_norm_eps"] = SAM3_VISION_EPS
    return config | {"vision_config": vision | {"backbone_config": backbone}}
