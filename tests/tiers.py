"""Tests that need more than Python: skipped if it is missing, but not in CI."""

from __future__ import annotations

import os

import pytest

REQUIRE_ALL_TIERS = os.environ.get("REQUIRE_ALL_TIERS") == "1"
"""Set in CI: a tier that cannot run fails there, and is skipped elsewhere."""


def need(missing: str | None) -> None:
    """Skip the test if something that it needs is missing, or fail it if every tier is required.

    Args:
        missing: what is missing and how to get it; None if nothing is.
    """
    if missing is not None:
        (pytest.fail if REQUIRE_ALL_TIERS else pytest.skip)(missing)
