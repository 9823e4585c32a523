"""BentoML's client of the runner: one connection a call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import aiohttp


def patch(proxy: Any) -> None:
    """Make BentoML's client open a new connection for each call.

    Its pool keeps idle connections for 15 s, and the runner's server closes them after 5 s. Calls over a
    connection that is being closed fail, several in a row when the worker was busy. On a unix socket a new
    connection is cheap.

    Args:
        proxy: what `bentoml.depends` gives.
    """
    sessions = proxy.to_async._session_manager  # noqa: SLF001
    make_pooling = sessions._make_client  # noqa: SLF001

    def make_fresh() -> aiohttp.ClientSession:
        session: aiohttp.ClientSession = make_pooling()
        assert session.connector is not None
        session.connector._force_close = True  # noqa: SLF001
        return session

    sessions._make_client = make_fresh  # noqa: SLF001
