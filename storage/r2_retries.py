"""The errors of R2, the retry policies and the deadline of a call. No vendor's types."""

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

import stamina

from storage.errors import ObjectNotFound, StorageError, StorageUnavailable

_T = TypeVar("_T")

_CODE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
# 0: there was no answer.
_TRANSIENT_STATUS: Final = frozenset({0, 408, 429})
# By R2's code, for the operator.
_CAUSES: Final = {
    "AccessDenied": "the token of R2_ACCESS_KEY_ID may not {action} in R2_BUCKET",
    "InvalidAccessKeyId": "R2_ACCESS_KEY_ID is unknown",
    "InvalidArgument": "R2_ACCESS_KEY_ID is malformed",
    "NoSuchBucket": "R2_BUCKET names no bucket of this account",
    "RequestTimeTooSkewed": "this machine's clock is wrong",
    "SignatureDoesNotMatch": "R2_SECRET_ACCESS_KEY does not belong to R2_ACCESS_KEY_ID",
    "Unauthorized": "R2_ACCESS_KEY_ID or R2_SECRET_ACCESS_KEY is wrong",
}


class R2Error(Exception):
    """A failed request: R2's status and code, or status 0 and the kind of the failure."""

    def __init__(self, status: int, code: str) -> None:
        # The code comes from the network and is logged.
        self.code = code if _CODE.fullmatch(code) else "unknown"
        self.status = status
        self.tries = 1
        super().__init__(f"status={status} code={self.code}")

    @property
    def is_transient(self) -> bool:
        """Whether a retry may succeed."""
        return self.status in _TRANSIENT_STATUS or self.status >= 500

    @property
    def log_level(self) -> int:
        """ERROR for a refusal, which the operator must resolve; INFO for a missing image."""
        if self.is_transient:
            return logging.WARNING
        return logging.INFO if self.code == "NoSuchKey" else logging.ERROR

    def to_storage_error(self) -> StorageError:
        """The error for the service, with a message for the caller."""
        if self.code == "NoSuchKey":
            return ObjectNotFound("no image is stored there")
        if self.is_transient:
            return StorageUnavailable("the object store does not answer as it should; try again later")
        return StorageUnavailable("the object store refuses this server's requests")

    def to_operator_message(self, action: str) -> str:
        """A sentence that names the setting to correct, after a refusal of `action`."""
        cause = _CAUSES.get(self.code, "R2_ENDPOINT does not answer as R2's S3 API")
        return f"{cause.format(action=action)} ({self})"


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """The number of tries, and the exponential wait between them, in seconds."""

    max_tries: int
    first_wait_s: float
    max_wait_s: float
    jitter_s: float


READ_POLICY: Final = RetryPolicy(max_tries=4, first_wait_s=0.1, max_wait_s=1.0, jitter_s=0.2)
# R2 accepts one write per second and key, and counts failed ones.
WRITE_POLICY: Final = RetryPolicy(max_tries=4, first_wait_s=1.1, max_wait_s=4.0, jitter_s=0.5)


@dataclass(frozen=True, slots=True)
class Deadline:
    """The end of a call, `limit_s` after its start at `started_s` (of time.monotonic).

    With a limit of 25 s, a connection may take 3 s to open and the server may be silent for 7 s. So no try
    begins after 15 s, and no more of a body is awaited after 18 s: either may take until the end.
    """

    started_s: float
    limit_s: float

    @property
    def last_try_s(self) -> float:
        """The latest start of a try."""
        return self.started_s + self.limit_s - connect_timeout_s(self.limit_s) - read_timeout_s(self.limit_s)

    @property
    def last_read_s(self) -> float:
        """The latest time to wait for more of a body."""
        return self.started_s + self.limit_s - read_timeout_s(self.limit_s)


def connect_timeout_s(limit_s: float) -> float:
    """The timeout for opening a connection, in a call of `limit_s`."""
    return 0.12 * limit_s


def read_timeout_s(limit_s: float) -> float:
    """The timeout for a silent server, in a call of `limit_s`."""
    return 0.28 * limit_s


def call_with_retries(call: Callable[[], _T], policy: RetryPolicy, deadline: Deadline) -> _T:
    """The result of `call`, with the only retries: boto3's own are off. Raises the last try's R2Error."""

    def should_retry(error: Exception) -> bool:
        next_s = time.monotonic() + policy.max_wait_s
        return isinstance(error, R2Error) and error.is_transient and next_s < deadline.last_try_s

    for attempt in stamina.retry_context(
        on=should_retry,
        attempts=policy.max_tries,
        timeout=None,
        wait_initial=policy.first_wait_s,
        wait_max=policy.max_wait_s,
        wait_jitter=policy.jitter_s,
    ):
        with attempt:
            if time.monotonic() > deadline.last_try_s:
                raise R2Error(0, "NoConnectionFree")
            try:
                return call()
            except R2Error as error:
                error.tries = attempt.num
                raise
    raise AssertionError("stamina calls at least once")
