"""Objects in a bucket: faults on the way, refusals, credentials and requests as they are sent."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import pytest
from boto3.s3.transfer import TransferConfig
from botocore.awsrequest import AWSResponse
from stamina.instrumentation import set_on_retry_hooks
from urllib3 import HTTPHeaderDict, HTTPResponse

from bulk.errors import (
    BulkError,
    CredentialsRefused,
    PictureError,
    RunError,
    StoreFull,
    StoreRefused,
    StoreUnavailable,
    WrongUsage,
)
from bulk.objects import open_objects, read_uri, s3
from tests.bulk.buckets import no_environment, use_service
from tests.services import objects as servers
from tests.services.faults import FaultProxy, Seen, fault_proxy
from tests.tiers import need

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from bulk.objects import Objects
    from tests.services.objects import S3Service

PNG = "image/png"
PICTURE = bytes(range(256)) * 8
MAX_BYTES = 1 << 20


@pytest.fixture
def proxy(seaweedfs: S3Service, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy before SeaweedFS, which boto3 of this process uses."""
    with fault_proxy(seaweedfs.endpoint) as running:
        use_service(monkeypatch, seaweedfs, endpoint=running.url)
        yield running


@pytest.fixture
def uri(seaweedfs: S3Service) -> str:
    """A prefix with one object, `cat`."""
    prefix = f"bulk-{uuid4()}"
    seaweedfs.put(f"{prefix}/cat", PICTURE)
    return f"s3://{seaweedfs.bucket}/{prefix}"


def xml(code: str) -> bytes:
    """The body of an error of the S3 API."""
    return f"<Error><Code>{code}</Code><Message>what the store says</Message></Error>".encode()


def is_put(seen: Seen) -> bool:
    return seen.method == "PUT"


def names(objects: Objects) -> list[str]:
    return [found.name for found in objects.list()]


def calls_of(objects: Objects) -> list[Callable[[], object]]:
    """A call of each kind of request."""
    return [
        lambda: objects.read("cat", MAX_BYTES),
        lambda: objects.open("cat"),
        lambda: names(objects),
        lambda: objects.create("new", b"", PNG),
        lambda: objects.replace("new", b"", PNG),
    ]


def errors_of(calls: list[Callable[[], object]]) -> list[BulkError]:
    errors = []
    for call in calls:
        with pytest.raises(BulkError) as raised:
            call()
        errors.append(raised.value)
    return errors


# Transient faults.

TRANSIENT: dict[str, Callable[[FaultProxy, int], None]] = {
    "429": lambda proxy, n: proxy.fail_next(n, status=429, body=xml("TooManyRequests")),
    "500": lambda proxy, n: proxy.fail_next(n, status=500, body=xml("InternalError")),
    "503 without a body": lambda proxy, n: proxy.fail_next(n, status=503),
    "502 of a gateway": lambda proxy, n: proxy.fail_next(n, status=502, body=b"<html>bad gateway</html>"),
    "timeout of the store": lambda proxy, n: proxy.fail_next(n, status=400, body=xml("RequestTimeout")),
    "cut connection": lambda proxy, n: proxy.cut_next(n),
    "lost answer": lambda proxy, n: proxy.lose_answer_next(n),
}
OF_BODIES: dict[str, Callable[[FaultProxy, int], None]] = {
    "truncated body": lambda proxy, n: proxy.cut_next(n, after_bytes=100),
    "no byte of the body": lambda proxy, n: proxy.cut_next(n, after_bytes=0),
    "fewer bytes than Content-Length": lambda proxy, n: proxy.wrong_length_next(n, extra_bytes=1),
}


@pytest.mark.parametrize("fault", [*TRANSIENT, *OF_BODIES])
def test_reads_and_listings_are_retried(fault: str, proxy: FaultProxy, uri: str) -> None:
    """Two bad answers cost two requests more; the picture and the listing are complete."""
    objects = open_objects(uri, max_wait_s=20)
    (TRANSIENT | OF_BODIES)[fault](proxy, 2)
    assert objects.read("cat", MAX_BYTES) == PICTURE
    assert len(proxy.requests) == 3
    (TRANSIENT | OF_BODIES)[fault](proxy, 1)
    assert names(objects) == ["cat"]
    assert len(proxy.requests) == 5


