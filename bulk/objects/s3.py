"""Objects in a bucket, through the S3 API of R2, AWS or others. boto3's types stay in this file.

Stores differ from AWS in ways that boto3's defaults do not expect. R2 knows no checksum trailers, does not
answer `Expect: 100-continue`, and answers 429 to a second write to a key within a second.
"""

from __future__ import annotations

import io
import logging
import os
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast
from urllib.parse import urlsplit

import boto3
import stamina
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    IncompleteReadError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
    SSOError,
    TokenRetrievalError,
)
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from bulk.errors import CredentialsRefused, PictureError, StoreUnavailable, WrongUsage
from bulk.objects.base import StoredObject
from bulk.objects.s3_answers import S3Failure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path
    from typing import BinaryIO

    from _typeshed import WriteableBuffer
    from stamina.instrumentation import RetryDetails
    from types_boto3_s3 import S3Client
    from types_boto3_s3.type_defs import GetObjectOutputTypeDef, ListObjectsV2OutputTypeDef
    from urllib3.response import BaseHTTPResponse

    from bulk.objects.s3_answers import Action

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_CONNECT_TIMEOUT_S: Final = 10.0
_READ_TIMEOUT_S: Final = 60.0
_CONNECTIONS: Final = 32
_CHUNK_BYTES: Final = 1 << 16
_PART_BYTES: Final = 8 << 20
_UPLOAD: Final = TransferConfig(multipart_threshold=64 << 20, multipart_chunksize=64 << 20)
_UPLOAD_TRIES: Final = 8
# R2 accepts one write per second and key, and counts failed ones.
_FIRST_WAIT_S: Final = {"read": 0.2, "list": 0.2, "write": 1.1}
_MAX_WAIT_BETWEEN_TRIES_S: Final = 20.0
LONG_WAIT_S: Final = 5.0
"""After which a user learns why the run stands still."""


