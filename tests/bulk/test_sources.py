"""The pictures that `--images` names: of folders, of buckets and of manifests."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulk.errors import BadManifest, CredentialsRefused, NoPictures, StoreUnavailable, WrongUsage
from bulk.manifests import SeenUris
from bulk.objects import open_objects, read_uri
from bulk.sources import Skipped, Source, list_pictures, source_of
from tests.bulk.buckets import use_service
from tests.services.faults import fault_proxy

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.services.objects import S3Service

ROOT = Path(__file__).parents[2]
PNG = "image/png"
RUN = "0123456789ab"


def a_folder(request: pytest.FixtureRequest) -> str:
    folder: Path = request.getfixturevalue("tmp_path") / "pictures"
    folder.mkdir()
    return str(folder)


def a_prefix(request: pytest.FixtureRequest) -> str:
    service: S3Service = request.getfixturevalue("seaweedfs")
    use_service(request.getfixturevalue("monkeypatch"), service)
    return f"s3://{service.bucket}/pictures-{uuid4()}"


@pytest.fixture(
    params=[
        pytest.param(a_folder, id="folder"),
        pytest.param(a_prefix, id="seaweedfs", marks=pytest.mark.services),
    ]
)
def place(request: pytest.FixtureRequest) -> str:
    """A folder or a prefix without objects."""
    make: Callable[[pytest.FixtureRequest], str] = request.param
    return make(request)


def fill(place: str, *names: str, data: bytes = b"1") -> None:
    objects = open_objects(place)
    for name in names:
        assert objects.create(name, data, PNG)


def found_in(place: str, images: str | None = None, **options: Any) -> list[str]:
    """The names of the pictures of a source, relative to `place`, sorted."""
    pictures = list_pictures(images or place, **options)
    return sorted(picture.image.removeprefix(f"{place}/") for picture in pictures)


# Prefixes and folders.


def test_pictures_are_told_by_their_names(place: str) -> None:
    """Four endings in any case, and names without one, as the Edge stores uploads; the rest is counted."""
    wanted = ["a.png", "b.JPG", "c.Jpeg", "deep/er/d.webp", "uploads/u/6f9a", "v1.2/cat", "x.tar.png"]
    fill(place, *wanted, "notes.txt", "a.png.bak", "cat.gif", "trailing.")
    skipped = Skipped()
    assert found_in(place, skipped=skipped) == wanted
    assert skipped == Skipped(other_endings=4)
    assert skipped.sentences() == ["4 objects have other endings"]


def test_picture_has_its_uri_and_size(place: str) -> None:
    """The URI is whole, so that any machine reads the picture by it, with signs of URLs as they are."""
    fill(place, "a b?#%20.png", data=b"12345")
    [picture] = list_pictures(place)
    assert picture.image == f"{place}/a b?#%20.png"
    assert picture.size_bytes == 5
    assert read_uri(picture.image) == b"12345"
    assert (picture.etag is None) == (not place.startswith("s3://"))


def test_hidden_files_of_a_folder_are_left_out(tmp_path: Path) -> None:
    """Thumbnails of desktops and repositories are no pictures of a user; a name that is not UTF-8 is told."""
    fill(str(tmp_path), ".cat.png", ".git/objects/6f9a", "a/.DS_Store", "a/cat.png", "dog")
    (tmp_path / "bad\udcff.png").write_bytes(b"")
    skipped = Skipped()
    assert found_in(str(tmp_path), skipped=skipped) == ["a/cat.png", "dog"]
    assert skipped.sentences() == ["3 files are hidden", "1 file has a name that is not UTF-8"]
    assert found_in(str(tmp_path), f"{tmp_path}/.git") == [".git/objects/6f9a"]


@pytest.mark.parametrize("out", ["", "results/", "deep/results/"])
def test_runs_inside_the_source_are_left_out(place: str, out: str) -> None:
    """Masks are not segmented again, whichever `--out` they have; what only looks like a run is."""
    kept = {"cat.png", f"{out}dog.png", f"{out}0123456789ab.png", f"{out}aaaaaaaaaaaa/masks/cat.png"}
    fill(place, *kept)
    for run in (RUN, "ffffffffffff"):
        fill(place, f"{out}{run}/run.json", f"{out}{run}/masks/ab/1.0.png")
    skipped = Skipped()
    assert set(found_in(place, skipped=skipped)) == kept
    assert skipped == Skipped(of_runs=4)
    assert skipped.sentences() == ["4 files belong to runs"]


def test_masks_of_a_run_are_a_source_if_they_are_named(place: str) -> None:
    fill(place, f"a/{RUN}/run.json", f"a/{RUN}/masks/ab/1.0.png")
    assert found_in(place, f"{place}/a/{RUN}/masks") == [f"a/{RUN}/masks/ab/1.0.png"]


def test_source_without_a_picture(place: str) -> None:
    """The sentence says where and for what was looked, and what was there instead; exit code 2."""
    fill(place, "notes.txt", "more.txt")
    with pytest.raises(NoPictures) as raised:
        found_in(place)
    assert raised.value.exit_code == 2
    assert str(raised.value) == (
        f"no picture in {place}/: looked for names that end in .png, .jpg, .jpeg, .webp, or have no ending "
        "(2 objects have other endings)"
    )


def test_empty_prefix_has_no_picture(seaweedfs: S3Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped prefix is told, not a run of nothing."""
    use_service(monkeypatch, seaweedfs)
    with pytest.raises(
        NoPictures, match=r"no picture in s3://s3-images/nowhere/: .* \(nothing is stored there\)"
    ):
        found_in("s3://s3-images/nowhere")


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        ("s3://", "names no bucket"),
        ("s3:///key", "names no bucket"),
        ("http://host/a.png", "is not a place for objects"),
        ("nowhere", "cannot be found"),
        ("list.csv", "cannot be found"),
        ("itself", "cannot be found"),
        ("x" * 5000, "cannot be found"),
        ("cat.png", "is a file, but no manifest, which ends in .csv or .parquet"),
    ],
)
def test_wrong_usage_is_told_before_the_listing(
    images: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be a source fails at the call, with exit code 2."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cat.png").write_bytes(b"")
    (tmp_path / "itself").symlink_to("itself")
    with pytest.raises(WrongUsage, match=sentence) as raised:
        list_pictures(images)
    assert raised.value.exit_code == 2


