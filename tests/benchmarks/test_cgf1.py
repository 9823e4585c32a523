"""cgF1, on cases that can be computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.cgf1 import ConceptTally

EMPTY = np.zeros((0, 0))
HIT = np.ones((1, 1))


def tally(*pairs: object) -> dict[str, float]:
    """The figures of pairs, given as IoU matrices."""
    sums = ConceptTally()
    for ious in pairs:
        sums.add(np.asarray(ious, dtype=np.float64))
    return sums.figures()


def test_perfect_predictions_score_one() -> None:
    """Every object is found, and nothing else is predicted: 1."""
    figures = tally(HIT, EMPTY, np.eye(3))
    assert figures["cgF1"] == pytest.approx(1.0, abs=1e-3)
    assert figures["IL_MCC"] == pytest.approx(1.0, abs=1e-3)


def test_missed_objects_score_zero() -> None:
    """Nothing is predicted although there are objects: 0."""
    assert tally(np.zeros((0, 2)), EMPTY)["cgF1"] == 0.0


def test_prediction_without_object_lowers_only_il_mcc() -> None:
    """A prediction without an object keeps pmF1, and lowers IL_MCC: (1*1 - 1*0) / sqrt(2*1*2*1)."""
    figures = tally(HIT, EMPTY, np.zeros((2, 0)))
    assert figures["pmF1"] == pytest.approx(1.0, abs=1e-3)
    assert figures["IL_MCC"] == pytest.approx(0.5, abs=1e-3)
    assert figures["cgF1"] == pytest.approx(0.5, abs=1e-3)


def test_second_prediction_for_one_object_lowers_f1() -> None:
    """Two predictions for one object: precision 1/2, recall 1, F1 2/3."""
    figures = tally([[1.0], [0.0]], EMPTY)
    assert figures["pmF1"] == pytest.approx(2 / 3, abs=1e-3)
    assert figures["IL_MCC"] == pytest.approx(1.0, abs=1e-3)


def test_pmf1_is_the_mean_over_ten_thresholds() -> None:
    """An IoU of 0.72 is a hit at 0.5 to 0.7, which are five of ten thresholds."""
    figures = tally([[0.72]], EMPTY)
    assert figures["pmF1@0.5"] == pytest.approx(1.0, abs=1e-3)
    assert figures["pmF1@0.75"] == 0.0
    assert figures["pmF1"] == pytest.approx(0.5, abs=1e-3)


def test_matching_maximises_the_sum_of_ious() -> None:
    """Greedy matching (0.9 first) would give the other object an IoU of 0.1."""
    figures = tally([[0.9, 0.8], [0.8, 0.1]], EMPTY)
    assert figures["pmF1@0.75"] == pytest.approx(1.0, abs=1e-3)


def test_f1_is_micro_averaged_over_pairs() -> None:
    """One pair with three hits and one with a miss (TP 3, FP 1, FN 1) give an F1 of 3/4."""
    assert tally(np.eye(3), [[0.0]], EMPTY)["pmF1"] == pytest.approx(0.75, abs=1e-3)


def test_prediction_for_every_pair_scores_zero() -> None:
    """A model that predicts something for every pair cannot detect absence: cgF1 0."""
    assert tally(HIT, np.zeros((1, 0)), HIT)["cgF1"] == pytest.approx(0.0, abs=1e-3)
