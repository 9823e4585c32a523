"""cgF1, the measure of SAM 3's paper for "find every instance of this concept".

One pair is an image and a prompt. As in the official evaluation (sam3/eval/cgf1_eval.py of the PyPI package
sam3 0.1.4; the small constants are its own):

    predictions with a score of 0.5 or more are matched one to one with the objects so that the sum of the
    IoUs is greatest; at an IoU threshold t a match counts as true positive if its IoU is t or more
    pmF1(t)  F1 of TP, FP and FN summed over all pairs in which the object is there (false positives of
             pairs without an object are the business of the next line)
    IL_MCC   Matthews' correlation coefficient, over all pairs, of "anything predicted" with "anything there"
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
        hits, false, missed: objects for each IoU threshold (10,), of the pairs in which the object is there.
        found, fooled, passed_over, silent: pairs: predicted and there, predicted and not there, not
            predicted and there, neither.
    """

    hits: npt.NDArray[np.int64] = field(default_factory=_counts)
    false: npt.NDArray[np.int64] = field(default_factory=_counts)
    missed: npt.NDArray[np.int64] = field(default_factory=_counts)
    found: int = 0
    fooled: int = 0
    passed_over: int = 0
    silent: int = 0

    def add(self, ious: npt.NDArray[np.float64]) -> None:
        """Count one pair: `ious` (D, G) of its D predictions with its G objects, either of which may be 0."""
        predicted, there = ious.shape
        if not there:
            self.fooled += bool(predicted)
            self.silent += not predicted
            return
        self.found += bool(predicted)
        self.passed_over += not predicted
        matched = ious[linear_sum_assignment(ious, maximize=True)]
        hits = (matched[:, None] >= IOU_THRESHOLDS).sum(axis=0)
        self.hits += hits
        self.false += predicted - hits
        self.missed += there - hits

    def figures(self) -> dict[str, float]:
        """cgF1 and its two factors; cgF1 and pmF1 also at the IoU thresholds 0.5 and 0.75."""
        precision = self.hits / (self.hits + self.false + _EPS_F1)
        recall = self.hits / (self.hits + self.missed + _EPS_F1)
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
        both = self.found * self.silent - self.fooled * self.passed_over
        predicted, there = self.found + self.fooled, self.found + self.passed_over
        quiet, absent = self.silent + self.passed_over, self.silent + self.fooled
        return float(both / ((float(predicted) * there * absent * quiet) ** 0.5 + _EPS_MCC))
