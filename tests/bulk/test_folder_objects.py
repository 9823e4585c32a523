"""Objects in a folder: links, names, disks and processes that end."""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bulk.errors import PictureError, StoreRefused, WrongUsage
from bulk.objects import open_objects, read_uri
from tests.services.processes import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bulk.objects import Objects

ROOT = Path(__file__).parents[2]
PNG = "image/png"
NOBODY = 65534

part_of_name = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=["Cs"]) | st.sampled_from("-.0 a"),
    min_size=1,
    max_size=50,
).filter(lambda part: part not in {".", ".."})
name_of_object = st.lists(part_of_name, min_size=1, max_size=4).map("/".join)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "objects"


@pytest.fixture
def objects(root: Path) -> Objects:
    return open_objects(str(root))


def names(objects: Objects, prefix: str = "") -> list[str]:
    return [found.name for found in objects.list(prefix)]


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(name_of_object, st.binary(max_size=20), max_size=8))
def test_any_names_come_back_in_s3s_order(stored: dict[str, bytes]) -> None:
    """What was created is listed in the order of the names' bytes, as S3 does, and read as it was."""
    folders = {name[:end] for name in stored for end, sign in enumerate(name) if sign == "/"}
    stored = {name: data for name, data in stored.items() if name not in folders}
    with tempfile.TemporaryDirectory() as root:
        objects = open_objects(root)
        for name, data in stored.items():
            assert objects.create(name, data, PNG)
        assert names(objects) == sorted(stored, key=str.encode)
        for name, data in stored.items():
            assert objects.read(name) == data
            assert names(objects, name)[0] == name


@pytest.mark.parametrize("name", ["", "/etc/passwd", "..", "../a", "a/../../b", "./a", "a//b", "a/", "a\0b"])
def test_names_that_leave_the_folder_are_refused(objects: Objects, name: str) -> None:
    """Nothing outside the folder is read or written."""
    calls = (
        lambda: objects.read(name),
        lambda: objects.open(name),
        lambda: objects.create(name, b"", PNG),
        lambda: objects.replace(name, b"", PNG),
        lambda: objects.upload(name, ROOT / "LICENSE", "text/plain"),
    )
    for call in calls:
        with pytest.raises(WrongUsage):
            call()


def test_only_regular_files_are_objects(objects: Objects, root: Path) -> None:
    """A folder, a FIFO and a broken link are not listed, and reading them ends at once."""
    (root / "folder").mkdir(parents=True)
    os.mkfifo(root / "fifo")
    (root / "broken").symlink_to("nowhere")
    (root / "itself").symlink_to("itself")
    (root / "file").write_bytes(b"1")
    assert names(objects) == ["file"]
    for name in ("folder", "fifo", "broken", "itself", "file/below", "x" * 300):
        with pytest.raises(PictureError) as raised:
            objects.read(name)
        assert raised.value.code == "NOT_FOUND"


@pytest.mark.parametrize("path", ["/", "/tmp/..", "/tmp/.", "/nowhere/a\0b"])  # noqa: S108 - not written to
def test_path_without_a_file_is_not_found(path: str) -> None:
    """A row of a manifest may name anything; it becomes an error row."""
    with pytest.raises(PictureError) as raised:
        read_uri(path)
    assert raised.value.code == "NOT_FOUND"


def test_linked_folders_are_listed_once(objects: Objects, root: Path, tmp_path: Path) -> None:
    """Links to folders inside, to the root and in circles do not repeat or hang the listing."""
    outside = tmp_path / "outside"
    (outside / "deep").mkdir(parents=True)
    (outside / "deep" / "dog").write_bytes(b"dog")
    (root / "a").mkdir(parents=True)
    (root / "a" / "cat").write_bytes(b"cat")
    (root / "a" / "up").symlink_to("..")
    (root / "b").symlink_to("a")
    (root / "c").symlink_to(outside)
    (root / "d").symlink_to(outside / "deep")
    (outside / "back").symlink_to(root)
    (outside / "self").symlink_to(outside)
    (outside / "parent").symlink_to(tmp_path)
    (root / "linked cat").symlink_to("a/cat")
    assert names(objects) == ["a/cat", "c/deep/dog", "linked cat"]
    assert objects.read("c/deep/dog") == b"dog"
    assert objects.read("linked cat") == b"cat"


def test_listing_is_lazy_and_not_recursive(objects: Objects, root: Path) -> None:
    """Folders lie deeper than functions may call each other; later folders are not opened before."""
    depth = 100
    deep = root.joinpath(*["a"] * depth)
    deep.mkdir(parents=True)
    (deep / "cat").write_bytes(b"cat")
    (root / "b").mkdir()
    usual_limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + depth // 2)
    try:
        listing = objects.list()
        assert next(listing).name == "a/" * depth + "cat"
        (root / "b" / "later").write_bytes(b"")
        assert [found.name for found in listing] == ["b/later"]
    finally:
        sys.setrecursionlimit(usual_limit)