def test_source_has_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However a source is written, its run is the same."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.csv").write_text("image\n")
    (tmp_path / "folder.csv").mkdir()
    assert source_of(".") == source_of(f"{tmp_path}/") == Source("folder", str(tmp_path))
    assert source_of("folder.csv") == Source("folder", f"{tmp_path}/folder.csv")
    assert source_of("list.csv") == source_of("./list.csv") == Source("manifest", f"{tmp_path}/list.csv")
    assert source_of("s3://b/a/") == source_of("s3://b/a") == Source("prefix", "s3://b/a")
    assert source_of("s3://b/lists/a.CSV") == Source("manifest", "s3://b/lists/a.CSV")
    assert source_of("s3://photos.csv") == Source("prefix", "s3://photos.csv")


# Manifests.


def parquet(names: list[Any] | pa.Array, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"width": pa.array(range(len(names))), "image": names}), buffer, **options)
    return buffer.getvalue()


def csv_of(names: list[str]) -> bytes:
    return "".join(["width,image\n", *(f'1,"{name}"\n' for name in names)]).encode()


FORMATS = pytest.mark.parametrize(("ending", "write"), [("csv", csv_of), ("PARQUET", parquet)])


@FORMATS
def test_each_row_is_a_picture(place: str, ending: str, write: Callable[[list[str]], bytes]) -> None:
    """Rows come in order, relative to the manifest's folder, whatever their endings; again ones once."""
    rows = [
        "b.txt",
        "sub/\u732b a,b.png",
        "./b.txt",
        "../other/c",
        "s3://bucket/k?#.png",
        "b.txt",
        "x/../b.txt",
    ]
    fill(f"{place}/lists", f"m.{ending}", data=write(rows))
    skipped = Skipped()
    pictures = [*list_pictures(f"{place}/lists/m.{ending}", skipped=skipped)]
    assert [picture.image for picture in pictures] == [
        *(f"{place}/lists/b.txt", f"{place}/lists/sub/\u732b a,b.png", f"{place}/other/c"),
        "s3://bucket/k?#.png",
    ]
    assert {(picture.size_bytes, picture.etag) for picture in pictures} == {(None, None)}
    assert skipped.sentences() == ["3 rows name a picture again"]


@FORMATS
def test_manifest_without_rows(tmp_path: Path, ending: str, write: Callable[[list[str]], bytes]) -> None:
    """An empty list is no run of nothing."""
    path = tmp_path / f"m.{ending}"
    path.write_bytes(write([]) if ending == "csv" else parquet(pa.array([], pa.string())))
    with pytest.raises(NoPictures, match=f"the manifest {path} has no row"):
        [*list_pictures(str(path))]


