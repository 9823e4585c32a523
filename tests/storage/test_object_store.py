"""The behaviour that all object stores share."""

from __future__ import annotations

import asyncio
import hashlib
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote
from urllib.request import url2pathname
from uuid import uuid4

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage import (
    ImageUrlForbidden,
    ImageUrlInvalid,
    LocalFolder,
    ObjectNotFound,
    ObjectStore,
    ObjectTooLarge,
    StorageError,
    mask_key,
)
from storage.r2 import R2Bucket

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.services.objects import S3Service

pytestmark = pytest.mark.anyio

USER = "user-1"
TASK_ID = "0c8e6a2e-4f6b-4d0e-9d0c-3f6f1b1f2a11"
IMAGE = b"\x89PNG image"
MAX_BYTES = 1000


@dataclass(frozen=True, slots=True)
class Opened:
    """A store, and access to its objects that the service does not have."""

    store: ObjectStore
    unprefixed: ObjectStore  # the same objects, with user_prefix_required=False
    url_base: str  # a URL that the store accepts, up to the key
    put_upload: Callable[[str, bytes], None]
    read_url: Callable[[str], bytes]


def open_local(request: pytest.FixtureRequest) -> Opened:
    folder: Path = request.getfixturevalue("tmp_path_factory").mktemp("local")
    store = LocalFolder(folder / "objects")
    return Opened(
        store=store,
        unprefixed=LocalFolder(folder / "objects", user_prefix_required=False),
        url_base=(folder / "objects").resolve().as_uri() + "/",
        put_upload=store.put_upload,
        read_url=lambda url: Path(url2pathname(url.removeprefix("file://"))).read_bytes(),
    )


def open_r2_emulator(request: pytest.FixtureRequest) -> Opened:
    service: S3Service = request.getfixturevalue("r2_emulator")
    return open_r2(service, read_url=lambda url: httpx.get(url).content)


def open_seaweedfs(request: pytest.FixtureRequest) -> Opened:
    service: S3Service = request.getfixturevalue("seaweedfs")
    in_api = f"{service.endpoint}/{service.bucket}/"
    return open_r2(service, read_url=lambda url: service.get(unquote(url.removeprefix(in_api))))


def open_r2(service: S3Service, read_url: Callable[[str], bytes]) -> Opened:
    def bucket(*, user_prefix_required: bool) -> R2Bucket:
        return R2Bucket(
            endpoint=service.endpoint,
            bucket=service.bucket,
            access_key_id=service.access_key_id,
            secret_access_key=service.secret_access_key,
            public_base_url=service.public_base_url,
            user_prefix_required=user_prefix_required,
        )

    return Opened(
        store=bucket(user_prefix_required=True),
        unprefixed=bucket(user_prefix_required=False),
        url_base=f"{service.public_base_url or f'{service.endpoint}/{service.bucket}'}/",
        put_upload=service.put,
        read_url=read_url,
    )


@pytest.fixture
def user() -> str:
    """A new user, since the objects of other tests stay in the store."""
    return f"user-{uuid4()}"


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(open_local, id="local"),
        pytest.param(open_r2_emulator, id="r2", marks=pytest.mark.services),
        pytest.param(open_seaweedfs, id="seaweedfs", marks=pytest.mark.services),
    ],
)
def opened(request: pytest.FixtureRequest) -> Iterator[Opened]:
    open_store: Callable[[pytest.FixtureRequest], Opened] = request.param
    opened = open_store(request)
    yield opened
    for store in (opened.store, opened.unprefixed):
        asyncio.run(store.close())


async def test_image_is_found_by_its_key(opened: Opened, user: str) -> None:
    """A bare key returns the uploaded bytes."""
    opened.put_upload(f"uploads/{user}/cat", IMAGE)
    assert await opened.store.download_image(f"uploads/{user}/cat", user, MAX_BYTES) == IMAGE


@pytest.mark.parametrize("name", ["cat", "a b", "a+b", "a%41", "caf\u00e9", "100%", "a?b#c", "\u732b"])
async def test_image_is_found_by_its_url(opened: Opened, user: str, name: str) -> None:
    """A URL is percent-decoded exactly once, and '+' stays '+'."""
    key = f"uploads/{user}/{name}"
    opened.put_upload(key, IMAGE)
    assert opened.store.key_of(opened.url_base + quote(key), user) == key
    assert await opened.store.download_image(opened.url_base + quote(key, safe=""), user, MAX_BYTES) == IMAGE


def test_plus_in_a_url_is_not_a_space(opened: Opened) -> None:
    """A '+' in a URL's path is not decoded to a space."""
    assert opened.store.key_of(f"{opened.url_base}uploads/{USER}/a+b", USER) == f"uploads/{USER}/a+b"


