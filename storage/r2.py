"""Images and masks in a Cloudflare R2 bucket, through its S3 API. boto3's types stay in this file.

R2 differs from S3 in ways that boto3's defaults do not expect: no checksum trailers, no answer to
`Expect: 100-continue`, 429 for a second write to a key within a second.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast
from uuid import uuid4

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, IncompleteReadError
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from storage.errors import ObjectTooLarge, StorageMisconfigured
from storage.keys import answer_key, checked_key, content_type, image_key, is_mask_url
from storage.r2_retries import (
    READ_POLICY,
    WRITE_POLICY,
    Deadline,
    R2Error,
    RetryPolicy,
    call_with_retries,
    connect_timeout_s,
    read_timeout_s,
)
from storage.r2_urls import R2Urls

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client
    from urllib3.response import BaseHTTPResponse

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_REFUSED_STATUS: Final = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN})
_CHUNK_BYTES: Final = 1 << 16
_CACHE_CONTROL: Final = "public, max-age=31536000, immutable"
_NO_ETAG: Final = '"00000000000000000000000000000000"'


@contextmanager
def _vendor_errors() -> Iterator[None]:
    try:
        yield
    except ClientError as error:
        answer = error.response
        status = answer["ResponseMetadata"]["HTTPStatusCode"]
        raise R2Error(status, answer["Error"].get("Code", "")) from None
    except (BotoCoreError, ResponseParserError, HTTPError, OSError, ValueError) as error:
        # ValueError: boto3 parses numbers in the headers, which may be malformed.
        raise R2Error(0, type(error).__name__) from None


class R2Bucket:
    """An ObjectStore in an R2 bucket. Create it in the process that uses it: it does not survive a fork.

    `endpoint` is the S3 API's URL. Masks are read at `public_base_url`; without one their URLs are the
    S3 API's. An image_url may be a bare key, a URL below `public_base_url` or below one of
    `image_url_bases`, or one of the S3 API, presigned or not. At most `connections` are open at once, and
    no call takes longer than `deadline_s`, retries and the wait for a connection included.
    The constructor sends nothing. Raises ValueError with a sentence that names the variable to correct.
    """

    def __init__(
        self,
        *,
        endpoint: str,
        bucket: str,
        access_key_id: str,
        secret_access_key: str,
        public_base_url: str | None = None,
        image_url_bases: tuple[str, ...] = (),
        user_prefix_required: bool = True,
        connections: int = 16,
        deadline_s: float = 25.0,
    ) -> None:
        self._urls = R2Urls(
            endpoint=endpoint,
            bucket=bucket,
            public_base_url=public_base_url,
            image_url_bases=image_url_bases,
        )
        self._bucket = bucket
        self._user_prefix_required = user_prefix_required
        self._deadline_s = deadline_s
        self._client = _client(endpoint, access_key_id, secret_access_key, connections, deadline_s)
        # As many threads as connections: a thread that runs never waits for a connection.
        self._threads = ThreadPoolExecutor(connections, thread_name_prefix="r2")

    def key_of(self, image_url: str, user_id: str) -> str:
        """See ObjectStore."""
        return image_key(
            image_url,
            user_id,
            key_in_url=self._urls.key_in_url,
            user_prefix_required=self._user_prefix_required,
        )

    async def download_image(self, image_url: str, user_id: str, max_bytes: int) -> bytes:
        """See ObjectStore."""
        key = self.key_of(image_url, user_id)
        return await self._call("get", READ_POLICY, lambda deadline: self._get(key, max_bytes, deadline))

    async def upload_mask(self, mask: bytes, key: str) -> str:
        """See ObjectStore. The URL is returned after the upload, since public caches would store a 404."""
        key = checked_key(key)
        await self._call("put", WRITE_POLICY, lambda _: self._put(key, mask))
        return self._urls.mask_url(key)

    async def download_answer(self, answer_url: str, user_id: str, task_id: str, max_bytes: int) -> bytes:
        """See ObjectStore."""
        key = answer_key(answer_url, user_id, task_id, key_in_url=self._urls.key_in_url)
        return await self._call("get", READ_POLICY, lambda deadline: self._get(key, max_bytes, deadline))

    async def delete_mask(self, key: str) -> None:
        """See ObjectStore."""
        key = checked_key(key)
        await self._call("delete", WRITE_POLICY, lambda _: self._delete(key))

    def holds_mask(self, mask_url: str, user_id: str, task_id: str) -> bool:
        """See ObjectStore."""
        return is_mask_url(mask_url, user_id, task_id, key_in_url=self._urls.key_in_url)

    async def check(self) -> list[str]:
        """See ObjectStore. Reads a key without an object, then sends a write whose condition must fail."""
        warnings = []
        if not self._urls.masks_are_public:
            warnings.append("R2_PUBLIC_BASE_URL is not set: mask URLs are the S3 API's, closed to browsers")
        try:
            await self._in_thread(lambda _: self._probe())
        except R2Error as error:
            warnings.append(f"R2 could not be checked: {error}")
        return warnings

    async def close(self) -> None:
        """See ObjectStore."""
        await asyncio.to_thread(self._threads.shutdown)
        self._client.close()

    def describe(self) -> str:
        """See ObjectStore."""
        return f"R2 bucket {self._bucket} at {self._urls.api_origin}"

    async def _call(self, operation: str, policy: RetryPolicy, request: Callable[[Deadline], _T]) -> _T:
        """The result of `request`. Logs an R2Error, and raises it as a StorageError without a cause.

        A cause would hold the URL.
        """
        try:
            return await self._in_thread(
                lambda deadline: call_with_retries(lambda: request(deadline), policy, deadline)
            )
        except R2Error as error:
            logger.log(error.log_level, "r2 %s failed: %s tries=%d", operation, error, error.tries)
            # Their frames hold the response: its socket would stay open until the next garbage collection.
            error.__traceback__ = error.__context__ = None
            raise error.to_storage_error() from None

    async def _in_thread(self, work: Callable[[Deadline], _T]) -> _T:
        """The result of `work` on a thread. Raises R2Error at the deadline, when the thread may still run."""
        deadline = Deadline(time.monotonic(), self._deadline_s)
        try:
            async with asyncio.timeout(self._deadline_s):
                return await asyncio.get_running_loop().run_in_executor(self._threads, work, deadline)
        except TimeoutError:
            raise R2Error(0, "DeadlineExceeded") from None

    @_vendor_errors()
    def _get(self, key: str, max_bytes: int, deadline: Deadline) -> bytes:
        answer = self._client.get_object(Bucket=self._bucket, Key=key)
        status = answer["ResponseMetadata"]["HTTPStatusCode"]
        # A chunked body has no length; its last chunk marks its end.
        length: int | None = answer.get("ContentLength")
        with _raw_body(answer["Body"]) as body:
            if status != HTTPStatus.OK:
                raise R2Error(status, "UnexpectedStatus")
            if length is not None and length > max_bytes:
                raise ObjectTooLarge(max_bytes)
            if length is None and not getattr(body, "chunked", False):
                raise R2Error(0, "MissingContentLength")
            data = _read(body, max_bytes, deadline)
        if length is not None and len(data) != length:
            raise R2Error(0, "TruncatedBody")
        return data

    @_vendor_errors()
    def _put(self, key: str, mask: bytes) -> None:
        self._client.put_object(
            Bucket=self._bucket,
            Key=key,
            Body=mask,
            ContentType=content_type(key),
            CacheControl=_CACHE_CONTROL,
        )

    @_vendor_errors()
    def _delete(self, key: str) -> None:
        # S3 answers 204 whether or not there was an object.
        self._client.delete_object(Bucket=self._bucket, Key=key)

    def _probe(self) -> None:
        # A new key each time: several processes start at once, and R2 accepts one write per second and key.
        key = f"masks/check-{uuid4()}"
        with _expect_codes({"NoSuchKey"}, "read"):
            self._client.get_object(Bucket=self._bucket, Key=key)
        with _expect_codes({"NoSuchKey", "PreconditionFailed"}, "write"):
            self._client.put_object(Bucket=self._bucket, Key=key, Body=b"", IfMatch=_NO_ETAG)


@contextmanager
def _expect_codes(codes: set[str], action: str) -> Iterator[None]:
    """Raises StorageMisconfigured, which names the setting, for a refusal with none of `codes`."""
    try:
        with _vendor_errors():
            yield
    except R2Error as error:
        if error.code in codes:
            return
        # The read has succeeded, so only a missing right is a fault of the settings here.
        if error.is_transient or (action == "write" and error.status not in _REFUSED_STATUS):
            raise
        raise StorageMisconfigured(error.to_operator_message(action)) from None


def _client(
    endpoint: str, access_key_id: str, secret_access_key: str, connections: int, deadline_s: float
) -> "S3Client":
    # A separate session: boto3's default session is shared between threads, and not thread-safe.
    client: S3Client = boto3.session.Session().client(
        "s3",
        endpoint_url=endpoint,
        region_name="auto",
        aws_access_key_id=access_key_id,
        aws_secret_access_key=secret_access_key,
        config=Config(
            signature_version="s3v4",
            s3={"addressing_style": "path"},
            max_pool_connections=connections,
            connect_timeout=connect_timeout_s(deadline_s),
            read_timeout=read_timeout_s(deadline_s),
            retries={"mode": "standard", "total_max_attempts": 1},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            tcp_keepalive=True,
        ),
    )
    client.meta.events.register("before-send.s3", _remove_expect_header)
    client.meta.events.register("before-call.s3", _disable_region_redirect)
    client.meta.events.register("before-parse.s3", _reject_truncated_errors)
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


def _raw_body(body: object) -> AbstractContextManager["BaseHTTPResponse"]:
    """The stream of botocore, which returns urllib3's response when entered; its types do not say so."""
    return cast("AbstractContextManager[BaseHTTPResponse]", body)


def _read(body: "BaseHTTPResponse", max_bytes: int, deadline: Deadline) -> bytes:
    """The body, read as it arrives: `read(n)` would wait for n bytes."""
    data = bytearray()
    while piece := body.read1(_CHUNK_BYTES):
        data += piece
        if len(data) > max_bytes:
            raise ObjectTooLarge(max_bytes)
        if time.monotonic() > deadline.last_read_s:
            raise R2Error(0, "SlowBody")
    return bytes(data)
