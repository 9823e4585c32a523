"""What the objects of a folder, of SeaweedFS and of Cloudflare's local R2 have in common."""

from __future__ import annotations

import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
from boto3.s3.transfer import TransferConfig

from bulk.errors import PictureError, WrongUsage
from bulk.objects import open_objects, open_uri, read_uri, s3
from tests.bulk.buckets import use_service

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from bulk.objects import Objects
    from tests.services.objects import S3Service

PNG = "image/png"


def a_folder(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue("tmp_path") / "objects")


def a_prefix(fixture: str) -> Callable[[pytest.FixtureRequest], str]:
    def make(request: pytest.FixtureRequest) -> str:
        service: S3Service = request.getfixturevalue(fixture)
        use_service(request.getfixturevalue("monkeypatch"), service)
        return f"s3://{service.bucket}/bulk {uuid4()}"

    return make


STORES = [
    pytest.param(a_folder, id="folder"),
    pytest.param(a_prefix("seaweedfs"), id="seaweedfs", marks=pytest.mark.services),
    pytest.param(a_prefix("r2_emulator"), id="r2", marks=pytest.mark.services),
]


@pytest.fixture(params=STORES)
def uri(request: pytest.FixtureRequest) -> str:
    """A place for objects that is empty."""
    make: Callable[[pytest.FixtureRequest], str] = request.param
    return make(request)


@pytest.fixture
def objects(uri: str) -> Objects:
    return open_objects(uri, max_wait_s=20)


def names(objects: Objects, prefix: str = "") -> list[str]:
    return [found.name for found in objects.list(prefix)]


def test_object_is_created_once(objects: Objects) -> None:
    """The first content stays: a shard that another worker has finished is not written again."""
    assert objects.create("rows/00000.parquet", b"first", "application/octet-stream")
    assert not objects.create("rows/00000.parquet", b"second", "application/octet-stream")
    assert objects.read("rows/00000.parquet") == b"first"


def test_of_concurrent_creates_one_wins(objects: Objects) -> None:
    """Eight writers of one name: one is told that it created the object, and its bytes are there."""
    for turn in range(10):
        contents = [bytes([writer]) * 20_000 for writer in range(8)]

        def create(content: bytes, name: str = f"rows/{turn}") -> bool:
            return objects.create(name, content, PNG)

        with ThreadPoolExecutor(len(contents)) as threads:
            created = [*threads.map(create, contents)]
        assert created.count(True) == 1
        assert objects.read(f"rows/{turn}") == contents[created.index(True)]


def test_replaced_object_has_the_new_content(objects: Objects) -> None:
    """A report is written again at the end of each run."""
    objects.replace("summary.json", b"old and longer", "application/json")
    objects.replace("summary.json", b"new", "application/json")
    assert objects.read("summary.json") == b"new"
    assert [(found.name, found.size_bytes) for found in objects.list()] == [("summary.json", 3)]


def test_missing_object_is_an_error_of_the_picture(objects: Objects, uri: str) -> None:
    """One missing picture is an error row."""
    objects.create("cat", b"cat", PNG)
    for read in (lambda: objects.read("dog"), lambda: objects.open("dog"), lambda: read_uri(f"{uri}/c")):
        with pytest.raises(PictureError) as raised:
            read()
        assert raised.value.code == "NOT_FOUND"


def test_large_object_is_refused(objects: Objects) -> None:
    """An object of `max_bytes` is read, one with a byte more is not."""
    objects.create("cat", b"12345", PNG)
    assert objects.read("cat", max_bytes=5) == b"12345"
    with pytest.raises(PictureError, match="more than 4 bytes") as raised:
        objects.read("cat", max_bytes=4)
    assert raised.value.code == "TOO_LARGE"


def test_empty_object_is_read(objects: Objects) -> None:
    """An object may be empty, and is listed."""
    assert objects.create("empty", b"", PNG)
    assert objects.read("empty", max_bytes=0) == b""
    with objects.open("empty") as file:
        assert file.read() == b""
    assert names(objects) == ["empty"]


