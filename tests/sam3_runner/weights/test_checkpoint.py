"""Which files a weights path names, and what their config.json must contain."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from sam3_runner import WeightsError
from sam3_runner.weights.checkpoint import CLIP_TOKENIZER_FILE, DEMO, find_checkpoint, is_missing

if TYPE_CHECKING:
    from pathlib import Path

FOLDER_FILES = ("config.json", "tokenizer.json", "model.safetensors")


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ([], "does not say that it describes a 'sam3' model"),
        (None, "does not say that it describes a 'sam3' model"),
        ({}, "does not say that it describes a 'sam3' model"),
        ({"model_type": "sam2"}, "describes a 'sam2' model, not 'sam3'"),
        ({"model_type": "sam3", "vision_config": "x"}, "vision_config is 'x', not an object"),
        (
            {"model_type": "sam3", "vision_config": {"backbone_config": {"image_size": "big"}}},
            "image_size is 'big', not a number of pixels",
        ),
        ({"model_type": "sam3_video", "detector_config": [3]}, "detector_config is [3], not an object"),
    ],
)
def test_config_of_another_model(tmp_path: Path, config: object, sentence: str) -> None:
    """A config.json that describes no SAM 3 is refused before anything is loaded; the error has its path."""
    for name in FOLDER_FILES:
        (tmp_path / name).touch()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError) as refused:
        find_checkpoint(str(tmp_path))
    assert str(tmp_path / "config.json") in str(refused.value)
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    "vision", [{}, {"vision_config": None}, {"vision_config": {"backbone_config": None}}]
)
def test_config_without_a_size(tmp_path: Path, vision: dict[str, object]) -> None:
    """The default for a size that config.json does not set is SAM 3's own: 1008 px."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "sam3"} | vision))
    (tmp_path / "sam3.pt").touch()
    assert find_checkpoint(str(tmp_path / "sam3.pt")).input_side_px == 1008


def test_folder_with_the_name_of_a_file(tmp_path: Path) -> None:
    """A folder named sam3.pt, which `docker run -v` creates for a missing path, is reported as a folder."""
    (tmp_path / "sam3.pt").mkdir()
    with pytest.raises(WeightsError, match=r"sam3\.pt holds no config\.json"):
        find_checkpoint(str(tmp_path / "sam3.pt"))


@pytest.mark.parametrize(
    ("path", "weights_file"),
    [
        ("sam3.pt", "sam3.pt"),
        ("tuned.safetensors", "tuned.safetensors"),
        ("sam3", "sam3/model.safetensors"),
    ],
)
def test_file_that_will_be_downloaded(tmp_path: Path, path: str, weights_file: str) -> None:
    """A missing file that will be downloaded is described as Meta's own SAM 3."""
    missing_path = str(tmp_path / path)
    assert is_missing(missing_path)
    with pytest.raises(WeightsError, match="no weights at"):
        find_checkpoint(missing_path)
    checkpoint = find_checkpoint(missing_path, to_be_downloaded=True)
    assert (checkpoint.weights_file, checkpoint.name) == (tmp_path / weights_file, path)
    assert (checkpoint.input_side_px, checkpoint.tokenizer_file) == (1008, CLIP_TOKENIZER_FILE)


def test_existing_files_are_not_missing(broken_checkpoint: Path) -> None:
    """A complete folder and its file are used as they are; a folder without its weights is missing."""
    weights = broken_checkpoint / "model.safetensors"
    for path in (broken_checkpoint, weights):
        assert not is_missing(str(path))
        assert find_checkpoint(str(path), to_be_downloaded=True).input_side_px == 112
    assert not is_missing(DEMO)
    weights.unlink()
    assert is_missing(str(broken_checkpoint))