@pytest.mark.parametrize("character", ["\t", "\r", "\n", "\0"])
def test_control_character_before_the_key_is_invalid(opened: Opened, character: str) -> None:
    """Control characters are refused before a URL parser could delete them."""
    image_url = opened.url_base[:2] + character + opened.url_base[2:]
    with pytest.raises(ImageUrlInvalid):
        opened.store.key_of(f"{image_url}uploads/{USER}/cat", USER)


def test_bare_key_is_not_decoded(opened: Opened) -> None:
    """The %41 of a bare key is three characters."""
    assert opened.store.key_of(f"uploads/{USER}/%41", USER) == f"uploads/{USER}/%41"


def test_key_is_normalised(opened: Opened) -> None:
    """A key in NFD is normalised to NFC, as R2 stores it."""
    nfc = f"uploads/{USER}/caf\u00e9"
    assert opened.store.key_of(unicodedata.normalize("NFD", nfc), USER) == nfc


MALFORMED = {
    "empty": "",
    "traversal": f"uploads/{USER}/../user-2/cat",
    "dot segment": f"uploads/{USER}/./cat",
    "absolute path": "/etc/passwd",
    "double slash": f"uploads/{USER}//cat",
    "folder": f"uploads/{USER}/",
    "backslash": f"uploads/{USER}\\..\\user-2\\cat",
    "NUL": f"uploads/{USER}/cat\0.png",
    "newline": f"uploads/{USER}/cat\nlevel=INFO",
    "line separator": f"uploads/{USER}/cat\u2028",
    "lone surrogate": f"uploads/{USER}/\ud800",
    "1025 bytes": f"uploads/{USER}/".ljust(1025, "x"),
    "1026 bytes in 600 characters": f"uploads/{USER}/".ljust(600, "\u00e9"),
}

MALFORMED_PATHS = {
    "traversal": f"uploads/{USER}/../user-2/cat",
    "encoded traversal": f"uploads/{USER}/%2e%2e/user-2/cat",
    "encoded slash traversal": f"uploads/{USER}/..%2fuser-2%2fcat",
    "encoded backslash": f"uploads/{USER}%5c..%5cuser-2",
    "encoded NUL": f"uploads/{USER}/cat%00.png",
    "encoded newline": f"uploads/{USER}/cat%0a",
    "tab that urlsplit would delete": f"uploads/{USER}/.\t./user-2/cat",
    "not UTF-8": f"uploads/{USER}/%ff",
    "overlong slash": f"uploads/{USER}/..%c0%afuser-2",
    "encoded surrogate": f"uploads/{USER}/%ed%a0%80",
    "broken escape": f"uploads/{USER}/%zz",
    "cut escape": f"uploads/{USER}/cat%4",
    "absolute path": "/etc/passwd",
    "no key": "",
    "fragment": f"uploads/{USER}/cat#x",
}

FORBIDDEN = {
    "another user's upload": "uploads/user-2/cat",
    "a longer user_id": f"uploads/{USER}0/cat",
    "a mask": f"masks/{USER}/{TASK_ID}/0.png",
    "the prefix alone": f"uploads/{USER}",
    "encoded bare key": f"uploads%2f{USER}%2fcat",
    "double encoded URL": "{base}" + f"uploads/{USER}/".replace("/", "%252f") + "cat",
    "another user's URL": "{base}uploads/user-2/cat",
    "http": f"http://169.254.169.254/uploads/{USER}/cat",
    "https": f"https://example.com/uploads/{USER}/cat",
    "another bucket": f"s3://other/uploads/{USER}/cat",
    "ftp": f"ftp://example.com/uploads/{USER}/cat",
    "file on another host": f"file://host/uploads/{USER}/cat",
    "file elsewhere": "file:///etc/passwd",
    "file beside": "file:///uploads/user-1/cat",
    "data": "data:image/png;base64,iVBORw0KGgo=",
}


@pytest.mark.parametrize("image_url", MALFORMED.values(), ids=MALFORMED.keys())
async def test_malformed_key_is_invalid(opened: Opened, image_url: str) -> None:
    """A bare key that violates a rule raises ImageUrlInvalid."""
    with pytest.raises(ImageUrlInvalid):
        await opened.store.download_image(image_url, USER, MAX_BYTES)


@pytest.mark.parametrize("path", MALFORMED_PATHS.values(), ids=MALFORMED_PATHS.keys())
async def test_malformed_url_is_invalid(opened: Opened, path: str) -> None:
    """A URL of the store whose decoded path violates a rule raises ImageUrlInvalid."""
    with pytest.raises(ImageUrlInvalid):
        await opened.store.download_image(opened.url_base + path, USER, MAX_BYTES)


