"""Tests that need something beside Python: skipped where it is missing, but not in CI."""

from __future__ import annotations

import os

import pytest

REQUIRE_ALL_TIERS = os.environ.get("REQUIRE_ALL_TIERS") == "1"
"""CI sets it: a tier that cannot run fails there, and is skipped elsewhere."""


def need(missing: str | None) -> None:
    """Skip the test when something that it needs is missing, and fail it where every tier is required.

    Args:
        missing: what, and how to get it; None when all is there.
    """
    if missing is not None:
        (pytest.fail if REQUIRE_ALL_TIERS else pytest.skip)(missing)