@dataclass(frozen=True)
class S3Objects:
    """Objects of a bucket whose keys begin with `prefix` and a slash; all if it is empty. See `Objects`.

    Credentials, region and endpoint are found by boto3's own rules: AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL_S3,
    AWS_PROFILE and so on. At an endpoint that is not AWS's, addresses are path-style. `create` relies on the
    header If-None-Match; where a store refuses the header, it looks first and then writes.
    """

    bucket: str
    prefix: str
    max_wait_s: float

    @property
    def uri(self) -> str:
        """See Objects."""
        return f"s3://{self.bucket}/{self.prefix}" if self.prefix else f"s3://{self.bucket}"

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """See Objects. Keys that end with a slash are folders of other tools, and no objects here."""
        root = self._key("")
        token = ""
        while True:
            page = self._page(root + prefix, token)
            for entry in page.get("Contents", []):
                name = entry["Key"].removeprefix(root)
                if name and not name.endswith("/"):
                    yield StoredObject(name, entry["Size"], entry.get("ETag"))
            token = page.get("NextContinuationToken", "")
            if not token:
                return

    def read(self, name: str, max_bytes: int | None = None) -> bytes:
        """See Objects. A body that ends early is read again."""
        until_s = time.monotonic() + self.max_wait_s

        def get(client: S3Client) -> bytes:
            answer = client.get_object(Bucket=self.bucket, Key=self._key(name))
            return _body(answer, max_bytes, until_s)

        with self._bulk_errors("read"):
            try:
                return self._retried("read", get)
            except S3Failure as failure:
                if failure.code == "SignatureDoesNotMatch" and self._signs_correctly():
                    raise PictureError("REFUSED", "the store does not accept the key as it is") from None
                raise

    def open(self, name: str) -> BinaryIO:
        """See Objects. Reading raises StoreUnavailable if the object is replaced meanwhile."""
        with self._bulk_errors("read"):
            size_bytes, etag = self._size_and_etag(self._key(name))
        return io.BufferedReader(_Parts(self, self._key(name), size_bytes, etag), _PART_BYTES)

    def create(self, name: str, data: bytes, content_type: str) -> bool:
        """See Objects."""
        key = self._key(name)

        def put(client: S3Client) -> None:
            client.put_object(
                Bucket=self.bucket, Key=key, Body=data, ContentType=content_type, IfNoneMatch="*"
            )

        with self._bulk_errors("write"):
            try:
                self._retried("write", put)
            except S3Failure as failure:
                if failure.status == HTTPStatus.PRECONDITION_FAILED:
                    return False
                if failure.status != HTTPStatus.NOT_IMPLEMENTED:
                    raise
                if self._exists(key):
                    return False
                self.replace(name, data, content_type)
            return True

    def replace(self, name: str, data: bytes, content_type: str) -> None:
        """See Objects."""

        def put(client: S3Client) -> None:
            client.put_object(Bucket=self.bucket, Key=self._key(name), Body=data, ContentType=content_type)

        with self._bulk_errors("write"):
            self._retried("write", put)

    def upload(self, name: str, path: Path, content_type: str) -> None:
        """See Objects. Files above 64 MiB are sent in parts; a part that fails is sent again."""

        def send(client: S3Client) -> None:
            with path.open("rb") as file:
                headers = {"ContentType": content_type}
                client.upload_fileobj(file, self.bucket, self._key(name), ExtraArgs=headers, Config=_UPLOAD)

        with self._bulk_errors("write"):
            self._retried("write", send, tries_of_requests=_UPLOAD_TRIES)

    def read_part(self, key: str, start: int, size_bytes: int, etag: str) -> bytes:
        """`size_bytes` bytes from `start` of the object that has this etag.

        Raises:
            StoreUnavailable: the object has another etag now.
        """
        until_s = time.monotonic() + self.max_wait_s
        part = f"bytes={start}-{start + size_bytes - 1}"
        unchanged: Any = {"IfMatch": etag} if etag else {}

        def get(client: S3Client) -> bytes:
            answer = client.get_object(Bucket=self.bucket, Key=key, Range=part, **unchanged)
            return _body(answer, size_bytes, until_s)

        with self._bulk_errors("read"):
            try:
                return self._retried("read", get)
            except S3Failure as failure:
                if failure.status != HTTPStatus.PRECONDITION_FAILED:
                    raise
        raise StoreUnavailable(f"s3://{self.bucket}/{key} was replaced while it was read; start again")

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def _page(self, prefix: str, token: str) -> ListObjectsV2OutputTypeDef:
        def list_page(client: S3Client) -> ListObjectsV2OutputTypeDef:
            if not token:
                return client.list_objects_v2(Bucket=self.bucket, Prefix=prefix)
            return client.list_objects_v2(Bucket=self.bucket, Prefix=prefix, ContinuationToken=token)

        with self._bulk_errors("list"):
            return self._retried("list", list_page)

    def _signs_correctly(self) -> bool:
        """Whether the store knows the signature of a request without a key.

        Some servers rewrite a key such as `a/../b` before they check its signature, which then differs.
        """
        try:
            self._retried("list", lambda client: client.list_objects_v2(Bucket=self.bucket, MaxKeys=1))
        except S3Failure as failure:
            return failure.code == "AccessDenied"
        return True

    def _exists(self, key: str) -> bool:
        try:
            self._size_and_etag(key)
        except S3Failure as failure:
            if failure.status == HTTPStatus.NOT_FOUND:
                return False
            raise
        return True

    def _size_and_etag(self, key: str) -> tuple[int, str]:
        """Asks for one byte by GET: a refusal of HEAD has no code."""

        def get(client: S3Client) -> tuple[int, str]:
            answer = client.get_object(Bucket=self.bucket, Key=key, Range="bytes=0-0")
            answer["Body"].close()
            # "bytes 0-0/1234"; there is none where a server does not know ranges.
            size = answer.get("ContentRange", "").rpartition("/")[2]
            return int(size or answer["ContentLength"]), answer.get("ETag", "")

        try:
            return self._retried("read", get)
        except S3Failure as failure:
            if failure.status != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise
            return 0, ""  # an empty object has no first byte

    def _retried(self, action: Action, work: Callable[[S3Client], _T], *, tries_of_requests: int = 1) -> _T:
        """The result of `work`. Raises the last try's S3Failure."""
        for attempt in stamina.retry_context(
            on=_is_transient,
            attempts=None,
            timeout=self.max_wait_s,
            wait_initial=_FIRST_WAIT_S[action],
            wait_max=_MAX_WAIT_BETWEEN_TRIES_S,
            wait_jitter=_FIRST_WAIT_S[action],
        ):
            with attempt, _vendor_errors(self.bucket):
                return work(_CLIENTS.client(self.bucket, self.max_wait_s, tries_of_requests))
        raise AssertionError("stamina calls at least once")

    @contextmanager
    def _bulk_errors(self, action: Action) -> Iterator[None]:
        try:
            yield
        except S3Failure as failure:
            # Their frames hold the answer: its socket would stay open until the next garbage collection.
            failure.__traceback__ = failure.__context__ = None
            error = failure.to_bulk_error(action, self.bucket, self.max_wait_s)
            if isinstance(error, CredentialsRefused):
                _CLIENTS.forget()  # a later run in this process reads the credentials again
            raise error from None


