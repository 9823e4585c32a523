"""One call to a server through either client, so that each test runs with both."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from sam3_client import AsyncClient, Client

if TYPE_CHECKING:
    from commands.local_server import LocalServer
    from sam3_client import Result


class Segment(Protocol):
    """`segment` of a new client; `client` holds arguments of the client itself."""

    def __call__(self, *args: Any, client: dict[str, Any] | None = None, **options: Any) -> Result:
        """Segment an image."""


@pytest.fixture(params=["sync", "async"])
def segment(request: pytest.FixtureRequest, server: LocalServer) -> Segment:
    """Calls `server`, unless `client` names another one."""

    def call(*args: Any, client: dict[str, Any] | None = None, **options: Any) -> Result:
        settings = {"url": server.url, "key": server.api_key, **(client or {})}
        return CALLS[request.param](settings, *args, **options)

    return call


def _by_client(settings: dict[str, Any], *args: Any, **options: Any) -> Result:
    with Client(**settings) as client:
        return client.segment(*args, **options)


def _by_async_client(settings: dict[str, Any], *args: Any, **options: Any) -> Result:
    async def call() -> Result:
        async with AsyncClient(**settings) as client:
            return await client.segment(*args, **options)

    return asyncio.run(call())


CALLS = {"sync": _by_client, "async": _by_async_client}
"""One call of `segment` by a new client, with that client's arguments before the others."""
