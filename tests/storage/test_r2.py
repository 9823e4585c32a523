"""The R2 store alone: headers, faults, deadlines and connections, over real sockets."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import logging
import time
import traceback
from contextlib import asynccontextmanager, suppress
from io import BytesIO
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import httpx
import psutil
import pytest
from botocore.awsrequest import AWSResponse
from urllib3 import HTTPHeaderDict, HTTPResponse

from storage import (
    ObjectNotFound,
    ObjectTooLarge,
    StorageError,
    StorageMisconfigured,
    StorageUnavailable,
    mask_key,
)
from storage.r2 import R2Bucket
from tests.services.faults import FaultProxy, Seen, fault_proxy
from tests.services.processes import wait_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from tests.services.objects import S3Service

pytestmark = pytest.mark.anyio

TASK_ID = "0c8e6a2e-4f6b-4d0e-9d0c-3f6f1b1f2a11"
IMAGE = bytes(range(256)) * 8
MASK = b"\x89PNG mask"
MAX_BYTES = 1 << 20


@pytest.fixture
def proxy(seaweedfs: S3Service) -> Iterator[FaultProxy]:
    with fault_proxy(seaweedfs.endpoint) as running:
        yield running


@pytest.fixture
def user(seaweedfs: S3Service) -> str:
    """A user with one upload, `cat`."""
    name = f"user-{uuid4()}"
    seaweedfs.put(f"uploads/{name}/cat", IMAGE)
    return name


@asynccontextmanager
async def opened(service: S3Service, endpoint: str, **changes: Any) -> AsyncIterator[R2Bucket]:
    """The service's bucket, through the server at `endpoint`."""
    values = {
        "bucket": service.bucket,
        "access_key_id": service.access_key_id,
        "secret_access_key": service.secret_access_key,
    }
    bucket = R2Bucket(endpoint=endpoint, **(values | changes))
    try:
        yield bucket
    finally:
        await bucket.close()


def xml(code: str) -> bytes:
    """The body of an error of R2."""
    return f"<Error><Code>{code}</Code><Message>what R2 says</Message></Error>".encode()


def is_put(seen: Seen) -> bool:
    return seen.method == "PUT"


