"""Images and masks in a Cloudflare R2 bucket, by its S3 API. boto3's types stay in this file.

R2 differs from S3 where boto3's defaults expect it least: no checksum trailers, no answer to
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
from storage.keys import checked_key, image_key, mask_in_url
from storage.r2_tries import GET, PUT, Deadline, R2Error, connect_timeout_s, read_timeout_s, tried
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
        # ValueError: boto3 takes the headers' numbers for numbers.
        raise R2Error(0, type(error).__name__) from None


class R2Bucket:
    """An ObjectStore in an R2 bucket. Make it in the process that uses it: it does not survive a fork.

    `endpoint` is the S3 API's URL. Masks are read at `public_base_url`; without one their URLs are the
    S3 API's. An image_url may be a bare key, a URL below `public_base_url`, below one of
    `image_url_bases`, or in the S3 API, presigned or not. At most `connections` are open at once, and
    no call takes longer than `deadline_s`, tries and waiting for a connection included.
    Nothing is sent yet. Raises ValueError with a sentence that names the variable to mend.
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
        return await self._told(
            "get", lambda deadline: tried(lambda: self._get(key, max_bytes, deadline), GET, deadline)
        )

    async def upload_mask(self, mask: bytes, key: str) -> str:
        """See ObjectStore. Public caches keep a 404, so nobody learns the URL before the bytes are there."""
        key = checked_key(key)
        await self._told("put", lambda deadline: tried(lambda: self._put(key, mask), PUT, deadline))
        return self._urls.mask_url(key)

    async def delete_mask(self, key: str) -> None:
        """See ObjectStore."""
        key = checked_key(key)
        await self._told("delete", lambda deadline: tried(lambda: self._delete(key), PUT, deadline))

    def holds_mask(self, mask_url: str, user_id: str, task_id: str) -> bool:
        """See ObjectStore."""
        return mask_in_url(mask_url, user_id, task_id, key_in_url=self._urls.key_in_url)

    async def check(self) -> list[str]:
        """See ObjectStore. Reads a key that has no object, then makes a write whose condition must fail."""
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

    async def _told(self, operation: str, work: Callable[[Deadline], _T]) -> _T:
        """The only place where R2's failures are logged and become ours; a cause would hold the URL."""
        try:
            return await self._in_thread(work)
        except R2Error as error:
            logger.log(error.log_level, "r2 %s failed: %s tries=%d", operation, error, error.tries)
            raise error.as_ours() from None

    async def _in_thread(self, work: Callable[[Deadline], _T]) -> _T:
        """`work`, when a thread is free. Raises R2Error at the deadline, whatever the thread does."""
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
        # Where the server chunks the body there is no length, and the last chunk proves the end.
        length: int | None = answer.get("ContentLength")
        with _raw_body(answer["Body"]) as body:
            if status != HTTPStatus.OK:
                raise R2Error(status, "NotWhole")
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
            Bucket=self._bucket, Key=key, Body=mask, ContentType="image/png", CacheControl=_CACHE_CONTROL
        )

    @_vendor_errors()
    def _delete(self, key: str) -> None:
        # S3 answers 204 whether or not there was an object.
        self._client.delete_object(Bucket=self._bucket, Key=key)

    def _probe(self) -> None:
        # A fresh key: several processes start at once, and R2 takes one write a second and key.
        key = f"masks/check-{uuid4()}"
        with _expecting({"NoSuchKey"}, "read"):
            self._client.get_object(Bucket=self._bucket, Key=key)
        with _expecting({"NoSuchKey", "PreconditionFailed"}, "write"):
            self._client.put_object(Bucket=self._bucket, Key=key, Body=b"", IfMatch=_NO_ETAG)


@contextmanager
def _expecting(codes: set[str], action: str) -> Iterator[None]:
    """Raises StorageMisconfigured, which names what to mend, for a refusal that is none of `codes`."""
    try:
        with _vendor_errors():
            yield
    except R2Error as error:
        if error.code in codes:
            return
        # After a read that went well, a write can only lack the right; what else it may meet is no proof.
        if error.may_pass or (action == "write" and error.status not in _REFUSED_STATUS):
            raise
        raise StorageMisconfigured(error.mend(action)) from None


def _client(
    endpoint: str, access_key_id: str, secret_access_key: str, connections: int, deadline_s: float
) -> "S3Client":
    # A session of its own: boto3's default one is shared, and not safe to share.
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
    client.meta.events.register("before-send.s3", _drop_expect)
    client.meta.events.register("before-call.s3", _stay_in_region)
    client.meta.events.register("before-parse.s3", _refuse_cut_errors)
    return client


def _drop_expect(request: Any, **_: object) -> None:
    # R2 never answers 100, and boto3 would wait a second for it; the header is not signed.
    request.headers.pop("Expect", None)


def _stay_in_region(params: dict[str, Any], **_: object) -> None:
    # At a redirect boto3 would ask HeadBucket for the region, whose redirect asks again, without an end.
    params["context"]["s3_redirect"]["redirected"] = True


def _refuse_cut_errors(response_dict: dict[str, Any], **_: object) -> None:
    # boto3 takes a refusal whose body was cut off for one of a server that speaks no S3.
    body, length = response_dict["body"], response_dict["headers"].get("Content-Length", "")
    if isinstance(body, bytes) and length.isdigit() and len(body) < int(length):
        raise IncompleteReadError(actual_bytes=len(body), expected_bytes=int(length))


def _raw_body(body: object) -> AbstractContextManager["BaseHTTPResponse"]:
    """As botocore's stream is: it gives urllib3's when it is entered; botocore's types do not say so."""
    return cast("AbstractContextManager[BaseHTTPResponse]", body)


def _read(body: "BaseHTTPResponse", max_bytes: int, deadline: Deadline) -> bytes:
    """The body, whose pieces are taken as they come: `read` would wait for a whole piece."""
    data = bytearray()
    while piece := body.read1(_CHUNK_BYTES):
        data += piece
        if len(data) > max_bytes:
            raise ObjectTooLarge(max_bytes)
        if time.monotonic() > deadline.allows_read_at_s:
            raise R2Error(0, "SlowBody")
    return bytes(data)