@pytest.mark.parametrize("fault", TRANSIENT)
def test_writes_are_retried(fault: str, proxy: FaultProxy, uri: str) -> None:
    """A bad answer costs one request more a second later: R2 accepts one write per second and key."""
    objects = open_objects(uri, max_wait_s=20)
    TRANSIENT[fault](proxy, 1)
    started_s = time.monotonic()
    created = objects.create("new", PICTURE, PNG)
    assert time.monotonic() - started_s > 1.0
    # A lost answer leaves open who stored it.
    assert created == (fault != "lost answer")
    assert objects.read("new") == PICTURE
    assert [seen.method for seen in proxy.requests] == ["PUT", "PUT", "GET"]


def test_writer_that_meets_another_tries_again(proxy: FaultProxy, uri: str) -> None:
    """AWS answers 409 to one of two conditional writes at a time; the next try tells who won."""
    objects = open_objects(uri, max_wait_s=20)
    proxy.fail_next(1, status=409, body=xml("ConditionalRequestConflict"))
    assert not objects.create("cat", b"another", PNG)
    assert objects.read("cat") == PICTURE


@pytest.mark.parametrize("fault", [*TRANSIENT, *OF_BODIES, "silence"])
def test_fault_that_lasts_ends_the_run(fault: str, proxy: FaultProxy, uri: str) -> None:
    """After max_wait_s one sentence, with exit code 3; a picture is not blamed for it."""
    objects = open_objects(uri, max_wait_s=3)
    faults = TRANSIENT | OF_BODIES | {"silence": lambda proxy, n: proxy.hang_next(n)}
    faults[fault](proxy, 999)
    with pytest.raises(StoreUnavailable, match=r"did not answer as it should for 3 s \(status=") as raised:
        objects.read("cat", MAX_BYTES)
    assert raised.value.exit_code == 3
    assert len(proxy.requests) > (1 if fault != "silence" else 0)


def test_long_wait_is_told_once(proxy: FaultProxy, uri: str, caplog: pytest.LogCaptureFixture) -> None:
    """A user whose run stands still learns why, in one line a call."""
    proxy.fail_next(5, status=503, body=xml("SlowDown"))
    set_on_retry_hooks([s3.warn_of_long_wait])
    try:
        assert open_objects(uri, max_wait_s=60).read("cat") == PICTURE
    finally:
        set_on_retry_hooks(None)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("bulk.")] == [
        "the store does not answer as it should (status=503 code=SlowDown); trying again"
    ]