def log_lines(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    return [(r.levelno, r.getMessage()) for r in caplog.records if r.name.startswith("storage.")]


# The requests as sent. boto3 adds some headers over https alone, so these tests do not use http.


async def sent_over_https(work: Callable[[R2Bucket], Any]) -> Any:
    """The complete signed request that `work` would send to R2."""
    bucket = R2Bucket(
        endpoint="https://acc0.r2.cloudflarestorage.com",
        bucket="s3-images",
        access_key_id="key",
        secret_access_key="secret",
    )
    sent = []

    def answer(request: Any, **_: object) -> Any:
        sent.append(request)
        headers: Any = HTTPHeaderDict()
        body = HTTPResponse(BytesIO(xml("NoSuchKey")), preload_content=False)
        return AWSResponse(request.url, 404, headers, body)

    bucket._client.meta.events.register("before-send.s3", answer)
    with pytest.raises(ObjectNotFound):
        await work(bucket)
    await bucket.close()
    [request] = sent
    return request


async def test_put_over_https() -> None:
    """A PUT has a plain body, signed by SHA-256: no checksum trailer, no chunks, no Expect, no ACL."""
    request = await sent_over_https(lambda bucket: bucket.upload_mask(MASK, "masks/u/t/0.png"))
    headers = {name.lower(): value for name, value in request.headers.items()}
    headers = {name: value.decode() if isinstance(value, bytes) else value for name, value in headers.items()}
    assert request.url == "https://acc0.r2.cloudflarestorage.com/s3-images/masks/u/t/0.png"
    assert request.body.getvalue() == MASK
    assert headers["x-amz-content-sha256"] == hashlib.sha256(MASK).hexdigest()
    assert headers["content-length"] == str(len(MASK))
    assert "/auto/s3/aws4_request" in headers["authorization"]
    assert headers["content-type"] == "image/png"
    assert headers["cache-control"] == "public, max-age=31536000, immutable"
    refused = {
        "expect",
        "transfer-encoding",
        "content-encoding",
        "x-amz-trailer",
        "x-amz-acl",
        "x-amz-tagging",
    }
    assert not refused & set(headers)
    assert not [name for name in headers if "checksum" in name]


async def test_get_over_https() -> None:
    """A GET is one request, without a checksum mode or a range."""
    request = await sent_over_https(lambda bucket: bucket.download_image("uploads/u/cat", "u", MAX_BYTES))
    names = {name.lower() for name in request.headers}
    assert request.method == "GET"
    assert request.url == "https://acc0.r2.cloudflarestorage.com/s3-images/uploads/u/cat"
    assert not [name for name in names if "checksum" in name or name == "range"]


async def test_mask_is_an_immutable_png(r2_emulator: S3Service) -> None:
    """A browser receives a mask as a PNG that may be cached without a limit."""
    base = r2_emulator.public_base_url
    async with opened(r2_emulator, r2_emulator.endpoint, public_base_url=base) as bucket:
        url = await bucket.upload_mask(MASK, mask_key("user-1", TASK_ID, 0, MASK, attempt_id="a"))
    async with httpx.AsyncClient() as browser:
        answer = await browser.get(url)
    assert answer.content == MASK
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"


# Faults: each one's error, and its line in the log.

REFUSALS = {
    "401": (401, "Unauthorized"),
    "403": (403, "AccessDenied"),
    "wrong secret": (403, "SignatureDoesNotMatch"),
    "no bucket": (404, "NoSuchBucket"),
    "malformed key id": (400, "InvalidArgument"),
    "redirect": (307, "TemporaryRedirect"),
}


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS.keys())
async def test_refusal_is_not_retried(
    refusal: tuple[int, str],
    seaweedfs: S3Service,
    proxy: FaultProxy,
    user: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A refusal by R2 is one request, an ERROR in the log, and StorageUnavailable for the caller."""
    status, code = refusal
    caplog.set_level(logging.INFO)
    proxy.fail_next(9, status=status, body=xml(code), headers={"Location": "http://169.254.169.254/"})
    async with opened(seaweedfs, proxy.url) as bucket:
        with pytest.raises(StorageUnavailable, match="refuses this server's requests"):
            await bucket.download_image(f"uploads/{user}/cat", user, MAX_BYTES)
        with pytest.raises(StorageUnavailable, match="refuses this server's requests"):
            await bucket.upload_mask(MASK, f"masks/{user}.png")
    assert len(proxy.requests) == 2
    assert log_lines(caplog) == [
        (logging.ERROR, f"r2 get failed: status={status} code={code} tries=1"),
        (logging.ERROR, f"r2 put failed: status={status} code={code} tries=1"),
    ]


async def test_missing_image_is_not_found(
    seaweedfs: S3Service, proxy: FaultProxy, user: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A missing image is one request, ObjectNotFound, and only an INFO in the log."""
    caplog.set_level(logging.INFO)
    async with opened(seaweedfs, proxy.url) as bucket:
        with pytest.raises(ObjectNotFound):
            await bucket.download_image(f"uploads/{user}/dog", user, MAX_BYTES)
    assert len(proxy.requests) == 1
    assert log_lines(caplog) == [(logging.INFO, "r2 get failed: status=404 code=NoSuchKey tries=1")]


TRANSIENT: dict[str, Callable[[FaultProxy, int], None]] = {
    "429": lambda proxy, n: proxy.fail_next(n, status=429, body=xml("TooManyRequests")),
    "500": lambda proxy, n: proxy.fail_next(n, status=500, body=xml("InternalError")),
    "503 without a body": lambda proxy, n: proxy.fail_next(n, status=503),
    "502 of a gateway": lambda proxy, n: proxy.fail_next(n, status=502, body=b"<html>bad gateway</html>"),
    "cut connection": lambda proxy, n: proxy.cut_next(n),
    "lost answer": lambda proxy, n: proxy.lose_answer_next(n),
}
TRANSIENT_FOR_GET: dict[str, Callable[[FaultProxy, int], None]] = {
    **TRANSIENT,
    "truncated body": lambda proxy, n: proxy.cut_next(n, after_bytes=700),
    "no byte of the body": lambda proxy, n: proxy.cut_next(n, after_bytes=0),
    "fewer bytes than Content-Length": lambda proxy, n: proxy.wrong_length_next(n, extra_bytes=1),
}


@pytest.mark.parametrize("fault", TRANSIENT_FOR_GET.values(), ids=TRANSIENT_FOR_GET.keys())
async def test_get_is_retried_after_a_transient_fault(
    fault: Callable[[FaultProxy, int], None],
    seaweedfs: S3Service,
    proxy: FaultProxy,
    user: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One bad answer costs a second request, and the image is complete."""
    fault(proxy, 1)
    async with opened(seaweedfs, proxy.url) as bucket:
        assert await bucket.download_image(f"uploads/{user}/cat", user, MAX_BYTES) == IMAGE
    assert len(proxy.requests) == 2
    assert log_lines(caplog) == []


@pytest.mark.parametrize("fault", TRANSIENT_FOR_GET.values(), ids=TRANSIENT_FOR_GET.keys())
async def test_persistent_fault_is_unavailable(
    fault: Callable[[FaultProxy, int], None],
    seaweedfs: S3Service,
    proxy: FaultProxy,
    user: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A persistent fault raises StorageUnavailable after four tries, with one line in the log."""
    fault(proxy, 99)
    async with opened(seaweedfs, proxy.url) as bucket:
        with pytest.raises(StorageUnavailable, match="try again later"):
            await bucket.download_image(f"uploads/{user}/cat", user, MAX_BYTES)
    assert len(proxy.requests) == 4
    [(level, line)] = log_lines(caplog)
    assert level == logging.WARNING
    assert line.startswith("r2 get failed: status=")
    assert line.endswith(" tries=4")


@pytest.mark.parametrize("fault", TRANSIENT.values(), ids=TRANSIENT.keys())
async def test_put_is_retried_after_a_transient_fault(
    fault: Callable[[FaultProxy, int], None], seaweedfs: S3Service, proxy: FaultProxy, user: str
) -> None:
    """A PUT is retried a second later: R2 accepts one write per second and key, and counts failed ones."""
    started_s: list[float] = []

    def record(_: Seen) -> bool:
        started_s.append(time.monotonic())
        return False

    proxy.hang_next(when=record)  # never hangs: it only records the times
    fault(proxy, 1)
    key = mask_key(user, TASK_ID, 0, MASK, attempt_id="a")
    async with opened(seaweedfs, proxy.url) as bucket:
        await bucket.upload_mask(MASK, key)
    assert seaweedfs.get(key) == MASK
    first_s, second_s = started_s
    assert second_s - first_s > 1.0


async def test_mask_url_is_returned_after_the_upload(
    seaweedfs: S3Service, proxy: FaultProxy, user: str
) -> None:
    """The URL is returned once the bytes are stored: a public cache would store an earlier 404."""
    key = mask_key(user, TASK_ID, 0, MASK, attempt_id="a")
    proxy.hang_next(1, when=is_put)
    async with opened(seaweedfs, proxy.url) as bucket:
        upload = asyncio.create_task(bucket.upload_mask(MASK, key))
        await asyncio.to_thread(proxy.wait_for_requests, 1)
        assert not upload.done()
        proxy.heal()
        assert (await upload).endswith(key)
    assert seaweedfs.get(key) == MASK


# Deadlines: of a call, and of the thread that does its work.

SLOW: dict[str, Callable[[FaultProxy], None]] = {
    "ReadTimeoutError": lambda proxy: proxy.hang_next(99),
    "SlowBody": lambda proxy: proxy.slow_next(99, bytes_per_s=8),
}


@pytest.mark.parametrize("code", SLOW)
async def test_slow_answers_end_at_the_deadline(
    code: str,
    seaweedfs: S3Service,
    proxy: FaultProxy,
    user: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A call whose answer hangs or trickles ends at the deadline and frees its connection."""
    async with opened(seaweedfs, proxy.url, connections=1, deadline_s=4.0) as bucket:
        SLOW[code](proxy)
        with pytest.raises(StorageUnavailable, match="try again later"):
            await bucket.download_image(f"uploads/{user}/cat", user, MAX_BYTES)
        proxy.heal()
        # On the only thread, over the only connection.
        assert await bucket.download_image(f"uploads/{user}/cat", user, MAX_BYTES) == IMAGE
    [(_, line)] = log_lines(caplog)
    assert f"status=0 code={code} " in line


async def test_deadline_includes_the_wait_for_a_connection(
    seaweedfs: S3Service, proxy: FaultProxy, user: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Calls that wait behind a hanging one end at their own deadline, and send no request after it."""
    async with opened(seaweedfs, proxy.url, connections=1, deadline_s=2.0) as bucket:
        proxy.hang_next(99)
        calls = [bucket.download_image(f"uploads/{user}/cat", user, MAX_BYTES) for _ in range(6)]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [StorageUnavailable] * 6
    assert len(proxy.requests) <= 3
    assert len(log_lines(caplog)) == 6


async def test_refused_connection_is_unavailable(seaweedfs: S3Service, user: str) -> None:
    """A refused connection raises StorageUnavailable, not an error of the network library."""
    async with opened(seaweedfs, "http://127.0.0.1:9", deadline_s=5.0) as bucket:
        with pytest.raises(StorageUnavailable):
            await bucket.download_image(f"uploads/{user}/cat", user, MAX_BYTES)


# Answers that no real server sends.


@asynccontextmanager
async def raw_server(
    *pieces: bytes, pause_s: float = 0.0, times: int = 1, enough: asyncio.Event | None = None
) -> AsyncIterator[str]:
    """A server that answers with `pieces`, all but the first `times` times, until `enough` is set."""
    enough = enough or asyncio.Event()
    serving: set[asyncio.Task[None] | None] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(asyncio.current_task())
        try:
            await reader.readuntil(b"\r\n\r\n")
            for index, piece in enumerate((pieces[0], *pieces[1:] * times)):
                await asyncio.sleep(pause_s if index else 0)
                if enough.is_set():
                    return
                writer.write(piece)
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client has disconnected
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        enough.set()
        # A socket that stays open would be reported as a warning in another test.
        await asyncio.gather(*filter(None, serving))


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


async def get_from(service: S3Service, url: str, max_bytes: int = MAX_BYTES) -> bytes:
    async with opened(service, url, deadline_s=3.0) as bucket:
        return await bucket.download_image("uploads/u/cat", "u", max_bytes)


async def test_chunked_image_is_read(seaweedfs: S3Service) -> None:
    """A chunked body is complete with its last chunk."""
    async with raw_server(CHUNKED + b"3\r\ncat\r\n0\r\n\r\n") as url:
        assert await get_from(seaweedfs, url) == b"cat"


async def test_endless_chunks_are_too_large(seaweedfs: S3Service) -> None:
    """A chunked body without an end is read up to `max_bytes`."""
    chunk = b"10000\r\n" + bytes(1 << 16) + b"\r\n"
    async with raw_server(CHUNKED, chunk, times=10_000) as url:
        with pytest.raises(ObjectTooLarge):
            await get_from(seaweedfs, url)


INCOMPLETE = {
    "cut between chunks": CHUNKED + b"3\r\ncat\r\n",
    "cut in a chunk": CHUNKED + b"9\r\ncat",
    "neither length nor chunks": OK + b"\r\ncat",
    "a part": b"HTTP/1.1 206 Partial Content\r\nContent-Length: 3\r\n\r\ncat",
    "no content": b"HTTP/1.1 204 No Content\r\n\r\n",
    "not HTTP": b"SSH-2.0-OpenSSH_9.2\r\n",
    "length that is no number": OK + b"Content-Length: many\r\n\r\ncat",
}


@pytest.mark.parametrize("answer", INCOMPLETE.values(), ids=INCOMPLETE.keys())
async def test_incomplete_image_is_refused(answer: bytes, seaweedfs: S3Service) -> None:
    """An answer that may not be the complete object raises StorageUnavailable."""
    async with raw_server(answer) as url:
        with pytest.raises(StorageUnavailable):
            await get_from(seaweedfs, url)


async def test_malformed_answer_leaves_no_open_socket(seaweedfs: S3Service) -> None:
    """The socket of a malformed answer is closed by the end of the call, without a garbage collection."""
    async with raw_server(INCOMPLETE["length that is no number"]) as url:
        gc.disable()
        try:
            with pytest.raises(StorageUnavailable):
                await get_from(seaweedfs, url)
            sockets = psutil.Process().net_connections("tcp")
        finally:
            gc.enable()
    port = int(url.rpartition(":")[2])
    assert not [each for each in sockets if getattr(each.raddr, "port", None) == port]


async def test_large_image_is_refused_by_its_length(seaweedfs: S3Service) -> None:
    """An image whose Content-Length exceeds `max_bytes` is refused before its body is read."""
    async with raw_server(OK + b"Content-Length: 1001\r\n\r\n", b"x", pause_s=0.1, times=1001) as url:
        with pytest.raises(ObjectTooLarge):
            await get_from(seaweedfs, url, max_bytes=1000)


async def test_slow_headers_end_at_the_deadline(seaweedfs: S3Service) -> None:
    """A call ends at its deadline while an answer's headers still arrive."""
    enough = asyncio.Event()
    async with (
        raw_server(OK, b"X: y\r\n", pause_s=0.1, times=100_000, enough=enough) as url,
        opened(seaweedfs, url, deadline_s=2.0) as bucket,
    ):
        with pytest.raises(StorageUnavailable):
            await bucket.download_image("uploads/u/cat", "u", MAX_BYTES)
        enough.set()


# Connections.


async def test_burst_stays_in_the_pool(seaweedfs: S3Service, proxy: FaultProxy, user: str) -> None:
    """50 concurrent tasks open at most 16 connections, and reuse them."""
    proxy.slow_next(50, bytes_per_s=20_000)
    async with opened(seaweedfs, proxy.url) as bucket:
        for _ in range(2):
            images = [bucket.download_image(f"uploads/{user}/cat", user, MAX_BYTES) for _ in range(50)]
            keys = [mask_key(user, TASK_ID, index, MASK, attempt_id="a") for index in range(50)]
            masks = [bucket.upload_mask(MASK, key) for key in keys]
            answers = await asyncio.gather(*images, *masks)
            assert answers[:50] == [IMAGE] * 50
        assert proxy.max_connections_open == 16
        assert proxy.connections_made == 16


async def test_close_waits_for_uploads(seaweedfs: S3Service, proxy: FaultProxy, user: str) -> None:
    """Closing waits for a running upload, its retry included."""
    key = mask_key(user, TASK_ID, 0, MASK, attempt_id="a")
    proxy.hang_next(1, when=is_put)
    async with opened(seaweedfs, proxy.url) as bucket:
        upload = asyncio.create_task(bucket.upload_mask(MASK, key))
        await asyncio.to_thread(proxy.wait_for_requests, 1)
        proxy.heal()
    assert seaweedfs.get(key) == MASK
    await upload


async def test_close_closes_connections(seaweedfs: S3Service, proxy: FaultProxy, user: str) -> None:
    """A closed bucket has no open socket."""
    async with opened(seaweedfs, proxy.url) as bucket:
        await bucket.download_image(f"uploads/{user}/cat", user, MAX_BYTES)
        assert proxy.connections_open == 1
    await asyncio.to_thread(wait_until, lambda: proxy.connections_open == 0)


# The check at the start.


@pytest.fixture(
    params=[pytest.param(name, marks=pytest.mark.services) for name in ("r2_emulator", "seaweedfs")]
)
def service(request: pytest.FixtureRequest) -> S3Service:
    found: S3Service = request.getfixturevalue(request.param)
    return found


async def test_check_of_a_working_store(service: S3Service) -> None:
    """The check of a working store returns no warning, and stores no object."""
    with fault_proxy(service.endpoint) as proxy:
        async with opened(service, proxy.url, public_base_url="https://img.example.com") as bucket:
            assert await bucket.check() == []
        assert [(seen.method, seen.status) for seen in proxy.requests] == [("GET", 404), ("PUT", 412)]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"secret_access_key": "wrong"}, "R2_SECRET_ACCESS_KEY"),
        ({"access_key_id": "AKIDUNKNOWN"}, "R2_ACCESS_KEY_ID"),
        ({"bucket": "another"}, "R2_BUCKET"),
    ],
)
async def test_check_names_what_is_wrong(service: S3Service, change: dict[str, str], named: str) -> None:
    """A refusal at the start raises StorageMisconfigured, which names the variable to correct."""
    async with opened(service, service.endpoint, **change) as bucket:
        with pytest.raises(StorageMisconfigured, match=named):
            await bucket.check()


