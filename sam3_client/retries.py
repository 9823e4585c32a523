"""When a call is tried again, and after which time."""

from __future__ import annotations

import random
import time

from sam3_client.errors import ModelLoading, Overloaded, Sam3Error, ServerUnreachable

FIRST_WAIT_S = 0.25
LONGEST_WAIT_S = 5.0
JITTER = 0.25
"""Up to this share is added to each wait, so that callers who were refused together come back apart."""
STRANGER_WAIT_S = 3.0
"""A server that has never answered this client is not waited for any longer: its URL may be wrong."""


class Retries:
    """The tries of one call.

    Args:
        max_wait_s: no wait ends later than this after the call began.
    """

    def __init__(self, max_wait_s: float) -> None:
        self._max_wait_s = max_wait_s
        self._start_s = time.monotonic()
        self._next_wait_s = FIRST_WAIT_S

    def wait_s(self, error: Sam3Error, *, was_answered: bool) -> float:
        """The time to wait before the next try. Raises `error` if there is no next one.

        Args:
            error: of the last try.
            was_answered: the server has answered this client before.
        """
        wait_s = max(error.retry_after_s or 0.0, self._next_wait_s)
        wait_s *= 1 + random.uniform(0, JITTER)  # noqa: S311 - not a secret
        bound_s = self._max_wait_s
        if isinstance(error, ServerUnreachable) and not was_answered:
            bound_s = min(bound_s, STRANGER_WAIT_S)
        if not _may_help(error) or time.monotonic() - self._start_s + wait_s > bound_s:
            raise error
        self._next_wait_s = min(2 * self._next_wait_s, LONGEST_WAIT_S)
        return wait_s


def _may_help(error: Sam3Error) -> bool:
    is_refusal = isinstance(error, Overloaded | ModelLoading) and error.code != "DEADLINE_EXCEEDED"
    return is_refusal or (
        isinstance(error, ServerUnreachable) and error.code in {"UNREACHABLE", "DISCONNECTED"}
    )