def test_files_that_go_while_they_are_listed(objects: Objects, root: Path) -> None:
    """What is removed meanwhile is left out, and the rest is listed."""
    for name in ("a", "b", "c/d", "e"):
        objects.create(name, b"", PNG)
    listing = objects.list()
    assert next(listing).name == "a"
    (root / "b").unlink()
    shutil.rmtree(root / "c")
    assert [found.name for found in listing] == ["e"]


def test_file_of_a_killed_process_is_never_seen(objects: Objects, root: Path, tmp_path: Path) -> None:
    """A process that dies while it writes leaves nothing that is listed; the name is free."""
    source = tmp_path / "source"
    os.mkfifo(source)
    code = "import sys, pathlib; from bulk.objects import open_objects; "
    code += "open_objects(sys.argv[1]).upload('big', pathlib.Path(sys.argv[2]), 'image/png')"
    process = subprocess.Popen([sys.executable, "-c", code, str(root), str(source)], cwd=ROOT)
    with source.open("wb") as half:
        half.write(bytes(1 << 21))
        wait_until(lambda: any(path.stat().st_size for path in root.glob(".*")))
        process.kill()
        process.wait()
    assert [*root.iterdir()] != []
    assert names(objects) == []
    assert objects.create("big", b"whole", PNG)
    assert names(objects) == ["big"]


FILL = """
import pathlib, sys
from bulk.errors import BulkError
from bulk.objects import open_objects
root = pathlib.Path(sys.argv[1])
objects = open_objects(str(root))
for call in (
    lambda: objects.create("new", bytes(1 << 20), "image/png"),
    lambda: objects.replace("kept", bytes(1 << 20), "image/png"),
    lambda: objects.upload("kept", pathlib.Path(sys.argv[2]), "image/png"),
):
    try:
        print(call())
    except BulkError as error:
        print(type(error).__name__, error.exit_code, error)
print(sorted(path.name for path in root.iterdir()), objects.read("kept"))
"""
FULL = 'mount -t tmpfs -o size=64k tmpfs "$0" && printf kept >"$0"/kept && exec "$@"'
READ_ONLY = FULL.replace("&& exec", '&& mount -o remount,ro "$0" && exec')


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mounts need Linux")
@pytest.mark.parametrize(
    ("mount", "cause"),
    [(FULL, "No space left on device"), (READ_ONLY, "Read-only file system")],
    ids=["full", "read-only"],
)
def test_full_disk_ends_the_run(tmp_path: Path, mount: str, cause: str) -> None:
    """A disk without room: one sentence, exit code 3, no half a file, and old files as they were."""
    root, large = tmp_path / "disk", tmp_path / "large"
    root.mkdir()
    large.write_bytes(bytes(1 << 20))
    under = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, str(root))
    try:
        subprocess.run([*under, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("nothing can be mounted here")
    command = [*under, sys.executable, "-c", FILL, str(root), str(large)]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=60).stdout
    *refusals, left = printed.splitlines()
    sentence = f"{root} is full or read-only ({cause}); make space there, and start the same command again"
    assert refusals == [f"StoreFull 3 {sentence}"] * 3
    assert left == "['kept'] b'kept'"


@contextmanager
def without_rights(folder: Path) -> Iterator[None]:
    """Neither read nor write a folder in the block, as root or as another user."""
    folder.chmod(0o000)
    as_root = os.geteuid() == 0
    if as_root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if as_root:
            os.seteuid(0)
        folder.chmod(0o700)


def test_missing_rights_are_told(objects: Objects, root: Path) -> None:
    """Reading a closed file is the picture's error; a closed folder ends the run with exit code 3."""
    objects.create("closed/cat", b"", PNG)
    with without_rights(root):
        with pytest.raises(PictureError) as of_picture:
            objects.read("closed/cat")
        with pytest.raises(StoreRefused, match="may not write to") as of_run:
            objects.create("closed/dog", b"", PNG)
        with pytest.raises(StoreRefused, match="may not list"):
            names(objects)
    assert of_picture.value.code == "FORBIDDEN"
    assert of_run.value.exit_code == 3


def test_file_in_the_place_of_a_folder_is_told(objects: Objects) -> None:
    """`--out` or a part of it is a file: a sentence, not a traceback."""
    objects.create("masks", b"", PNG)
    with pytest.raises(StoreRefused, match="a file lies where a folder is needed"):
        objects.create("masks/a.png", b"", PNG)
    with pytest.raises(StoreRefused, match="a file lies where a folder is needed"):
        open_objects(f"{objects.uri}/masks").create("a/b.png", b"", PNG)
