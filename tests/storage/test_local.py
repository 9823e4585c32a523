"""The folder alone: links, special files, races and faults of the file system."""

import asyncio
import itertools
import os
import socket
import stat
import subprocess
import sys
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage import (
    ImageUrlForbidden,
    ImageUrlInvalid,
    LocalFolder,
    ObjectNotFound,
    ObjectTooLarge,
    StorageError,
    StorageUnavailable,
    nofollow,
)

pytestmark = pytest.mark.anyio

USER = "user-1"
KEY = f"uploads/{USER}/cat"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "a folder"


@pytest.fixture
def folder(root: Path) -> LocalFolder:
    return LocalFolder(root)


def files_below(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


@pytest.mark.parametrize("tail", ["?", "?x=1", "#", "#x"])
def test_file_url_has_no_query_or_fragment(folder: LocalFolder, root: Path, tail: str) -> None:
    """A query or a fragment, empty too, makes a file URL invalid."""
    with pytest.raises(ImageUrlInvalid):
        folder.key_of(f"{root.as_uri()}/{KEY}{tail}", USER)


@pytest.mark.parametrize("host", ["localhost", "host", "127.0.0.1", "user@host", "%2f"])
def test_file_url_has_no_host(folder: LocalFolder, root: Path, host: str) -> None:
    """A file URL with a host is forbidden, with this host too."""
    with pytest.raises(ImageUrlForbidden):
        folder.key_of(f"{root.as_uri().replace('file://', f'file://{host}')}/{KEY}", USER)


def test_file_url_of_another_folder_is_forbidden(folder: LocalFolder, root: Path) -> None:
    """A folder whose name has the root's name as a prefix is another folder."""
    with pytest.raises(ImageUrlForbidden):
        folder.key_of(f"{root.as_uri()}-2/{KEY}", USER)


def test_scheme_may_be_in_capitals(folder: LocalFolder, root: Path) -> None:
    """URL schemes are case-insensitive."""
    assert folder.key_of(f"{root.as_uri()}/{KEY}".replace("file", "FILE"), USER) == KEY


async def test_link_out_of_the_folder_is_forbidden(folder: LocalFolder, root: Path, tmp_path: Path) -> None:
    """A linked file is not read, nor is a file in a linked folder."""
    (tmp_path / "secret").write_bytes(b"secret")
    uploads = root / "uploads" / USER
    uploads.mkdir(parents=True)
    (uploads / "file").symlink_to(tmp_path / "secret")
    (uploads / "folder").symlink_to(tmp_path, target_is_directory=True)
    for name in ("file", "folder/secret"):
        with pytest.raises(ImageUrlForbidden):
            await folder.download_image(f"uploads/{USER}/{name}", USER, 100)


async def test_link_to_another_user_is_forbidden(folder: LocalFolder, root: Path) -> None:
    """A link inside the root to another user's uploads is not followed."""
    folder.put_upload("uploads/user-2/cat", b"secret")
    (root / "uploads" / USER).symlink_to(root / "uploads" / "user-2", target_is_directory=True)
    with pytest.raises(ImageUrlForbidden):
        await folder.download_image(KEY, USER, 100)


async def test_link_to_itself_is_refused(folder: LocalFolder, root: Path) -> None:
    """A link to itself raises a StorageError."""
    (root / "uploads").symlink_to(root / "uploads")
    with pytest.raises((ImageUrlForbidden, ObjectNotFound)):
        await folder.download_image(KEY, USER, 100)


async def test_mask_does_not_follow_a_link(folder: LocalFolder, root: Path, tmp_path: Path) -> None:
    """A mask is not written through a link to the outside."""
    (tmp_path / "outside").mkdir()
    (root / "masks").symlink_to(tmp_path / "outside", target_is_directory=True)
    with pytest.raises(StorageUnavailable):
        await folder.upload_mask(b"mask", "masks/user-1/task/0.png")
    assert not list((tmp_path / "outside").iterdir())


def bind_socket(path: Path) -> None:
    """Create a unix socket at `path`, which may be too long for a socket's address."""
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(path.name)
    finally:
        os.chdir(here)


SPECIAL_FILES: dict[str, Callable[[Path], None]] = {
    "a FIFO": lambda path: os.mkfifo(path),  # noqa: PLW0108 - Windows has none
    "a folder": Path.mkdir,
    "a socket": bind_socket,
    "a device": lambda path: os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5)),
}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such files")
@pytest.mark.parametrize("kind", SPECIAL_FILES)
def test_only_a_file_is_an_image(root: Path, kind: str) -> None:
    """A file that is not regular raises ObjectNotFound at once: no open or read blocks."""
    (root / KEY).parent.mkdir(parents=True)
    try:
        SPECIAL_FILES[kind](root / KEY)
    except PermissionError:
        pytest.skip("only root may make devices")
    asked = subprocess.run([sys.executable, "-c", READ, str(root)], check=False, timeout=60)
    assert asked.returncode == 7