def test_uploaded_file_is_read_in_parts(
    objects: Objects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of several parts arrives whole, and its end is read without the rest."""
    smallest_parts = TransferConfig(multipart_threshold=5 << 20, multipart_chunksize=5 << 20)
    monkeypatch.setattr(s3, "_UPLOAD", smallest_parts)
    content = os.urandom(11 << 20)
    (tmp_path / "coco.json").write_bytes(content)
    objects.upload("coco.json", tmp_path / "coco.json", "application/json")
    with objects.open("coco.json") as file:
        file.seek(-1000, os.SEEK_END)
        assert file.read() == content[-1000:]
        file.seek(0)
        assert file.read() == content
    (tmp_path / "coco.json").write_bytes(b"{}")
    objects.upload("coco.json", tmp_path / "coco.json", "application/json")
    assert objects.read("coco.json") == b"{}"


AWKWARD = [
    *("sp ace/a b", "percent/%20%2F%", "query?a=b&c#d+e", "caf\u00e9/\u732b/\U0001f600.png", "cafe\u0301"),
    *("tab\tname", "quotes\"'<>&", "\x01", "...", "a..b/.c", "~", "x" * 200 + "/" + "y" * 200),
    "/".join(["z" * 99] * 9),
]


def test_awkward_names_come_back(objects: Objects, uri: str) -> None:
    """Spaces, signs of URLs, other scripts, nearly 1,000 characters: as given, in every method."""
    for name in AWKWARD:
        assert objects.create(name, name.encode(), PNG), name
    assert sorted(names(objects)) == sorted(AWKWARD)
    for name in AWKWARD:
        assert objects.read(name) == name.encode()
        assert read_uri(f"{open_objects(uri).uri}/{name}") == name.encode()
        assert not objects.create(name, b"again", PNG)


def test_listing_is_of_one_prefix(objects: Objects, uri: str) -> None:
    """`user-1` is not `user-10`; inside a place, a prefix may end within a name."""
    for name in ("user-1/a", "user-1/b/c", "user-10/a", "user"):
        objects.create(name, b"", PNG)
    assert names(open_objects(f"{uri}/user-1")) == ["a", "b/c"]
    assert names(open_objects(f"{uri}/user-1/")) == ["a", "b/c"]
    assert names(objects, "user-1/") == ["user-1/a", "user-1/b/c"]
    assert names(objects, "user-1/b") == ["user-1/b/c"]
    assert set(names(objects, "user")) == {"user", "user-1/a", "user-1/b/c", "user-10/a"}
    assert names(objects, "nobody/") == []
    assert names(open_objects(f"{uri}/nobody")) == []


def test_listing_has_sizes(objects: Objects) -> None:
    """A listing tells large objects without reading them."""
    objects.create("a", b"12345", PNG)
    [found] = objects.list()
    assert found.size_bytes == 5


def test_large_object_is_opened_by_its_uri(objects: Objects) -> None:
    """A manifest is found by the URI that the user gave."""
    objects.create("lists/a.csv", b"image\n", "text/csv")
    with open_uri(f"{objects.uri}/lists/a.csv") as file:
        assert file.readline() == b"image\n"


def test_objects_are_used_by_other_processes(objects: Objects) -> None:
    """A forked process, and one that unpickles the store, read and write on their own connections."""
    objects.create("cat", b"cat", PNG)
    forked = get_context("fork").Process(target=_read_and_create, args=(objects, "of the fork"))
    forked.start()
    forked.join(60)
    assert forked.exitcode == 0
    again: Objects = pickle.loads(pickle.dumps(objects))  # noqa: S301 - made above
    assert again == objects
    assert set(names(again)) == {"cat", "of the fork"}


def _read_and_create(objects: Objects, name: str) -> None:
    with ThreadPoolExecutor(4) as threads:
        assert [*threads.map(objects.read, ["cat"] * 20)] == [b"cat"] * 20
    assert objects.create(name, b"", PNG)


@pytest.mark.parametrize("place", ["", "http://host/a", "s3://", "s3:///key", "gs://bucket/a", "a\0b"])
def test_other_places_are_refused(place: str) -> None:
    """A scheme that is not served, and a URI without a bucket, are wrong usage: exit code 2."""
    with pytest.raises(WrongUsage) as raised:
        open_objects(place)
    assert raised.value.exit_code == 2


def test_folder_has_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is found again when its folder is named in another way."""
    monkeypatch.chdir(tmp_path)
    assert open_objects("out").uri == open_objects(f"{tmp_path}/x/../out/").uri == str(tmp_path / "out")