@pytest.mark.parametrize("image_url", FORBIDDEN.values(), ids=FORBIDDEN.keys())
async def test_foreign_image_is_forbidden(opened: Opened, image_url: str) -> None:
    """An image_url outside the user's own uploads raises ImageUrlForbidden."""
    with pytest.raises(ImageUrlForbidden):
        await opened.store.download_image(image_url.replace("{base}", opened.url_base), USER, MAX_BYTES)


@pytest.mark.parametrize("user_id", ["", ".", "..", "user-1/x", "user-2/../user-1", "u\u00e9"])
def test_user_id_must_be_a_plain_name(opened: Opened, user_id: str) -> None:
    """A user_id that is not a plain name owns no uploads."""
    with pytest.raises(ImageUrlForbidden):
        opened.store.key_of("uploads/user-1/x/cat", user_id)


async def test_prefix_rule_can_be_off(opened: Opened, user: str) -> None:
    """Without the prefix rule any key of the store can be read; other stores stay forbidden."""
    opened.put_upload(f"elsewhere/{user}", IMAGE)
    assert await opened.unprefixed.download_image(f"elsewhere/{user}", user, MAX_BYTES) == IMAGE
    with pytest.raises(ImageUrlForbidden):
        opened.unprefixed.key_of("https://example.com/elsewhere/cat", user)


SPELLINGS = ["/", "//", ".", "..", "\\", "%2e", "%2f", "%5c", "%25", "%00", "\0", "?", "#", ":", "C:", "~"]
ODD_CHARACTERS = ["\u212a", "\uff0f", "\ud800", "e\u0301"]
WORDS = ["uploads", USER, "user-2", "masks", "file://", "FILE://", "localhost"]
PIECES = st.sampled_from([*SPELLINGS, *ODD_CHARACTERS, *WORDS])


