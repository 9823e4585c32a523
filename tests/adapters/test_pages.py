"""The pages of the adapters: what they say to install and to copy is what was tested."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.adapters.label_studio_app import CONFIG

ROOT = Path(__file__).parents[2]
PIN = re.compile(r"^([a-z0-9-]+)==(\S+)$", re.MULTILINE)


@pytest.mark.parametrize(
    ("adapter", "lock"),
    [
        ("label_studio", "tests/outputs/requirements.txt"),
        ("cvat", "tests/outputs/requirements.txt"),
        ("mcp", "requirements-dev.lock"),
    ],
)
def test_packages_are_those_that_are_tested(adapter: str, lock: str) -> None:
    """Each version in an adapter's requirements is that of the tests' environment."""
    tested = dict(PIN.findall((ROOT / lock).read_text()))
    pins = dict(PIN.findall((ROOT / "adapters" / adapter / "requirements.txt").read_text()))
    assert pins
    assert pins.items() <= tested.items()


def test_the_label_config_is_the_one_that_was_tried() -> None:
    """docs/adapters/label-studio.md has the config of the application's run."""
    assert CONFIG.strip() in (ROOT / "docs" / "adapters" / "label-studio.md").read_text()
