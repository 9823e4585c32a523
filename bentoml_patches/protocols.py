"""uvicorn's table of protocols: one of our own for each connection."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uvicorn.config import HTTP_PROTOCOLS

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable


def patch(make_protocol: Callable[..., asyncio.Protocol]) -> None:
    """Make uvicorn call `make_protocol` for each connection. Call it before a server is configured.

    BentoML passes its own arguments to uvicorn and leaves the protocol at "auto", which this table names.
    """
    HTTP_PROTOCOLS["auto"] = make_protocol  # type: ignore[assignment] # uvicorn takes a callable too