@given(
    pieces=st.lists(st.one_of(PIECES, st.text(max_size=3)), max_size=12),
    start=st.sampled_from(["", f"uploads/{USER}/", "{base}", f"{{base}}uploads/{USER}/"]),
)
@settings(max_examples=800, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_image_url_leaves_the_users_uploads(opened: Opened, pieces: list[str], start: str) -> None:
    """Any image_url gives a normalised key below the user's uploads, or an error."""
    image_url = start.replace("{base}", opened.url_base) + "".join(pieces)
    try:
        key = opened.store.key_of(image_url, USER)
    except StorageError:
        return
    assert key.startswith(f"uploads/{USER}/")
    assert not {"", ".", ".."} & set(key.split("/"))
    assert not set("\\\0\n\r\t") & set(key)
    assert key == unicodedata.normalize("NFC", key)
    assert len(key.encode()) <= 1024


async def test_missing_image_is_not_found(opened: Opened, user: str) -> None:
    """A key without an object raises ObjectNotFound."""
    with pytest.raises(ObjectNotFound):
        await opened.store.download_image(f"uploads/{user}/cat", user, MAX_BYTES)


async def test_key_below_an_object_is_not_found(opened: Opened, user: str) -> None:
    """A key below another object's key raises ObjectNotFound."""
    opened.put_upload(f"uploads/{user}/cat", IMAGE)
    with pytest.raises(ObjectNotFound):
        await opened.store.download_image(f"uploads/{user}/cat/tail", user, MAX_BYTES)


async def test_folder_of_objects_is_not_found(opened: Opened, user: str) -> None:
    """A key that is only a prefix of others raises ObjectNotFound."""
    opened.put_upload(f"uploads/{user}/album/cat", IMAGE)
    with pytest.raises(ObjectNotFound):
        await opened.store.download_image(f"uploads/{user}/album", user, MAX_BYTES)


async def test_longest_key_is_not_found(opened: Opened, user: str) -> None:
    """A key of 1024 bytes is valid, and raises ObjectNotFound."""
    opened.put_upload(f"uploads/{user}/cat", IMAGE)
    with pytest.raises(ObjectNotFound):
        await opened.store.download_image(f"uploads/{user}/".ljust(1024, "x"), user, MAX_BYTES)


async def test_image_may_have_exactly_max_bytes(opened: Opened, user: str) -> None:
    """An image of `max_bytes` is read, one byte more raises ObjectTooLarge."""
    opened.put_upload(f"uploads/{user}/full", b"x" * MAX_BYTES)
    opened.put_upload(f"uploads/{user}/over", b"x" * (MAX_BYTES + 1))
    assert len(await opened.store.download_image(f"uploads/{user}/full", user, MAX_BYTES)) == MAX_BYTES
    with pytest.raises(ObjectTooLarge) as raised:
        await opened.store.download_image(f"uploads/{user}/over", user, MAX_BYTES)
    assert raised.value.max_bytes == MAX_BYTES


async def test_mask_is_readable_at_its_url(opened: Opened, user: str) -> None:
    """The URL of an uploaded mask returns its bytes."""
    url = await opened.store.upload_mask(IMAGE, mask_key(user, TASK_ID, 0, IMAGE, attempt_id="a"))
    assert opened.read_url(url) == IMAGE


async def test_mask_may_be_uploaded_again(opened: Opened, user: str) -> None:
    """A repeated upload returns the same URL, as a retry needs."""
    key = mask_key(user, TASK_ID, "union", IMAGE, attempt_id="a")
    first = await opened.store.upload_mask(IMAGE, key)
    assert await opened.store.upload_mask(IMAGE, key) == first
    assert opened.read_url(first) == IMAGE


@pytest.mark.parametrize("key", ["", "../mask.png", "/mask.png", "masks//mask.png", "masks\\mask.png"])
async def test_mask_key_must_be_a_key(opened: Opened, key: str) -> None:
    """An invalid key, a bug of the caller, raises ValueError."""
    with pytest.raises(ValueError, match=r"holds a|has an empty"):
        await opened.store.upload_mask(IMAGE, key)


def test_errors_hold_no_user_data(opened: Opened) -> None:
    """The message of a refused image_url, which is logged, does not hold the URL."""
    with pytest.raises(ImageUrlForbidden) as forbidden:
        opened.store.key_of("https://secret-host/secret?token=secret", USER)
    with pytest.raises(ImageUrlInvalid) as invalid:
        opened.store.key_of("secret//secret", USER)
    assert "secret" not in f"{forbidden.value} {invalid.value}"


def test_description_is_one_line(opened: Opened) -> None:
    """The description for the start-up log is one line."""
    assert len(opened.store.describe().splitlines()) == 1


def test_mask_key_depends_on_content_and_attempt() -> None:
    """The key holds user, task, prompt and a hash of the attempt's id and the content."""
    digest = hashlib.sha256(b"a\0" + IMAGE).hexdigest()[:16]
    key = mask_key(USER, TASK_ID, 3, IMAGE, attempt_id="a")
    assert key == f"masks/{USER}/{TASK_ID}/3-{digest}.png"
    assert key != mask_key(USER, TASK_ID, 3, b"other", attempt_id="a")
    assert key != mask_key(USER, TASK_ID, 3, IMAGE, attempt_id="b")


@pytest.mark.parametrize("part", ["", "..", "a/b", "a\\b", "a.b", "x" * 65, "a\n"])
def test_mask_key_parts_are_plain_names(part: str) -> None:
    """No part of a mask's key may hold a slash, a dot or a newline."""
    for parts in [(part, TASK_ID, "0"), (USER, part, "0"), (USER, TASK_ID, part)]:
        with pytest.raises(ValueError, match="1 to 64"):
            mask_key(*parts, IMAGE, attempt_id="a")


async def test_mask_may_be_deleted(opened: Opened, user: str) -> None:
    """A deleted mask is not found; deleting a missing one is no error."""
    key = mask_key(user, TASK_ID, 0, IMAGE, attempt_id="a")
    kept = await opened.store.upload_mask(IMAGE, mask_key(user, TASK_ID, 0, IMAGE, attempt_id="b"))
    await opened.store.upload_mask(IMAGE, key)
    for _ in range(2):
        await opened.store.delete_mask(key)
        with pytest.raises(ObjectNotFound):
            await opened.unprefixed.download_image(key, user, MAX_BYTES)
    assert opened.read_url(kept) == IMAGE


async def test_mask_url_of_a_task_is_recognised(opened: Opened, user: str) -> None:
    """Only a URL of this store that names a mask of this task is accepted."""
    url = await opened.store.upload_mask(IMAGE, mask_key(user, TASK_ID, "union", IMAGE, attempt_id="a"))
    assert opened.store.holds_mask(url, user, TASK_ID)
    other_task = TASK_ID[::-1]
    for changed in (
        "",
        "https://elsewhere.example/" + url.partition("masks/")[2],
        url.replace("/masks/", "/uploads/"),
        url.replace(user, "user-2"),
        url.replace(TASK_ID, f"{other_task}/../{TASK_ID}"),
        url.replace(".png", ".html"),
        url + "#x",
        url + "\n",
    ):
        assert not opened.store.holds_mask(changed, user, TASK_ID), changed
    assert not opened.store.holds_mask(url, "user-2", TASK_ID)
    assert not opened.store.holds_mask(url, user, other_task)