def test_absolute_paths_are_read_from_a_local_manifest_alone(place: str) -> None:
    """Whoever may write to a bucket chooses no file of the workers' machines."""
    fill(place, "m.csv", data=b"image\n/etc/passwd\n")
    listing = list_pictures(f"{place}/m.csv")
    if place.startswith("s3://"):
        with pytest.raises(BadManifest, match="line 2: is a path of a machine"):
            next(listing)
    else:
        assert [picture.image for picture in listing] == ["/etc/passwd"]


BAD_CSVS = {
    "empty": (b"", r"m.csv has no column 'image' \(its columns: none\)"),
    "no column": (b"Image;width\na;1\n", r"m.csv has no column 'image' \(its columns: 'Image;width'\)"),
    "UTF-16": ("image\na\n".encode("utf-16"), "line 1: is not UTF-8"),
    "Latin-1": (b"image\na\nb\ncaf\xe9\n", "line 4: is not UTF-8"),
    "blank row": (b"image\na\n\nb\n", "line 3: the column image is empty"),
    "bucket": (b"image\ns3://my photos/a.png\n", "line 2: 'my photos' cannot be the name of a bucket"),
    "blank cell": (b"width,image\n1,a\n2, \n", "line 3: the column image is empty"),
    "short row": (b"width,image\n1,a\n2\n", "line 3: the column image is empty"),
    "line of a row": (b'image,note\na,"1\n2\n3"\n,x\n', "line 5: the column image is empty"),
    "open quote": (b'image\na\n"b\nc\n', "line 3: is not CSV: unexpected end of data"),
    "another scheme": (b"image\nhttp://host/a.png\n", "line 2: is neither s3://bucket/key nor a path"),
    "no key": (b"image\ns3://bucket\n", "line 2: names no object"),
    "binary": (b"image\n" + b"a" * (2 << 20), "line 2: has more than 1048576 bytes"),
    "long cell": (b"image\n" + b"a" * (200 << 10), "line 2: is not CSV: field larger than field limit"),
}


@pytest.mark.parametrize("case", BAD_CSVS)
def test_bad_csv_names_its_line(case: str, tmp_path: Path) -> None:
    """A manifest that cannot be read ends the run with exit code 2, before a picture is segmented."""
    content, sentence = BAD_CSVS[case]
    (tmp_path / "m.csv").write_bytes(content)
    with pytest.raises(BadManifest, match=sentence) as raised:
        [*list_pictures(str(tmp_path / "m.csv"))]
    assert raised.value.exit_code == 2


def test_csv_of_other_programs_is_read(tmp_path: Path) -> None:
    """Excel's byte order mark and line ends, empty lines at the end, spaces in the head, quoted signs."""
    content = '\ufeffid, image \r\n1,a.png\r\n2,"with ""quotes"", and\r\na line.png"\r\n\r\n\r\n'
    (tmp_path / "m.csv").write_bytes(content.encode())
    assert found_in(str(tmp_path), f"{tmp_path}/m.csv") == ["a.png", 'with "quotes", and\r\na line.png']


