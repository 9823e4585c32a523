"""The Python client of a SAM3 server: `Client(url, key).segment("street.jpg", ["car", "person"])`."""

from __future__ import annotations

from sam3_client.client import AsyncClient, Client
from sam3_client.errors import (
    BadImage,
    DirectApiOff,
    InvalidRequest,
    ModelLoading,
    Overloaded,
    Sam3Error,
    ServerError,
    ServerUnreachable,
    Unauthorized,
    UnsupportedImage,
)
from sam3_client.result import Instance, Result
from sam3_client.version import VERSION

__version__ = VERSION

__all__ = [
    "AsyncClient",
    "BadImage",
    "Client",
    "DirectApiOff",
    "Instance",
    "InvalidRequest",
    "ModelLoading",
    "Overloaded",
    "Result",
    "Sam3Error",
    "ServerError",
    "ServerUnreachable",
    "Unauthorized",
    "UnsupportedImage",
    "__version__",
]
