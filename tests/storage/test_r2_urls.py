"""The key that an image_url names, for every form of URL; no test sends a request."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING
from urllib.parse import quote

import pytest
from hypothesis import assume, example, given, reject, settings
from hypothesis import strategies as st

from storage import ImageUrlForbidden, ImageUrlInvalid
from storage.keys import checked_key
from storage.r2 import R2Bucket
from storage.r2_urls import R2Urls

if TYPE_CHECKING:
    from collections.abc import Callable

USER = "user-1"
KEY = f"uploads/{USER}/2f1c"
BUCKET = "s3-images"
ACCOUNT = "https://acc0.r2.cloudflarestorage.com"
PUBLIC = "https://pink.example.com/files"
SUPABASE = "https://project.supabase.co/storage/v1/object/public"
SIGNED = (
    "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=k%2F20260101%2Fauto&X-Amz-Signature=ab&x-id=GetObject"
)


def bucket_at(endpoint: str = ACCOUNT, **changes: object) -> R2Bucket:
    """A bucket to which no request is sent."""
    values: dict[str, object] = {
        "endpoint": endpoint,
        "bucket": BUCKET,
        "access_key_id": "key",
        "secret_access_key": "secret",
        "public_base_url": PUBLIC,
        "image_url_bases": (SUPABASE, "https://pub-0f.r2.dev"),
    }
    return R2Bucket(**(values | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def r2() -> R2Bucket:
    return bucket_at()


FORMS = {
    "public base": f"{PUBLIC}/",
    "r2.dev that is configured": "https://pub-0f.r2.dev/",
    "base of an Edge": f"{SUPABASE}/",
    "path style": f"{ACCOUNT}/{BUCKET}/",
    "virtual host": f"https://{BUCKET}.acc0.r2.cloudflarestorage.com/",
    "r2 scheme": f"r2://{BUCKET}/",
    "s3 scheme": f"s3://{BUCKET}/",
}


@pytest.mark.parametrize("base", FORMS.values(), ids=FORMS.keys())
def test_every_form_names_the_key(r2: R2Bucket, base: str) -> None:
    """Each form of URL that an Edge may send gives the same key."""
    assert r2.key_of(base + KEY, USER) == KEY


@pytest.mark.parametrize("base", FORMS.values(), ids=FORMS.keys())
@given(name=st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=40))
@settings(max_examples=150, deadline=None)
def test_every_key_in_every_form(r2: R2Bucket, base: str, name: str) -> None:
    """The percent-encoded URL of any upload gives its key, in NFC."""
    key = f"uploads/{USER}/{name}"
    try:
        checked = checked_key(key)
    except ValueError:
        reject()
    assert r2.key_of(base + quote(key), USER) == checked == unicodedata.normalize("NFC", key)
    assert r2.key_of(base + quote(key, safe=""), USER) == checked


@pytest.mark.parametrize(
    "image_url",
    [
        f"{ACCOUNT}/{BUCKET}/{KEY}?{SIGNED}",
        f"https://{BUCKET}.acc0.r2.cloudflarestorage.com/{KEY}?{SIGNED}",
        f"{ACCOUNT}:443/{BUCKET}/{KEY}",
        f"HTTPS://ACC0.R2.CloudflareStorage.com/{BUCKET}/{KEY}",
        f"https://PINK.example.COM:443/files/{KEY}",
    ],
)
def test_equivalent_urls(r2: R2Bucket, image_url: str) -> None:
    """A signature, the host's case and the default port do not change the key."""
    assert r2.key_of(image_url, USER) == KEY


@pytest.mark.parametrize("jurisdiction", ["eu", "fedramp"])
def test_jurisdictions_have_their_own_hosts(jurisdiction: str) -> None:
    """A bucket of a jurisdiction has its own host; the same name at the plain host is another bucket."""
    host = f"acc0.{jurisdiction}.r2.cloudflarestorage.com"
    r2 = bucket_at(f"https://{host}")
    assert r2.key_of(f"https://{host}/{BUCKET}/{KEY}", USER) == KEY
    assert r2.key_of(f"https://{BUCKET}.{host}/{KEY}", USER) == KEY
    with pytest.raises(ImageUrlForbidden):
        r2.key_of(f"{ACCOUNT}/{BUCKET}/{KEY}", USER)


