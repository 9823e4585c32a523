"""cgF1, on cases that can be done by hand."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.cgf1 import ConceptTally

NOTHING = np.zeros((0, 0))
HIT = np.ones((1, 1))


def tally(*pairs: object) -> dict[str, float]:
    """The figures of pairs given as IoU tables."""
    sums = ConceptTally()
    for ious in pairs:
        sums.add(np.asarray(ious, dtype=np.float64))
    return sums.figures()


def test_perfect() -> None:
    """Everything found and nothing else, with and without objects: 1."""
    figures = tally(HIT, NOTHING, np.eye(3))
    assert figures["cgF1"] == pytest.approx(1.0, abs=1e-3)
    assert figures["IL_MCC"] == pytest.approx(1.0, abs=1e-3)


def test_nothing_found() -> None:
    """Nothing predicted where there was something: 0."""
    assert tally(np.zeros((0, 2)), NOTHING)["cgF1"] == 0.0


def test_false_alarm_costs_the_presence_factor_alone() -> None:
    """A prediction where nothing is leaves pmF1 as it is, and lowers IL_MCC: (1*1 - 1*0) / sqrt(2*1*2*1)."""
    figures = tally(HIT, NOTHING, np.zeros((2, 0)))
    assert figures["pmF1"] == pytest.approx(1.0, abs=1e-3)
    assert figures["IL_MCC"] == pytest.approx(0.5, abs=1e-3)
    assert figures["cgF1"] == pytest.approx(0.5, abs=1e-3)


def test_stray_beside_a_hit_costs_the_f1() -> None:
    """Two predictions for one object: precision 1/2, recall 1, F1 2/3."""
    figures = tally([[1.0], [0.0]], NOTHING)
    assert figures["pmF1"] == pytest.approx(2 / 3, abs=1e-3)
    assert figures["IL_MCC"] == pytest.approx(1.0, abs=1e-3)


def test_mean_over_thresholds() -> None:
    """An IoU of 0.72 is a hit at 0.5 to 0.7, five thresholds of ten."""
    figures = tally([[0.72]], NOTHING)
    assert figures["pmF1@0.5"] == pytest.approx(1.0, abs=1e-3)
    assert figures["pmF1@0.75"] == 0.0
    assert figures["pmF1"] == pytest.approx(0.5, abs=1e-3)


def test_matching_is_best_in_sum() -> None:
    """The greedy choice (0.9 first) would leave the other object to an IoU of 0.1."""
    figures = tally([[0.9, 0.8], [0.8, 0.1]], NOTHING)
    assert figures["pmF1@0.75"] == pytest.approx(1.0, abs=1e-3)


def test_sums_are_over_pairs_not_means() -> None:
    """Micro: one pair with three hits and one with a miss are recall 3/4, F1 6/7."""
    assert tally(np.eye(3), [[0.0]], NOTHING)["pmF1"] == pytest.approx(0.75, abs=1e-3)


def test_always_yes_is_worth_nothing() -> None:
    """Who predicts something for every pair has no presence sense: cgF1 0."""
    assert tally(HIT, np.zeros((1, 0)), HIT)["cgF1"] == pytest.approx(0.0, abs=1e-3)