READ = """
import asyncio, sys
from pathlib import Path
from storage import LocalFolder, ObjectNotFound

try:
    asyncio.run(LocalFolder(Path(sys.argv[1])).download_image("uploads/user-1/cat", "user-1", 100))
except ObjectNotFound:
    sys.exit(7)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows opens by path alone")
@pytest.mark.parametrize("swapped", ["the file", "its folder"])
def test_link_that_replaces_a_name_is_not_read(
    folder: LocalFolder, root: Path, tmp_path: Path, swapped: str
) -> None:
    """While a name alternates between an image and a link, only the image is read."""
    folder.put_upload(KEY, b"cat")
    uploads = root / "uploads" / USER
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "cat").write_bytes(b"secret")
    name, target = (uploads / "cat", outside / "cat") if swapped == "the file" else (uploads, outside)
    done = threading.Event()

    def swap() -> None:
        aside, link = name.with_name("aside"), name.with_name("link")
        while not done.is_set():
            link.symlink_to(target)
            name.rename(aside)
            link.rename(name)
            name.unlink()
            aside.rename(name)

    swapping = threading.Thread(target=swap)
    swapping.start()
    read: Counter[bytes] = Counter()
    try:
        for _ in range(3000):
            with suppress(ImageUrlForbidden, ObjectNotFound):
                read[folder._read(KEY, 100)] += 1
    finally:
        done.set()
        swapping.join()
    assert set(read) <= {b"cat"}
    assert folder._read(KEY, 100) == b"cat"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows opens by path alone")
def test_link_that_replaces_a_folder_is_not_written_through(
    folder: LocalFolder, root: Path, tmp_path: Path
) -> None:
    """While a folder alternates with a link, no mask is written or deleted outside."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "old.png").write_bytes(b"outside")
    name, done = root / "masks" / "user-1", threading.Event()

    def swap() -> None:
        for number in itertools.takewhile(lambda _: not done.is_set(), itertools.count()):
            with suppress(OSError):  # a write has created the folder again
                name.rename(tmp_path / f"aside-{number}")
                name.symlink_to(outside)
                name.unlink()

    swapping = threading.Thread(target=swap)
    swapping.start()
    try:
        for _ in range(1000):
            with suppress(StorageUnavailable):
                folder._write("masks/user-1/0.png", b"mask")
            with suppress(StorageUnavailable):
                folder._delete("masks/user-1/old.png")
    finally:
        done.set()
        swapping.join()
    assert files_below(outside) == ["old.png"]