INVALID = {
    "fragment": f"{PUBLIC}/{KEY}#x",
    "unknown query": f"{PUBLIC}/{KEY}?width=100",
    "empty query": f"{PUBLIC}/{KEY}?",
    "signature outside the S3 API": f"{PUBLIC}/{KEY}?{SIGNED}",
    "unknown parameter beside a signature": f"{ACCOUNT}/{BUCKET}/{KEY}?{SIGNED}&versionId=1",
    "empty query in the API": f"{ACCOUNT}/{BUCKET}/{KEY}?",
    "parameter that only holds a signature's name": f"{ACCOUNT}/{BUCKET}/{KEY}?a=X-Amz-Signature",
    "query in s3://": f"s3://{BUCKET}/{KEY}?{SIGNED}",
    "user": f"https://pink.example.com@evil.example/files/{KEY}",
    "user and password": f"https://a:b@pink.example.com/files/{KEY}",
    "double slash": f"{PUBLIC}//{KEY}",
    "dot segments": f"{PUBLIC}/uploads/{USER}/../user-2/cat",
    "dot segments that leave the base": f"{PUBLIC}/../{KEY}",
    "encoded dot segments": f"{PUBLIC}/uploads/{USER}/%2e%2e/user-2/cat",
    "backslash": f"{PUBLIC}/uploads\\{USER}\\cat",
    "encoded backslash": f"{PUBLIC}/uploads/{USER}/%5c..%5cuser-2",
    "tab": f"https://pink.exa\tmple.com/files/{KEY}",
    "line end": f"{PUBLIC}/{KEY}\r\nHost: evil.example",
    "encoded NUL": f"{PUBLIC}/{KEY}%00.png",
    "broken escape": f"{PUBLIC}/{KEY}%G0",
    "not UTF-8": f"{PUBLIC}/{KEY}%ff",
    "base alone": f"{PUBLIC}/",
    "1025 bytes": f"{PUBLIC}/" + KEY.ljust(1025, "x"),
}

FORBIDDEN = {
    "http": f"http://pink.example.com/files/{KEY}",
    "another path": f"https://pink.example.com/{KEY}",
    "a longer path": f"https://pink.example.com/files2/{KEY}",
    "encoded path of the base": f"https://pink.example.com/file%73/{KEY}",
    "base without a slash": PUBLIC,
    "another port": f"https://pink.example.com:8443/files/{KEY}",
    "ssh port": f"https://pink.example.com:22/files/{KEY}",
    "two ports": f"https://pink.example.com:443:443/files/{KEY}",
    "no port after the colon": f"https://pink.example.com:/files/{KEY}",
    "trailing dot": f"https://pink.example.com./files/{KEY}",
    "longer host": f"https://pink.example.com.evil.example/files/{KEY}",
    "host that ends with a configured one": f"https://evil-pink.example.com/files/{KEY}",
    "backslash after the host": f"https://pink.example.com\\@evil.example/files/{KEY}".replace("@", "."),
    "query for a path": f"https://evil.example?https://pink.example.com/files/{KEY}",
    "lookalike host": f"https://p\u0456nk.example.com/files/{KEY}",
    "full-width host": f"https://pink\uff0eexample.com/files/{KEY}",
    "another r2.dev": f"https://pub-1e.r2.dev/{KEY}",
    "another bucket": f"{ACCOUNT}/other/{KEY}",
    "a bucket with the bucket's name as a prefix": f"{ACCOUNT}/{BUCKET}-2/{KEY}",
    "no bucket": f"{ACCOUNT}/{KEY}",
    "another account": f"https://acc1.r2.cloudflarestorage.com/{BUCKET}/{KEY}",
    "another bucket's host": f"https://other.acc0.r2.cloudflarestorage.com/{KEY}",
    "both host and path": f"https://{BUCKET}.acc0.r2.cloudflarestorage.com/{BUCKET}/{KEY}",
    "Supabase's other routes": f"https://project.supabase.co/rest/v1/{KEY}",
    "s3 of another bucket": f"s3://other/{KEY}",
    "s3 in capitals": f"s3://{BUCKET.upper()}/{KEY}",
    "s3 with a port": f"s3://{BUCKET}:443/{KEY}",
    "s3 with a host": f"s3://{BUCKET}.example.com/{KEY}",
    "Kelvin sign": f"https://pin\u212a.example.com/files/{KEY}",
    "loopback": f"https://127.0.0.1/files/{KEY}",
    "IPv6 loopback": f"https://[::1]/files/{KEY}",
    "any address": f"https://0.0.0.0/files/{KEY}",
    "metadata service": f"http://169.254.169.254/latest/{KEY}",
    "private network": f"https://10.0.0.8/files/{KEY}",
    "mapped IPv4": f"https://[::ffff:127.0.0.1]/files/{KEY}",
    "decimal address": f"https://2130706433/files/{KEY}",
    "octal address": f"https://0177.0.0.1/files/{KEY}",
    "hexadecimal address": f"https://0x7f.1/files/{KEY}",
    "file": f"file:///etc/{KEY}",
    "gopher": f"gopher://pink.example.com/files/{KEY}",
    "no scheme": f"://pink.example.com/files/{KEY}",
    "network path": f"{KEY}://pink.example.com",
    "another user": f"{PUBLIC}/uploads/user-2/cat",
    "double encoded": f"{PUBLIC}/uploads%252f{USER}%252fcat",
    "a mask": f"{PUBLIC}/masks/{USER}/cat.png",
}


