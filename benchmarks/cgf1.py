"""cgF1, the metric of SAM 3's paper for "find every instance of this concept".

A pair is an image and a prompt. The formulas and the small constants are those of the official evaluation
(sam3/eval/cgf1_eval.py of the PyPI package sam3 0.1.4):

    Predictions with a score of 0.5 or more are matched one to one with the objects, so that the sum of the
    IoUs is greatest. At an IoU threshold t, a match is a true positive if its IoU is t or more.
    pmF1(t)  F1 of TP, FP and FN, summed over all pairs whose object is present (IL_MCC covers the others)
    IL_MCC   Matthews' correlation coefficient, over all pairs, of "anything predicted" and "object present"
    cgF1     mean of pmF1(t) x IL_MCC over t = 0.5, 0.55, ..., 0.95
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import linear_sum_assignment

if TYPE_CHECKING:
    import numpy.typing as npt

MIN_SCORE = 0.5
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
_EPS_F1, _EPS_MCC = 1e-4, 1e-6


def _counts() -> npt.NDArray[np.int64]:
    return np.zeros(len(IOU_THRESHOLDS), dtype=np.int64)


@dataclass(slots=True)
class ConceptTally:
    """Sums over pairs.

    Attributes:
        true_positives, false_positives, false_negatives: objects for each IoU threshold (10,), over the pairs
            whose object is present.
        present_predicted, absent_predicted, present_empty, absent_empty: number of pairs, by whether the
            object is present and whether anything was predicted.
    """

    true_positives: npt.NDArray[np.int64] = field(default_factory=_counts)
    false_positives: npt.NDArray[np.int64] = field(default_factory=_counts)
    false_negatives: npt.NDArray[np.int64] = field(default_factory=_counts)
    present_predicted: int = 0
    absent_predicted: int = 0
    present_empty: int = 0
    absent_empty: int = 0

    def add(self, ious: npt.NDArray[np.float64]) -> None:
        """Count one pair: `ious` (D, G) of its D predictions with its G objects; D and G may be 0."""
        predicted, objects = ious.shape
        if not objects:
            self.absent_predicted += bool(predicted)
            self.absent_empty += not predicted
            return
        self.present_predicted += bool(predicted)
        self.present_empty += not predicted
        matched = ious[linear_sum_assignment(ious, maximize=True)]
        hits = (matched[:, None] >= IOU_THRESHOLDS).sum(axis=0)
        self.true_positives += hits
        self.false_positives += predicted - hits
        self.false_negatives += objects - hits

    def figures(self) -> dict[str, float]:
        """Compute cgF1 and its two factors; cgF1 and pmF1 also at the IoU thresholds 0.5 and 0.75."""
        precision = self.true_positives / (self.true_positives + self.false_positives + _EPS_F1)
        recall = self.true_positives / (self.true_positives + self.false_negatives + _EPS_F1)
        f1 = 2 * precision * recall / (precision + recall + _EPS_F1)
        mcc = self._mcc()
        return {
            "cgF1": float(f1.mean()) * mcc,
            "pmF1": float(f1.mean()),
            "IL_MCC": mcc,
            "cgF1@0.5": float(f1[0]) * mcc,
            "cgF1@0.75": float(f1[5]) * mcc,
            "pmF1@0.5": float(f1[0]),
            "pmF1@0.75": float(f1[5]),
        }

    def _mcc(self) -> float:
        numerator = self.present_predicted * self.absent_empty - self.absent_predicted * self.present_empty
        predicted = self.present_predicted + self.absent_predicted
        empty = self.present_empty + self.absent_empty
        present = self.present_predicted + self.present_empty
        absent = self.absent_predicted + self.absent_empty
        return float(numerator / ((float(predicted) * present * absent * empty) ** 0.5 + _EPS_MCC))
