"""Where a checkpoint lies and what its files say of it. Knows nothing of torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sam3_runner.errors import WeightsError

DEMO_FOLDER = Path(__file__).parent / "demo_checkpoint"
DEFAULT_WEIGHTS_PATH = "weights/sam3.pt"
SCORE_THRESHOLD = 0.5
"""Instances above it are kept: `confidence_threshold` of the official Sam3Processor."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A transformers folder: config.json, model.safetensors, tokenizer.json.

    Attributes:
        demo: it is the embedded demo checkpoint, which knows coloured shapes and nothing else.
        config: the parsed config.json.
    """

    folder: Path
    demo: bool
    config: dict[str, Any]

    @property
    def name(self) -> str:
        """What logs and `/api/v1/model/info` call it."""
        return "demo" if self.demo else self.folder.name

    @property
    def weights_file(self) -> Path:
        """The safetensors file."""
        return self.folder / "model.safetensors"

    @property
    def input_side_px(self) -> int:
        """Side of the square that the model takes."""
        side: int = self.config["vision_config"]["backbone_config"]["image_size"]
        return side


def find_checkpoint(weights_path: str) -> Checkpoint:
    """Find the checkpoint that `weights_path` names: `demo`, or a transformers folder.

    Raises:
        WeightsError: there is none, or files are missing.
    """
    demo = weights_path == "demo"
    folder = DEMO_FOLDER if demo else Path(weights_path)
    if not folder.exists():
        raise WeightsError(
            f"no weights at {folder}: put a transformers folder of SAM 3 there, or choose the embedded "
            "demo checkpoint with SAM3_WEIGHTS_PATH=demo"
        )
    if not folder.is_dir():
        raise WeightsError(
            f"{folder} is a single file: this version reads transformers folders "
            "(config.json, model.safetensors, tokenizer.json)"
        )
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            raise WeightsError(f"{folder} holds no {name}")
    return Checkpoint(folder=folder, demo=demo, config=_read_config(folder / "config.json"))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    if config.get("model_type") != "sam3":
        raise WeightsError(f"{path} describes a {config.get('model_type')!r} model, not 'sam3'")
    return config
