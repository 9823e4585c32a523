"""Single calls over HTTP, each on a new connection, so that any API worker may accept it.

For each client that it makes, httpx reads the certificates of TLS, which takes 40 ms of a core: a test that
waits until a server is ready would take most of a core from it.
"""

from __future__ import annotations

import ssl
from typing import Any

import httpx

_NO_CERTIFICATES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def request(method: str, url: str, **options: Any) -> httpx.Response:
    """Like `httpx.request`, for an `http://` URL."""
    return httpx.request(method, url, verify=_NO_CERTIFICATES, **options)


def get(url: str, **options: Any) -> httpx.Response:
    """Like `httpx.get`, for an `http://` URL."""
    return request("GET", url, **options)


def post(url: str, **options: Any) -> httpx.Response:
    """Like `httpx.post`, for an `http://` URL."""
    return request("POST", url, **options)