async def test_folder_without_directory_descriptors(
    folder: LocalFolder, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows: objects are written, read and deleted by path, and links are refused."""
    monkeypatch.setattr(nofollow, "_HAS_DIR_FD", False)
    await folder.upload_mask(b"mask", "masks/user-1/0.png")
    await folder.delete_mask("masks/user-1/0.png")
    assert files_below(root) == []
    folder.put_upload(KEY, b"cat")
    assert await folder.download_image(KEY, USER, 100) == b"cat"
    (tmp_path / "secret").write_bytes(b"secret")
    (root / "uploads" / USER / "link").symlink_to(tmp_path / "secret")
    (root / "uploads" / USER / "folder").symlink_to(tmp_path, target_is_directory=True)
    for name in ("link", "folder/secret"):
        with pytest.raises(ImageUrlForbidden):
            await folder.download_image(f"uploads/{USER}/{name}", USER, 100)
        with pytest.raises(StorageUnavailable):
            await folder.upload_mask(b"mask", f"uploads/{USER}/{name}")
    assert (tmp_path / "secret").read_bytes() == b"secret"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
async def test_hard_link_is_read(folder: LocalFolder, root: Path) -> None:
    """A hard link is a regular file: only a user who may read a file may link it."""
    folder.put_upload("uploads/user-1/dog", b"dog")
    (root / KEY).hardlink_to(root / "uploads/user-1/dog")
    assert await folder.download_image(KEY, USER, 100) == b"dog"


async def test_no_descriptor_is_left_open(folder: LocalFolder, root: Path, tmp_path: Path) -> None:
    """Reads, writes and refused calls close all descriptors."""
    folder.put_upload(KEY, b"cat")
    (root / "uploads" / USER / "link").symlink_to(tmp_path)
    before = psutil.Process().num_fds()
    for name in ("cat", "none", "link", "cat/none", "link/none"):
        with suppress(StorageError):
            await folder.download_image(f"uploads/{USER}/{name}", USER, 100)
        with suppress(StorageError):
            await folder.upload_mask(b"mask", f"uploads/{USER}/{name}/0.png")
    assert psutil.Process().num_fds() == before


@given(text=st.text("aA./\\%25eEfFcC:~?# \0\u0301", max_size=30))
@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_image_url_leaves_the_folder(folder: LocalFolder, root: Path, text: str) -> None:
    """For any image_url, with and without the prefix rule, the path stays in the folder."""
    for store in (folder, LocalFolder(root, user_prefix_required=False)):
        for start in ("", f"uploads/{USER}/", f"{root.as_uri()}/", "file://"):
            try:
                key = store.key_of(start + text, USER)
            except StorageError:
                continue
            path = os.path.normpath(os.path.realpath(root / key))
            assert path.startswith(os.path.realpath(root) + os.sep)


async def test_huge_file_is_not_read(folder: LocalFolder, root: Path) -> None:
    """A file of 64 GiB is refused, and at most the limit is held in memory."""
    folder.put_upload(KEY, b"")
    os.truncate(root / KEY, 64 << 30)
    tracemalloc.start()
    try:
        with pytest.raises(ObjectTooLarge):
            await folder.download_image(KEY, USER, 1 << 20)
        assert tracemalloc.get_traced_memory()[1] < 3 << 20
    finally:
        tracemalloc.stop()


async def test_unfinished_file_is_not_an_object(folder: LocalFolder, root: Path) -> None:
    """The unfinished file of a killed write cannot be read, and no object can have such a name."""
    folder.put_upload(KEY, b"cat")
    (root / f"{KEY}.unfinished").write_bytes(b"ca")
    with pytest.raises(ObjectNotFound):
        await folder.download_image(f"{KEY}.unfinished", USER, 100)
    with pytest.raises(ValueError, match="unfinished"):
        folder.put_upload(f"{KEY}.unfinished", b"cat")


async def test_failed_replace_leaves_nothing(folder: LocalFolder, root: Path) -> None:
    """When the final replace fails (a folder has the mask's name), no file is left."""
    (root / "masks" / "0.png").mkdir(parents=True)
    with pytest.raises(StorageUnavailable):
        await folder.upload_mask(b"mask", "masks/0.png")
    assert files_below(root) == []


FULL_DISK = """
import asyncio, resource, signal, sys
from pathlib import Path
from storage import LocalFolder, StorageUnavailable

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
folder = LocalFolder(Path(sys.argv[1]))
try:
    asyncio.run(folder.upload_mask(b"new" * 10_000, "masks/0.png"))
except StorageUnavailable:
    sys.exit(7)
"""

KILLED = FULL_DISK.replace("signal.SIG_IGN", "signal.SIG_DFL")


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_upload_on_a_full_disk_leaves_nothing(folder: LocalFolder, root: Path) -> None:
    """A write that fails half-way raises StorageUnavailable, and leaves only the previous object."""
    folder.put_upload("masks/0.png", b"old")
    assert subprocess.run([sys.executable, "-c", FULL_DISK, str(root)], check=False).returncode == 7
    assert files_below(root) == ["masks/0.png"]
    assert (root / "masks/0.png").read_bytes() == b"old"


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_upload_that_is_killed_leaves_no_object(root: Path) -> None:
    """A process that is killed during a write leaves no object, only an unfinished file."""
    killed = subprocess.run([sys.executable, "-c", KILLED, str(root)], check=False)
    assert killed.returncode < 0
    left = files_below(root)
    assert [Path(name).suffix for name in left] == [".unfinished"]
    assert (root / left[0]).stat().st_size == 10_000
    with pytest.raises(ObjectNotFound):
        asyncio.run(LocalFolder(root, user_prefix_required=False).download_image(left[0], USER, 100_000))


def test_folder_that_is_a_file_is_unavailable(root: Path) -> None:
    """A root that is a file raises StorageUnavailable, and the message does not hold its path."""
    root.write_bytes(b"")
    with pytest.raises(StorageUnavailable) as raised:
        LocalFolder(root)
    assert str(root) not in str(raised.value)


def test_root_may_be_a_link(root: Path, tmp_path: Path) -> None:
    """The root itself may be a link."""
    (tmp_path / "disk").mkdir()
    root.symlink_to(tmp_path / "disk", target_is_directory=True)
    folder = LocalFolder(root)
    folder.put_upload(KEY, b"cat")
    assert asyncio.run(folder.download_image(KEY, USER, 100)) == b"cat"
