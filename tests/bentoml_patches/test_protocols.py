"""The patch of uvicorn's table of protocols."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from uvicorn.config import HTTP_PROTOCOLS, Config

from bentoml_patches import protocols


@pytest.fixture(autouse=True)
def _unpatched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HTTP_PROTOCOLS, "auto", HTTP_PROTOCOLS["auto"])


def loaded_protocol() -> Any:
    """What a server would use that BentoML configures: it names no protocol."""
    config = Config(app="app:app")
    config.load_app = lambda: asyncio.sleep  # type: ignore[method-assign]
    config.load()
    return config.http_protocol_class


def test_servers_use_our_protocol() -> None:
    """The server that BentoML configures takes the protocol from the table."""

    def make(**_: object) -> asyncio.Protocol:
        return asyncio.Protocol()

    assert loaded_protocol() is not make
    protocols.patch(make)
    assert loaded_protocol() is make