TEXTS = {
    "dictionary": pa.array(["a", "b", "a"]).dictionary_encode(),
    "large": pa.array(["a", "b", "a"], pa.large_string()),
    "bytes": pa.array([b"a", b"b", b"a"], pa.binary()),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_parquet_of_other_programs_is_read(kind: str, tmp_path: Path) -> None:
    """Categories of pandas are dictionaries; some writers do not mark texts as such."""
    (tmp_path / "m.parquet").write_bytes(parquet(TEXTS[kind]))
    assert found_in(str(tmp_path), f"{tmp_path}/m.parquet") == ["a", "b"]


WHOLE = parquet([f"{n:012}" for n in range(5000)], use_dictionary=False, compression="none")
NAME = (12).to_bytes(4, "little") + b"000000002500"
BAD_PARQUETS = {
    "CSV": (b"image\na\n", "cannot be read as Parquet"),
    "empty": (b"", "cannot be read as Parquet"),
    "half": (WHOLE[: len(WHOLE) // 2], "cannot be read as Parquet"),
    "damaged": (WHOLE.replace(NAME, b"\xff" * len(NAME)), "cannot be read as Parquet"),
    "numbers": (parquet([1, 2]), "the column image holds int64, not names"),
    "pictures": (parquet([{"bytes": b"1", "path": "a"}]), "the column image holds struct"),
    "null": (parquet(["a", None]), "row 2: the column image is empty"),
    "only null": (parquet([None]), "row 1: the column image is empty"),
    "far null": (parquet([*"a" * 10_000, None]), "row 10001: the column image is empty"),
    "Latin-1": (parquet(pa.array([b"a", b"caf\xe9"], pa.binary())), "rows 1 to 2: a name is not UTF-8"),
}


@pytest.mark.parametrize("case", BAD_PARQUETS)
def test_bad_parquet_is_told(case: str, tmp_path: Path) -> None:
    """A file that only has the ending, and rows without a name, end the run with a sentence."""
    content, sentence = BAD_PARQUETS[case]
    (tmp_path / "m.parquet").write_bytes(content)
    with pytest.raises(BadManifest, match=sentence) as raised:
        [*list_pictures(str(tmp_path / "m.parquet"))]
    assert len(str(raised.value).splitlines()) == 1


def test_parquet_without_the_column(tmp_path: Path) -> None:
    """The sentence lists the columns that are there."""
    pq.write_table(pa.table({"url": ["a"], "width": [1]}), tmp_path / "m.parquet")
    with pytest.raises(BadManifest, match=r"has no column 'image' \(its columns: 'url', 'width'\)"):
        [*list_pictures(str(tmp_path / "m.parquet"))]


@FORMATS
def test_manifest_in_a_bucket_is_read_in_parts(
    ending: str,
    write: Callable[[list[str]], bytes],
    seaweedfs: S3Service,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first pictures come before the whole file is fetched, and a broken connection is retried."""
    rows = [f"{n:07}-{uuid4()}.png" for n in range(400_000)]
    options: dict[str, Any] = {"use_dictionary": False, "compression": "none"} if ending != "csv" else {}
    content = write(rows, **options)
    seaweedfs.put(f"lists/many.{ending}", content)
    with fault_proxy(seaweedfs.endpoint) as proxy:
        use_service(monkeypatch, seaweedfs, endpoint=proxy.url)
        proxy.cut_next(1, after_bytes=100_000, when=lambda seen: seen.headers.get("range") != "bytes=0-0")
        listing = list_pictures(f"s3://{seaweedfs.bucket}/lists/many.{ending}", max_wait_s=20)
        first = next(listing)
        assert first.image == f"s3://{seaweedfs.bucket}/lists/{rows[0]}"
        before = len(proxy.requests)
        assert [picture.image.rpartition("/")[2] for picture in listing] == rows[1:]
        assert len(proxy.requests) > before


LISTED = """
import resource, sys
from bulk.sources import list_pictures

def peak_kib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

start_kib = peak_kib()
print(sum(1 for _ in list_pictures(sys.argv[1])), peak_kib() - start_kib)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss has other units elsewhere")
def test_manifest_is_not_kept_in_memory(tmp_path: Path) -> None:
    """A batch of names is kept, and 8 bytes of each: 164 MB of names grow the process by less than 150 MB."""
    names = pa.array([f"{n:010}/{'x' * 400}" for n in range(400_000)])
    pq.write_table(
        pa.table({"image": names}), tmp_path / "m.parquet", use_dictionary=False, compression="none"
    )
    command = [sys.executable, "-c", LISTED, str(tmp_path / "m.parquet")]
    printed = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    ).stdout
    pictures, grown_kib = map(int, printed.split())
    assert pictures == 400_000
    assert grown_kib < 150_000


@given(st.lists(st.lists(st.integers(0, 30), max_size=20), max_size=20))
def test_first_of_equal_names_is_new(batches: list[list[int]]) -> None:
    """Within a batch and over batches, only the first of equal names is new."""
    seen, known = SeenUris(), set[int]()
    for batch in batches:
        is_new = seen.add([str(number) for number in batch])
        for number, new in zip(batch, is_new, strict=True):
            assert new == (number not in known)
            known.add(number)


def test_manifest_of_a_store_that_fails(seaweedfs: S3Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that is away, or refuses the credentials, is no bad manifest, in Parquet's reader too."""
    rows = [f"{uuid4()}" for _ in range(300_000)]
    seaweedfs.put("lists/m.parquet", parquet(rows, use_dictionary=False, compression="none"))
    images = f"s3://{seaweedfs.bucket}/lists/m.parquet"
    with fault_proxy(seaweedfs.endpoint) as proxy:
        use_service(monkeypatch, seaweedfs, endpoint=proxy.url)
        listing = list_pictures(images, max_wait_s=1)
        next(listing)
        proxy.fail_next(99, status=503)
        with pytest.raises(StoreUnavailable):
            list(listing)
        proxy.heal()
        proxy.fail_next(99, status=400, body=b"<Error><Code>ExpiredToken</Code></Error>")
        with pytest.raises(CredentialsRefused):
            next(list_pictures(images))
        proxy.heal()
        with pytest.raises(WrongUsage, match=r"the manifest .* does not exist: no object has this key"):
            next(list_pictures(f"{images}.csv"))
