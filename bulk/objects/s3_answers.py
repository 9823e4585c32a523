"""What the failed answers of an S3 API mean for a bulk run. No vendor's types."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import TYPE_CHECKING, Final, Literal

from bulk.errors import (
    CredentialsRefused,
    PictureError,
    StoreFull,
    StoreRefused,
    StoreUnavailable,
    WrongUsage,
)

if TYPE_CHECKING:
    from bulk.errors import BulkError

Action = Literal["read", "list", "write"]

_CODE: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
# 0: there was no answer.
_TRANSIENT_STATUSES: Final = frozenset({0, HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS})
# With status 400 or 409: the store waited too long, two writers met, or bytes changed on the way.
_TRANSIENT_CODES: Final = frozenset(
    {
        *("RequestTimeout", "SlowDown", "ConditionalRequestConflict", "OperationAborted"),
        *("BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch"),
    }
)
_PERMANENT_STATUSES: Final = frozenset({HTTPStatus.NOT_IMPLEMENTED, HTTPStatus.INSUFFICIENT_STORAGE})
_FULL_CODES: Final = frozenset({"XMinioStorageFull", "QuotaExceeded"})
_CLOSED_CODES: Final = frozenset({"AccessDenied", "403"})
"""Without a body, as HEAD's answers are, boto3 takes the status for the code."""
_ABSENT_CODES: Final = frozenset({"NoSuchKey", "NoSuchBucket", "KeyTooLongError"})
_CREDENTIALS: Final = {
    "ExpiredToken": "have expired",
    "ExpiredTokenException": "have expired",
    "TokenRefreshRequired": "have expired",
    "InvalidToken": "have a wrong session token",
    "InvalidAccessKeyId": "have an unknown access key id",
    "SignatureDoesNotMatch": "have a secret access key that does not belong to the access key id",
    "RequestTimeTooSkewed": "cannot be checked, because this machine's clock is wrong",
    "Unauthorized": "are wrong",
    "UnauthorizedAccess": "are wrong",
    "InvalidClientTokenId": "are wrong",
    "AccountProblem": "belong to an account with a problem",
}
_RIGHTS: Final = {"read": "read from", "list": "list the objects of", "write": "write to"}


class S3Failure(Exception):
    """A failed request: the store's status and code, or status 0 and the kind of the failure."""

    def __init__(self, status: int, code: str) -> None:
        # The code comes from the network and is shown.
        self.code = code if _CODE.fullmatch(code) else "unknown"
        self.status = status
        super().__init__(f"status={status} code={self.code}")

    @property
    def is_transient(self) -> bool:
        """Whether a retry may succeed."""
        if self.status in _TRANSIENT_STATUSES or self.code in _TRANSIENT_CODES:
            return True
        return self.status >= 500 and self.status not in _PERMANENT_STATUSES

    def to_bulk_error(self, action: Action, bucket: str, max_wait_s: float) -> BulkError:
        """The error of the picture or of the run, after an `action` in `bucket` failed for good."""
        if self.code in _CREDENTIALS or self.status == HTTPStatus.UNAUTHORIZED:
            cause = _CREDENTIALS.get(self.code, "are wrong")
            return CredentialsRefused(
                f"the credentials for s3://{bucket} {cause} ({self}); set AWS_ACCESS_KEY_ID, "
                "AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN or a profile, and start the same command again"
            )
        if self.is_transient:
            return StoreUnavailable(
                f"s3://{bucket} did not answer as it should for {max_wait_s:.0f} s ({self}); start the same "
                "command again later"
            )
        if self.status == HTTPStatus.INSUFFICIENT_STORAGE or self.code in _FULL_CODES:
            return StoreFull(f"s3://{bucket} is full ({self}); make space, and start the same command again")
        if action == "read" and self.status >= 400:
            return self._picture_error()
        return self._refusal(action, bucket)

    def _picture_error(self) -> PictureError:
        if self.status == HTTPStatus.NOT_FOUND or self.code in _ABSENT_CODES:
            what = "no such bucket" if self.code == "NoSuchBucket" else "no object has this key"
            return PictureError("NOT_FOUND", what)
        if self.code in _CLOSED_CODES:
            return PictureError("FORBIDDEN", f"the credentials may not read this object ({self})")
        # One key that a store does not accept, or an archived object, must not end a run of a million others.
        return PictureError("REFUSED", f"the store refuses to give this object ({self})")

    def _refusal(self, action: Action, bucket: str) -> BulkError:
        if self.code == "NoSuchBucket":
            return WrongUsage(
                f"the bucket {bucket} does not exist ({self}); correct its name, or AWS_ENDPOINT_URL_S3"
            )
        if self.status == HTTPStatus.FORBIDDEN:
            return StoreRefused(f"the credentials may not {_RIGHTS[action]} s3://{bucket} ({self})")
        return StoreRefused(f"the store refuses to {_RIGHTS[action]} s3://{bucket} ({self})")
