"""What R2 may answer instead, and how often something is tried again. No vendor's types."""

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
_PASSING: Final = frozenset({0, 408, 429})
# By R2's code: what an operator must mend.
_FAULTS: Final = {
    "AccessDenied": "the token of R2_ACCESS_KEY_ID may not {action} in R2_BUCKET",
    "InvalidAccessKeyId": "R2_ACCESS_KEY_ID is unknown",
    "InvalidArgument": "R2_ACCESS_KEY_ID is malformed",
    "NoSuchBucket": "R2_BUCKET names no bucket of this account",
    "RequestTimeTooSkewed": "this machine's clock is wrong",
    "SignatureDoesNotMatch": "R2_SECRET_ACCESS_KEY does not belong to R2_ACCESS_KEY_ID",
    "Unauthorized": "R2_ACCESS_KEY_ID or R2_SECRET_ACCESS_KEY is wrong",
}


class R2Error(Exception):
    """What came instead of the answer: R2's status and code, or 0 and what went wrong on the way."""

    def __init__(self, status: int, code: str) -> None:
        # The code comes from the wire, and goes into a log line.
        self.code = code if _CODE.fullmatch(code) else "unknown"
        self.status = status
        self.tries = 1
        super().__init__(f"status={status} code={self.code}")

    @property
    def may_pass(self) -> bool:
        """Another try may do better."""
        return self.status in _PASSING or self.status >= 500

    @property
    def log_level(self) -> int:
        """A refusal needs the operator; a missing image is the caller's affair."""
        if self.may_pass:
            return logging.WARNING
        return logging.INFO if self.code == "NoSuchKey" else logging.ERROR

    def as_ours(self) -> StorageError:
        """The same, as the service knows it; the text is for the caller."""
        if self.code == "NoSuchKey":
            return ObjectNotFound("no image is stored there")
        if self.may_pass:
            return StorageUnavailable("the object store does not answer as it should; try again later")
        return StorageUnavailable("the object store refuses this server's requests")

    def mend(self, action: str) -> str:
        """What an operator must change, after a refusal of `action`."""
        fault = _FAULTS.get(self.code, "R2_ENDPOINT does not answer as R2's S3 API")
        return f"{fault.format(action=action)} ({self})"


@dataclass(frozen=True, slots=True)
class Patience:
    """How often something is tried, and how long it waits between, in seconds."""

    tries: int
    first_wait_s: float
    longest_wait_s: float
    jitter_s: float


GET: Final = Patience(tries=4, first_wait_s=0.1, longest_wait_s=1.0, jitter_s=0.2)
# R2 takes one write a second and key, and a failed one counts.
PUT: Final = Patience(tries=4, first_wait_s=1.1, longest_wait_s=4.0, jitter_s=0.5)


@dataclass(frozen=True, slots=True)
class Deadline:
    """When a call that was made at `begun_s` (of time.monotonic) must have ended, `limit_s` later.

    Of 25 s: 3 to connect, 7 to wait for a piece of an answer; no try begins after 15, and no body is
    read on after 18, since what is begun then may take until the end.
    """

    begun_s: float
    limit_s: float

    @property
    def allows_try_at_s(self) -> float:
        """The last moment for a try to begin."""
        return self.begun_s + self.limit_s - connect_timeout_s(self.limit_s) - read_timeout_s(self.limit_s)

    @property
    def allows_read_at_s(self) -> float:
        """The last moment to wait for more of a body."""
        return self.begun_s + self.limit_s - read_timeout_s(self.limit_s)


def connect_timeout_s(limit_s: float) -> float:
    """How long a connection may take to open, in a call of `limit_s`."""
    return 0.12 * limit_s


def read_timeout_s(limit_s: float) -> float:
    """How long the server may be silent, in a call of `limit_s`."""
    return 0.28 * limit_s


def tried(once: Callable[[], _T], patience: Patience, deadline: Deadline) -> _T:
    """The only retry: boto3's own is off. Raises the last try's R2Error."""

    def is_worth_it(error: Exception) -> bool:
        next_s = time.monotonic() + patience.longest_wait_s
        return isinstance(error, R2Error) and error.may_pass and next_s < deadline.allows_try_at_s

    for attempt in stamina.retry_context(
        on=is_worth_it,
        attempts=patience.tries,
        timeout=None,
        wait_initial=patience.first_wait_s,
        wait_max=patience.longest_wait_s,
        wait_jitter=patience.jitter_s,
    ):
        with attempt:
            if time.monotonic() > deadline.allows_try_at_s:
                raise R2Error(0, "NoConnectionFree")
            try:
                return once()
            except R2Error as error:
                error.tries = attempt.num
                raise
    raise AssertionError("stamina tries at least once")
