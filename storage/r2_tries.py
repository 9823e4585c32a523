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

# Every call has answered by then: a caller gives its whole request 60 s.
DEADLINE_S: Final = 25.0
CONNECT_TIMEOUT_S: Final = 3.0
READ_TIMEOUT_S: Final = 7.0
# No try begins, and no body is read on, when it could end after the deadline.
_LAST_TRY_S: Final = DEADLINE_S - CONNECT_TIMEOUT_S - READ_TIMEOUT_S
LAST_READ_S: Final = DEADLINE_S - READ_TIMEOUT_S

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


def tried(once: Callable[[], _T], patience: Patience, begun_s: float) -> _T:
    """The only retry: boto3's own is off. Raises the last try's R2Error."""

    def is_worth_it(error: Exception) -> bool:
        next_s = time.monotonic() + patience.longest_wait_s
        return isinstance(error, R2Error) and error.may_pass and next_s < begun_s + _LAST_TRY_S

    for attempt in stamina.retry_context(
        on=is_worth_it,
        attempts=patience.tries,
        timeout=None,
        wait_initial=patience.first_wait_s,
        wait_max=patience.longest_wait_s,
        wait_jitter=patience.jitter_s,
    ):
        with attempt:
            try:
                return once()
            except R2Error as error:
                error.tries = attempt.num
                raise
    raise AssertionError("stamina tries at least once")
