"""The patch of how BentoML loads a Bento; tests/test_bento.py serves a real one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import bentoml
import pytest
from _bentoml_sdk.service import factory

from bentoml_patches import bento_services

BENTO: Any = SimpleNamespace(info=SimpleNamespace(services=[SimpleNamespace(name="entry", models=[])]))
"""A Bento that was built with one service."""


@pytest.fixture(autouse=True)
def _unpatched(monkeypatch: pytest.MonkeyPatch, unpatched: Any) -> None:
    monkeypatch.setattr(bentoml.Service, "on_load_bento", unpatched(factory).Service.on_load_bento)


@pytest.fixture
def entry() -> Any:
    """A service that depends on one that the Bento does not list."""

    @bentoml.service(name="other")
    class Other:
        pass

    @bentoml.service(name="entry")
    class Entry:
        other = bentoml.depends(Other)

    return Entry


def test_the_patch_is_needed(entry: Any) -> None:
    """BentoML cannot load a Bento with a service that its file does not list."""
    with pytest.raises(StopIteration):
        entry.on_load_bento(BENTO)


def test_every_service_belongs_to_the_bento(entry: Any) -> None:
    """With the patch all services are loaded."""
    bento_services.patch()
    entry.on_load_bento(BENTO)
    assert [each.bento for each in entry.all_services().values()] == [BENTO, BENTO]