async def test_check_finds_an_endpoint_that_is_no_store(r2_emulator: S3Service) -> None:
    """An endpoint without the S3 API stops the start."""
    elsewhere = r2_emulator.endpoint.removesuffix("/s3")
    async with opened(r2_emulator, elsewhere) as bucket:
        with pytest.raises(StorageMisconfigured, match="R2_ENDPOINT"):
            await bucket.check()


async def test_check_finds_a_token_that_only_reads(seaweedfs: S3Service, proxy: FaultProxy) -> None:
    """A token without the right to write stops the start."""
    proxy.fail_next(1, status=403, body=xml("AccessDenied"), when=is_put)
    async with opened(seaweedfs, proxy.url) as bucket:
        with pytest.raises(StorageMisconfigured, match="may not write in R2_BUCKET"):
            await bucket.check()


TRUNCATED_REFUSALS: dict[str, Callable[[FaultProxy, int], None]] = {
    f"refusal truncated after {count} bytes": lambda proxy, n, count=count: proxy.cut_next(
        n, after_bytes=count
    )  # type: ignore[misc]
    for count in (0, 20)
}


@pytest.mark.parametrize(
    "fault", (TRANSIENT | TRUNCATED_REFUSALS).values(), ids=(TRANSIENT | TRUNCATED_REFUSALS).keys()
)
async def test_check_of_an_unavailable_store(
    fault: Callable[[FaultProxy, int], None], seaweedfs: S3Service, proxy: FaultProxy
) -> None:
    """An unavailable store is a warning at the start, as are mask URLs that browsers cannot read."""
    fault(proxy, 99)
    async with opened(seaweedfs, proxy.url) as bucket:
        no_public_url, unavailable = await bucket.check()
    assert no_public_url.startswith("R2_PUBLIC_BASE_URL is not set")
    assert unavailable.startswith("R2 could not be checked: status=")


