"""Errors of the SAM 3 server, as CVAT shows them."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from cvat_sdk.auto_annotation import BadFunctionError

from sam3_client import Sam3Error

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def shown_by_cvat() -> Iterator[None]:
    """Turn a `Sam3Error` into the only error whose message an agent passes on to CVAT's page.

    Raises:
        BadFunctionError: a sentence that says what to do, and the request's id for the server's log.
    """
    try:
        yield
    except Sam3Error as error:
        request = f" (request {error.request_id})" if error.request_id else ""
        raise BadFunctionError(f"{error}{request}") from None
