"""The demo checkpoint: its quality on new scenes, and its report."""

from __future__ import annotations

import hashlib
import json

import pytest

from sam3_runner.predictor import SAM3Predictor
from sam3_runner.weights.checkpoint import DEMO, DEMO_FOLDER
from training.evaluate import UNKNOWN_PROMPTS, evaluate_size, make_sample
from training.exemplars import EXEMPLAR_KINDS


@pytest.fixture(scope="module")
def predictor() -> SAM3Predictor:
    loaded = SAM3Predictor(DEMO, "cpu")
    loaded.load()
    return loaded


def test_finds_objects_in_new_scenes(predictor: SAM3Predictor) -> None:
    square = evaluate_size(predictor, width=336, height=336, scenes=10, first_seed=810_000_000)
    tall = evaluate_size(predictor, width=250, height=600, scenes=5, first_seed=811_000_000)

    assert square["f1"] > 0.85
    assert square["mean_iou_of_hits"] > 0.88
    assert tall["f1"] > 0.75


def test_unknown_words_find_nothing(predictor: SAM3Predictor) -> None:
    sample = make_sample(812_000_000, width=336, height=336)
    assert sample is not None

    results = predictor.predict_batch(sample.picture, UNKNOWN_PROMPTS)

    assert [result.instances for result in results] == [[]] * len(UNKNOWN_PROMPTS)


def test_finds_what_exemplars_mean_in_new_scenes(predictor: SAM3Predictor) -> None:
    figures = evaluate_size(
        predictor, width=336, height=336, scenes=10, first_seed=813_000_000, exemplars=True
    )

    assert {kind: figures["kinds"][kind]["f1"] > 0.75 for kind in EXEMPLAR_KINDS} == dict.fromkeys(
        EXEMPLAR_KINDS, True
    )


def test_report_is_of_these_weights_and_meets_the_targets() -> None:
    report = json.loads((DEMO_FOLDER / "report.json").read_text(encoding="utf-8"))
    weights = (DEMO_FOLDER / "model.safetensors").read_bytes()

    assert report["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    assert report["targets_missed"] == []
    assert report["sizes"]["336x336"]["scenes"] == 1000
    assert report["exemplars"]["scenes"] == 200
    assert set(EXEMPLAR_KINDS) < set(report["exemplars"]["kinds"])


def test_is_small_enough_for_the_repository() -> None:
    assert sum(path.stat().st_size for path in DEMO_FOLDER.iterdir()) <= 20_000_000