@pytest.mark.parametrize("image_url", INVALID.values(), ids=INVALID.keys())
def test_malformed_url_is_invalid(r2: R2Bucket, image_url: str) -> None:
    """A malformed URL raises ImageUrlInvalid."""
    with pytest.raises(ImageUrlInvalid):
        r2.key_of(image_url, USER)


@pytest.mark.parametrize("image_url", FORBIDDEN.values(), ids=FORBIDDEN.keys())
def test_foreign_url_is_forbidden(r2: R2Bucket, image_url: str) -> None:
    """A URL outside the bucket, or outside the user's uploads, raises ImageUrlForbidden."""
    with pytest.raises(ImageUrlForbidden):
        r2.key_of(image_url, USER)


HOSTS = ["pink.example.com", "acc0.r2.cloudflarestorage.com", f"{BUCKET}.acc0.r2.cloudflarestorage.com"]
SIGNS = ["://", "/", "//", ":", "@", "?", "#", "\\", ".", "..", "\t", "\n", "&", "="]
ESCAPES = ["%2e", "%2f", "%5c", "%00", "%25", "%ff"]
WORDS = ["https", "http", "s3", "r2", BUCKET, "files", "uploads", USER, "user-2", "masks", SIGNED]
ODD = ["\u212a", "\uff0f", "\uff0e", "\u2044", "\ud800", "[::1]", "127.0.0.1", ":443", "xn--"]
URL_PIECES = st.one_of(st.sampled_from([*HOSTS, *SIGNS, *ESCAPES, *WORDS, *ODD]), st.text(max_size=3))
STARTS = ["", *FORMS.values(), *(f"{base}uploads/{USER}/" for base in FORMS.values())]


@given(start=st.sampled_from(STARTS), pieces=st.lists(URL_PIECES, max_size=12))
@example(start="", pieces=["https://pink.example.com", "\\", "@evil.example/files/", KEY])
@settings(max_examples=3000, deadline=None)
def test_any_text_gives_no_foreign_key(r2: R2Bucket, start: str, pieces: list[str]) -> None:
    """Any text gives a normalised key below the user's own uploads, or one of the two errors."""
    try:
        key = r2.key_of(start + "".join(pieces), USER)
    except (ImageUrlForbidden, ImageUrlInvalid):
        return
    assert key.startswith(f"uploads/{USER}/")
    assert key == checked_key(key)