def _is_transient(error: Exception) -> bool:
    return isinstance(error, S3Failure) and error.is_transient


def warn_of_long_wait(details: RetryDetails) -> None:
    """Log once a call that the store keeps it waiting. For `stamina.instrumentation.set_on_retry_hooks`."""
    if details.waited_so_far < LONG_WAIT_S <= details.waited_so_far + details.wait_for:
        logger.warning("the store does not answer as it should (%s); trying again", details.caused_by)


@contextmanager
def _vendor_errors(bucket: str) -> Iterator[None]:
    """Turns boto3's errors into S3Failure, or into the run's error where no request was sent."""
    try:
        yield
    except ClientError as error:
        answer = error.response
        status = answer["ResponseMetadata"]["HTTPStatusCode"]
        raise S3Failure(status, answer["Error"].get("Code", "")) from None
    except (
        *(NoCredentialsError, PartialCredentialsError, CredentialRetrievalError, ProfileNotFound),
        *(SSOError, TokenRetrievalError),
    ) as error:
        raise CredentialsRefused(
            f"there are no usable credentials for s3://{bucket} ({type(error).__name__}); set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
        ) from None
    except ParamValidationError:
        raise WrongUsage(f"{bucket!r} cannot be the name of a bucket") from None
    except (BotoCoreError, ResponseParserError, HTTPError, OSError, ValueError) as error:
        # ValueError: boto3 parses numbers in the headers, which may be malformed.
        raise S3Failure(0, type(error).__name__) from None


class _Parts(io.RawIOBase):
    """An object that is read in parts, each by a request of its own."""

    def __init__(self, objects: S3Objects, key: str, size_bytes: int, etag: str) -> None:
        super().__init__()
        self._objects = objects
        self._key = key
        self._size_bytes = size_bytes
        self._etag = etag
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size_bytes}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readall(self) -> bytes:
        # The inherited one reads 8 KiB at a time.
        return b"".join(iter(lambda: self.read(_PART_BYTES) or b"", b""))

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer).cast("B")
        size_bytes = min(len(view), self._size_bytes - self._position)
        if size_bytes <= 0:
            return 0
        data = self._objects.read_part(self._key, self._position, size_bytes, self._etag)
        view[: len(data)] = data
        self._position += len(data)
        return len(data)


def _body(answer: GetObjectOutputTypeDef, max_bytes: int | None, until_s: float) -> bytes:
    """The whole body. Raises PictureError TOO_LARGE, and S3Failure for one that is incomplete or slow."""
    # A chunked body has no length; its last chunk marks its end.
    length: int | None = answer.get("ContentLength")
    with _raw_body(answer["Body"]) as body:
        if length is not None and max_bytes is not None and length > max_bytes:
            raise _too_large(max_bytes)
        if length is None and not getattr(body, "chunked", False):
            raise S3Failure(0, "MissingContentLength")
        data = _read(body, max_bytes, until_s)
    if length is not None and len(data) != length:
        raise S3Failure(0, "TruncatedBody")
    return data