# Secrets.


async def test_errors_and_logs_hold_no_secret(
    seaweedfs: S3Service, proxy: FaultProxy, user: str, caplog: pytest.LogCaptureFixture
) -> None:
    """No error, traceback or log record holds a key, a URL, a host or a secret."""
    caplog.set_level(logging.INFO)
    secrets = [
        seaweedfs.secret_access_key,
        seaweedfs.access_key_id,
        user,
        "127.0.0.1",
        "http:",
        "what R2 says",
    ]
    text = ""
    faults: list[Callable[[], None]] = [
        lambda: proxy.fail_next(1, status=403, body=xml(f"{user}\nlevel=INFO")),
        lambda: proxy.fail_next(9, status=500, body=xml("InternalError")),
        lambda: proxy.cut_next(9),
        lambda: proxy.cut_next(9, after_bytes=1),
        lambda: proxy.hang_next(9),
    ]
    async with opened(seaweedfs, proxy.url, deadline_s=4.0) as bucket:
        for fault in faults:
            fault()
            with pytest.raises(StorageError) as raised:
                await bucket.download_image(f"uploads/{user}/cat", user, MAX_BYTES)
            text += "".join(traceback.format_exception(raised.value))
            proxy.heal()
        proxy.cut_next(9)
        text += " ".join(await bucket.check())
    text += "".join(str(vars(record)) for record in caplog.records if record.name != "asyncio")
    assert "tries=" in text
    assert [secret for secret in secrets if secret in text] == []
