"""Modules as BentoML ships them: another test of the same process may have patched the imported ones."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from types import ModuleType


@pytest.fixture
def unpatched() -> Any:
    """A function that returns a new copy of a module."""

    def copy_of(module: ModuleType) -> ModuleType:
        spec = importlib.util.find_spec(module.__name__)
        assert spec is not None
        assert spec.loader is not None
        copy = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(copy)
        return copy

    return copy_of