def _raw_body(body: object) -> AbstractContextManager[BaseHTTPResponse]:
    """The stream of botocore, which returns urllib3's response when entered; its types do not say so."""
    return cast("AbstractContextManager[BaseHTTPResponse]", body)


def _read(body: BaseHTTPResponse, max_bytes: int | None, until_s: float) -> bytes:
    """The body, read as it arrives: `read(n)` would wait for n bytes."""
    data = bytearray()
    while piece := body.read1(_CHUNK_BYTES):
        data += piece
        if max_bytes is not None and len(data) > max_bytes:
            raise _too_large(max_bytes)
        if time.monotonic() > until_s:
            raise S3Failure(0, "SlowBody")
    return bytes(data)


def _too_large(max_bytes: int) -> PictureError:
    return PictureError("TOO_LARGE", f"the object has more than {max_bytes} bytes")


class _Clients:
    """The clients of this process. Those of a parent process do not survive a fork."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Make new clients from now on."""
        # The parent's lock may be held by a thread that this process does not have.
        self._lock = threading.Lock()
        self._clients: dict[tuple[str, float, int], S3Client] = {}

    def client(self, bucket: str, max_wait_s: float, tries_of_requests: int) -> S3Client:
        """The client of a bucket, with its own connections."""
        key = (bucket, max_wait_s, tries_of_requests)
        with self._lock:
            if key not in self._clients:
                self._clients[key] = _new_client(max_wait_s, tries_of_requests)
            return self._clients[key]


_CLIENTS: Final = _Clients()
os.register_at_fork(after_in_child=_CLIENTS.forget)


def _new_client(max_wait_s: float, tries_of_requests: int) -> S3Client:
    # A separate session: boto3's default session is shared between threads, and not thread-safe.
    session = boto3.session.Session()
    try:
        found: S3Client = session.client("s3")
    except ValueError:
        raise WrongUsage("AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL is not a URL") from None
    is_aws = (urlsplit(found.meta.endpoint_url).hostname or "").endswith(
        (".amazonaws.com", ".amazonaws.com.cn")
    )
    found.close()
    client: S3Client = session.client(
        "s3",
        config=Config(
            signature_version="s3v4",
            s3={"addressing_style": "auto" if is_aws else "path"},
            max_pool_connections=_CONNECTIONS,
            connect_timeout=min(_CONNECT_TIMEOUT_S, max_wait_s),
            read_timeout=min(_READ_TIMEOUT_S, max_wait_s),
            retries={"mode": "standard", "total_max_attempts": tries_of_requests},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            tcp_keepalive=True,
        ),
    )
    client.meta.events.register("before-send.s3", _remove_expect_header)
    client.meta.events.register("before-parse.s3", _reject_truncated_errors)
    if not is_aws:
        client.meta.events.register("before-call.s3", _disable_region_redirect)
    return client


def _remove_expect_header(request: Any, **_: object) -> None:
    # R2 never answers 100, and boto3 would wait a second for it. The header is not signed.
    request.headers.pop("Expect", None)


def _disable_region_redirect(params: dict[str, Any], **_: object) -> None:
    # On a redirect boto3 sends HeadBucket to find the region; its redirect sends it again, without an end.
    params["context"]["s3_redirect"]["redirected"] = True


def _reject_truncated_errors(response_dict: dict[str, Any], **_: object) -> None:
    # boto3 parses a truncated error body as that of a server without the S3 API.
    body, length = response_dict["body"], response_dict["headers"].get("Content-Length", "")
    if isinstance(body, bytes) and length.isdigit() and len(body) < int(length):
        raise IncompleteReadError(actual_bytes=len(body), expected_bytes=int(length))
