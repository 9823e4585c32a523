"""The size of a pass after a larger one did not fit."""

from __future__ import annotations

from sam3_runner.inference.fitting_size import REDUCED_TIME_S, FittingSize


def test_reduced_for_a_while() -> None:
    """A reduced size is used for REDUCED_TIME_S, then the limit again; it is never below 1."""
    now_s = 100.0
    size = FittingSize(8, clock_s=lambda: now_s)
    assert size.current == 8
    size.reduce_to(3)
    now_s += REDUCED_TIME_S - 1
    assert size.current == 3
    size.reduce_to(0)
    now_s += REDUCED_TIME_S - 1
    assert size.current == 1
    now_s += 2
    assert size.current == 8