def test_body_that_trickles_ends(proxy: FaultProxy, uri: str) -> None:
    """A picture that arrives at 100 bytes a second is given up, though the connection is never silent."""
    proxy.slow_next(99, bytes_per_s=100)
    with pytest.raises(StoreUnavailable, match="code=SlowBody"):
        open_objects(uri, max_wait_s=1).read("cat", MAX_BYTES)


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://host.invalid"])
def test_store_that_is_not_there_ends_the_run(
    endpoint: str, seaweedfs: S3Service, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refused connection and an unknown host are no errors of the network library."""
    use_service(monkeypatch, seaweedfs, endpoint=endpoint)
    errors = errors_of(calls_of(open_objects(uri, max_wait_s=0.5)))
    assert {type(error) for error in errors} == {StoreUnavailable}


def test_part_of_an_upload_is_sent_again(
    proxy: FaultProxy, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part that fails does not start the file anew."""
    smallest_parts = TransferConfig(multipart_threshold=5 << 20, multipart_chunksize=5 << 20)
    monkeypatch.setattr(s3, "_UPLOAD", smallest_parts)
    proxy.fail_next(1, status=503, when=lambda seen: "partNumber=2" in seen.path)
    objects = open_objects(uri, max_wait_s=20)
    path = tmp_path / "coco.json"
    path.write_bytes(PICTURE * (11 << 20 >> 11))
    objects.upload("coco.json", path, "application/json")
    parts = [parse_qs(urlsplit(seen.path).query)["partNumber"] for seen in proxy.requests if is_put(seen)]
    assert sorted(parts) == [["1"], ["2"], ["2"], ["3"]]
    assert objects.read("coco.json") == path.read_bytes()


def test_object_that_changes_while_it_is_read_is_told(
    seaweedfs: S3Service, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manifest is never put together from two versions."""
    use_service(monkeypatch, seaweedfs)
    with open_objects(uri, max_wait_s=20).open("cat") as file:
        seaweedfs.put(uri.partition(f"{seaweedfs.bucket}/")[2] + "/cat", b"another")
        with pytest.raises(StoreUnavailable, match="was replaced while it was read"):
            file.read()


# Listings.


@pytest.mark.parametrize(
    "fixture",
    [
        pytest.param("seaweedfs", marks=pytest.mark.services),
        pytest.param("r2_emulator", marks=pytest.mark.services),
    ],
)
def test_listing_of_many_objects_comes_page_by_page(
    fixture: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than a page (1,000) is listed, each object once, and no page before it is wanted."""
    service: S3Service = request.getfixturevalue(fixture)
    prefix = f"many-{uuid4()}"
    stored = [f"folder {n % 7}/\u732b {n}" for n in range(1005)]
    with ThreadPoolExecutor(4) as threads:
        [*threads.map(lambda name: service.put(f"{prefix}/{name}", b""), stored)]
    with fault_proxy(service.endpoint) as proxy:
        use_service(monkeypatch, service, endpoint=proxy.url)
        listing = open_objects(f"s3://{service.bucket}/{prefix}").list()
        first = next(listing).name
        assert len(proxy.requests) == 1
        assert sorted([first, *(found.name for found in listing)]) == sorted(stored)
        assert len(proxy.requests) > 1


def test_folders_of_other_tools_are_no_objects(seaweedfs: S3Service, proxy: FaultProxy, uri: str) -> None:
    """Consoles store an empty object `folder/` for a folder, and one for the prefix itself."""
    prefix = uri.partition(f"{seaweedfs.bucket}/")[2]
    page = f"""<ListBucketResult><KeyCount>4</KeyCount><IsTruncated>false</IsTruncated>
        <Contents><Key>{prefix}/</Key><Size>0</Size></Contents>
        <Contents><Key>{prefix}/cat</Key><Size>5</Size><ETag>"e"</ETag></Contents>
        <Contents><Key>{prefix}/folder/</Key><Size>0</Size></Contents></ListBucketResult>"""
    proxy.fail_next(1, status=200, body=page.encode())
    [found] = open_objects(uri).list()
    assert (found.name, found.size_bytes, found.etag) == ("cat", 5, '"e"')
    seaweedfs.put(f"{prefix}/folder/", b"")
    assert names(open_objects(uri)) == ["cat"]


# Refusals.


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (403, "InvalidAccessKeyId"),
        (403, "SignatureDoesNotMatch"),
        (400, "ExpiredToken"),
        (400, "InvalidToken"),
        (403, "RequestTimeTooSkewed"),
        (401, "Unauthorized"),
        (401, "AnyOther"),
    ],
)
def test_refused_credentials_end_the_run(
    status: int, code: str, seaweedfs: S3Service, proxy: FaultProxy, uri: str
) -> None:
    """Wrong or expired credentials end the run without retries: a sentence, exit code 3, no secret."""
    proxy.fail_next(99, status=status, body=xml(code))
    errors = errors_of(calls_of(open_objects(uri)))
    assert {type(error) for error in errors} == {CredentialsRefused}
    for error in errors:
        assert isinstance(error, RunError)
        assert error.exit_code == 3
        assert f"status={status} code={code}" in str(error)
        assert seaweedfs.access_key_id not in str(error)
        assert seaweedfs.secret_access_key not in str(error)
    # One request a call; a wrong signature of one key is compared with a request without a key.
    assert len(proxy.requests) == (6 if code == "SignatureDoesNotMatch" else 5)


