from __future__ import annotations

import hashlib
import json

import pytest

from sam3_runner.predictor import SAM3Predictor
from training.concepts import CHECKPOINT_FOLDER
from training.evaluate import evaluate_size, pose


@pytest.fixture(scope="module")
def predictor() -> SAM3Predictor:
    loaded = SAM3Predictor("demo", "cpu")
    loaded.load()
    return loaded


def test_it_finds_objects_in_fresh_scenes(predictor: SAM3Predictor) -> None:
    square = evaluate_size(predictor, width=336, height=336, scenes=10, first_seed=810_000_000)
    tall = evaluate_size(predictor, width=250, height=600, scenes=5, first_seed=811_000_000)

    assert square["f1"] > 0.85
    assert square["mean_iou_of_hits"] > 0.88
    assert tall["f1"] > 0.75


def test_words_it_does_not_know_find_nothing(predictor: SAM3Predictor) -> None:
    question = pose(812_000_000, width=336, height=336)
    assert question is not None

    assert [
        len(result.instances) for result in predictor.predict_batch(question.picture, ["dog", "a cat"])
    ] == [
        0,
        0,
    ]


def test_its_report_is_of_these_weights_and_meets_the_targets() -> None:
    report = json.loads((CHECKPOINT_FOLDER / "report.json").read_text(encoding="utf-8"))
    weights = (CHECKPOINT_FOLDER / "model.safetensors").read_bytes()

    assert report["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    assert report["targets_missed"] == []
    assert report["sizes"]["336x336"]["scenes"] == 1000


def test_it_is_small_enough_for_the_repository() -> None:
    assert sum(path.stat().st_size for path in CHECKPOINT_FOLDER.iterdir()) <= 20_000_000
