"""The versions that the patches were tested with."""

from __future__ import annotations

import pytest

import bentoml_patches


def test_installed_versions_are_those_that_were_tested() -> None:
    """The lock and the patches agree."""
    bentoml_patches.check_versions()


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An upgrade without these tests is refused with a sentence that says what to do."""
    monkeypatch.setitem(bentoml_patches.VERSIONS, "bentoml", "1.4.0")
    with pytest.raises(RuntimeError, match=r"bentoml .* is installed, .* tested with 1\.4\.0: install"):
        bentoml_patches.check_versions()