def test_expired_credentials_in_the_middle_of_a_listing(
    proxy: FaultProxy, seaweedfs: S3Service, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listing ends with the second page's refusal; a call after that uses the new credentials."""
    prefix = uri.partition(f"{seaweedfs.bucket}/")[2]
    page = f"""<ListBucketResult><IsTruncated>true</IsTruncated>
        <NextContinuationToken>2</NextContinuationToken>
        <Contents><Key>{prefix}/a</Key><Size>0</Size></Contents></ListBucketResult>"""
    proxy.fail_next(1, status=200, body=page.encode())
    proxy.fail_next(1, status=400, body=xml("ExpiredToken"))
    objects = open_objects(uri)
    listing = objects.list()
    assert next(listing).name == "a"
    with pytest.raises(CredentialsRefused, match="have expired"):
        next(listing)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDOFTHENEXTDAY")
    proxy.fail_next(1, status=200, body=PICTURE)
    assert objects.read("cat") == PICTURE
    assert "Credential=AKIDOFTHENEXTDAY/" in proxy.requests[-1].headers["authorization"]


def test_credentials_that_the_store_forgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real store that gets other keys while a run writes to it refuses the old ones, and the run ends."""
    need(servers.missing_seaweedfs())
    with servers.seaweedfs(tmp_path) as service:
        use_service(monkeypatch, service)
        objects = open_objects(f"s3://{service.bucket}/out", max_wait_s=20)
        assert objects.create("first", b"", PNG)
        service.stop()
        config = tmp_path / "seaweedfs-identities.json"
        identities = json.loads(config.read_text())
        identities["identities"][1]["credentials"][0]["secretKey"] = "the next secret"
        config.write_text(json.dumps(identities))
        service.start()
        for call in (lambda: objects.create("second", b"", PNG), lambda: objects.read("first")):
            with pytest.raises(CredentialsRefused, match="does not belong to the access key id"):
                call()
        use_service(monkeypatch, service, AWS_SECRET_ACCESS_KEY="the next secret")
        assert objects.create("second", b"", PNG)


def test_missing_credentials_end_the_run(
    seaweedfs: S3Service, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without credentials nothing is sent or retried, and the sentence names the variables."""
    use_service(monkeypatch, seaweedfs, AWS_ACCESS_KEY_ID="", AWS_SECRET_ACCESS_KEY="")
    for error in errors_of(calls_of(open_objects(uri))):
        assert isinstance(error, CredentialsRefused)
        assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in str(error)
    use_service(monkeypatch, seaweedfs, AWS_PROFILE="of-nobody")
    with pytest.raises(CredentialsRefused, match="ProfileNotFound"):
        open_objects(uri).read("cat")


def test_closed_object_is_an_error_of_the_picture(
    seaweedfs: S3Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture that may not be read is a row; a bucket that may not be listed or written ends the run."""
    use_service(monkeypatch, seaweedfs)
    other = open_objects("s3://of-somebody-else/a")
    read, opened, listed, created, replaced = errors_of(calls_of(other))
    for error in (read, opened):
        assert isinstance(error, PictureError)
        assert error.code == "FORBIDDEN"
    assert [type(error) for error in (listed, created, replaced)] == [StoreRefused] * 3
    assert "may not list the objects of s3://of-somebody-else" in str(listed)
    assert "may not write to s3://of-somebody-else" in str(created)


def test_archived_object_is_refused_to_everybody(proxy: FaultProxy, uri: str) -> None:
    """Not FORBIDDEN, of which a whole shard ends the run: nobody can allow it."""
    proxy.fail_next(1, status=403, body=xml("InvalidObjectState"))
    with pytest.raises(PictureError, match="InvalidObjectState") as raised:
        open_objects(uri).read("cat")
    assert raised.value.code == "REFUSED"


def test_missing_bucket(r2_emulator: S3Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture in a bucket that does not exist is a row; a source or target there is wrong usage."""
    use_service(monkeypatch, r2_emulator)
    read, opened, *others = errors_of(calls_of(open_objects("s3://no-such-bucket/a")))
    for error in (read, opened):
        assert isinstance(error, PictureError)
        assert (error.code, error.message) == ("NOT_FOUND", "no such bucket")
    for error in others:
        assert isinstance(error, WrongUsage)
        assert "the bucket no-such-bucket does not exist" in str(error)


@pytest.mark.parametrize(
    "fixture",
    [
        pytest.param("seaweedfs", marks=pytest.mark.services),
        pytest.param("r2_emulator", marks=pytest.mark.services),
    ],
)
def test_key_that_a_store_rewrites_does_not_end_the_run(
    fixture: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R2 checks the signature of `a/../b` for `b`; one such row must not look like wrong credentials."""
    service: S3Service = request.getfixturevalue(fixture)
    use_service(monkeypatch, service)
    for key in ("a/../b", "./b", "../b"):
        with pytest.raises(PictureError):
            read_uri(f"s3://{service.bucket}/{key}")


@pytest.mark.parametrize(
    ("status", "code"), [(507, "Any"), (400, "XMinioStorageFull"), (403, "QuotaExceeded")]
)
def test_full_bucket_ends_the_run(status: int, code: str, proxy: FaultProxy, uri: str) -> None:
    """A quota that is used up is not retried."""
    proxy.fail_next(9, status=status, body=xml(code))
    with pytest.raises(StoreFull, match="make space"):
        open_objects(uri).create("new", b"", PNG)
    assert len(proxy.requests) == 1


def test_redirect_is_not_followed(proxy: FaultProxy, uri: str) -> None:
    """A server that redirects to the cloud's metadata gets no second request."""
    location = {"Location": "http://169.254.169.254/"}
    proxy.fail_next(99, status=307, body=xml("TemporaryRedirect"), headers=location)
    assert {type(error) for error in errors_of(calls_of(open_objects(uri)))} == {StoreRefused}
    assert len(proxy.requests) == 5


@pytest.mark.parametrize(("bucket", "endpoint"), [("a b", ""), ("UPPER?", ""), ("bucket", "not a URL")])
def test_names_that_cannot_be_are_wrong_usage(
    bucket: str, endpoint: str, seaweedfs: S3Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bucket or an endpoint that cannot exist is told at once, with exit code 2."""
    use_service(monkeypatch, seaweedfs, endpoint=endpoint or None)
    with pytest.raises(WrongUsage) as raised:
        names(open_objects(f"s3://{bucket}/a"))
    assert raised.value.exit_code == 2


# Stores without conditional writes.


def test_store_without_conditional_writes(proxy: FaultProxy, uri: str) -> None:
    """Where If-None-Match is refused, an object is created if none was there before."""
    proxy.fail_next(
        99, status=501, body=xml("NotImplemented"), when=lambda seen: "if-none-match" in seen.headers
    )
    objects = open_objects(uri)
    assert not objects.create("cat", b"another", PNG)
    assert objects.create("dog", b"dog", PNG)
    assert not objects.create("dog", b"another", PNG)
    assert objects.read("cat") == PICTURE
    assert objects.read("dog") == b"dog"


# Requests as they are sent.


def sent(monkeypatch: pytest.MonkeyPatch, call: Callable[[Objects], object], **environment: str) -> Any:
    """The complete signed request of a call."""
    no_environment(monkeypatch)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    objects = open_objects("s3://photos/out", max_wait_s=5)
    requests = []

    def answer(request: Any, **_: object) -> Any:
        requests.append(request)
        headers: Any = HTTPHeaderDict()
        body = HTTPResponse(BytesIO(xml("AccessDenied")), preload_content=False)
        return AWSResponse(request.url, 403, headers, body)

    s3._CLIENTS.client("photos", 5, 1).meta.events.register("before-send.s3", answer)
    with pytest.raises(BulkError):
        call(objects)
    [request] = requests
    return request


R2 = "https://acc0.r2.cloudflarestorage.com"


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"])
def test_write_to_r2(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The endpoint is in the environment: path-style, a plain body, a condition; no trailer and no Expect."""
    environment = {variable: R2, "AWS_DEFAULT_REGION": "auto"}
    request = sent(monkeypatch, lambda objects: objects.create("a b.png", PICTURE, PNG), **environment)
    headers = {name.lower(): value for name, value in request.headers.items()}
    assert request.url == f"{R2}/photos/out/a%20b.png"
    assert request.body.getvalue() == PICTURE
    assert headers["content-type"] in (PNG, PNG.encode())
    assert headers["if-none-match"] in ("*", b"*")
    assert not {"expect", "transfer-encoding", "content-encoding", "x-amz-trailer", "x-amz-acl"} & set(
        headers
    )
    assert not [name for name in headers if "checksum" in name]
    assert "/auto/s3/aws4_request" in str(headers["authorization"])


def test_region_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    """R2 takes us-east-1 for auto, so a user needs to set no region."""
    request = sent(monkeypatch, lambda objects: objects.read("a"), AWS_ENDPOINT_URL_S3=R2)
    assert "/us-east-1/s3/aws4_request" in str(request.headers["Authorization"])


def test_read_from_aws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an endpoint, AWS is asked as it wants to be: the bucket in the host's name."""
    request = sent(monkeypatch, lambda objects: objects.read("a"), AWS_DEFAULT_REGION="eu-west-1")
    assert request.url == "https://photos.s3.eu-west-1.amazonaws.com/out/a"
    assert not [name for name in request.headers if "checksum" in name.lower()]