@given(
    host=st.text(min_size=1, max_size=30),
    path=st.sampled_from([f"/files/{KEY}", f"/{BUCKET}/{KEY}", f"/{KEY}"]),
)
@settings(max_examples=500, deadline=None)
def test_only_configured_hosts(r2: R2Bucket, host: str, path: str) -> None:
    """No host but the configured ones is accepted."""
    assume(host.lower().removesuffix(":443") not in {*HOSTS, "pub-0f.r2.dev", "project.supabase.co"})
    with pytest.raises((ImageUrlForbidden, ImageUrlInvalid)):
        r2.key_of(f"https://{host}{path}", USER)


def test_longer_base_applies() -> None:
    """Of two matching bases the longer one determines the key."""
    r2 = bucket_at(public_base_url="https://e.example", image_url_bases=("https://e.example/files",))
    assert r2.key_of(f"https://e.example/files/{KEY}", USER) == KEY
    assert r2.key_of(f"https://e.example/{KEY}", USER) == KEY


def test_loopback_may_be_http() -> None:
    """A server on this host, as in tests and development, may use plain http."""
    api = "http://127.0.0.1:9000/cdn-cgi/local/r2/s3"
    r2 = bucket_at(
        api, public_base_url="http://localhost:9000/public", image_url_bases=("http://[::1]:80/x/",)
    )
    assert r2.key_of(f"{api}/{BUCKET}/{KEY}", USER) == KEY
    assert r2.key_of(f"http://localhost:9000/public/{KEY}", USER) == KEY
    assert r2.key_of(f"http://[::1]/x/{KEY}", USER) == KEY
    with pytest.raises(ImageUrlForbidden):
        r2.key_of(f"https://127.0.0.1:9000/cdn-cgi/local/r2/s3/{BUCKET}/{KEY}", USER)


def urls(public_base_url: str | None) -> R2Urls:
    return R2Urls(endpoint=ACCOUNT, bucket=BUCKET, public_base_url=public_base_url, image_url_bases=())


def test_mask_url_is_public() -> None:
    """A mask's URL is below the public base, percent-encoded."""
    assert urls(f"{PUBLIC}/").mask_url("masks/u/t/0 a.png") == f"{PUBLIC}/masks/u/t/0%20a.png"
    assert urls(PUBLIC).masks_are_public


def test_mask_url_without_a_public_base() -> None:
    """Without a public base it is the S3 API's URL, and `masks_are_public` is false."""
    assert urls(None).mask_url("masks/u/t/0.png") == f"{ACCOUNT}/{BUCKET}/masks/u/t/0.png"
    assert not urls(None).masks_are_public


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda: bucket_at("http://acc0.r2.cloudflarestorage.com"), "R2_ENDPOINT must start with https"),
        (lambda: bucket_at("http://10.0.0.1:9000"), "R2_ENDPOINT must start with https"),
        (lambda: bucket_at(f"{ACCOUNT}/{BUCKET}"), "R2_ENDPOINT must end after the host"),
        (lambda: bucket_at("https://user@host"), "R2_ENDPOINT must be a plain URL"),
        (lambda: bucket_at("https://"), "R2_ENDPOINT must be a plain URL"),
        (lambda: bucket_at("https://host:port"), "R2_ENDPOINT is not a URL"),
        (lambda: bucket_at("https://[::1"), "R2_ENDPOINT is not a URL"),
        (lambda: bucket_at(public_base_url="ftp://e.example"), "R2_PUBLIC_BASE_URL must start with https"),
        (lambda: bucket_at(public_base_url="https://e.example?x"), "R2_PUBLIC_BASE_URL must be a plain URL"),
        (lambda: bucket_at(image_url_bases=("https://e.example/a b",)), "R2_IMAGE_URL_BASES must be a plain"),
        (lambda: bucket_at(bucket="Images"), "R2_BUCKET must be"),
        (lambda: bucket_at(bucket="a/b"), "R2_BUCKET must be"),
    ],
)
def test_wrong_setting_is_named(change: Callable[[], R2Bucket], named: str) -> None:
    """A wrong setting raises ValueError, whose message begins with the variable."""
    with pytest.raises(ValueError, match=f"^{named}"):
        change()
