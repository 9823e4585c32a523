"""What only the folder does."""

import asyncio
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

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
)

pytestmark = pytest.mark.anyio

USER = "user-1"
KEY = f"uploads/{USER}/cat"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


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
    """A file URL that names a host, be it this one, is forbidden."""
    with pytest.raises(ImageUrlForbidden):
        folder.key_of(f"{root.as_uri().replace('file://', f'file://{host}')}/{KEY}", USER)


def test_file_url_of_a_neighbour_folder_is_forbidden(folder: LocalFolder, root: Path) -> None:
    """A folder whose name only starts like ours is another folder."""
    with pytest.raises(ImageUrlForbidden):
        folder.key_of(f"{root.as_uri()}-2/{KEY}", USER)


def test_scheme_may_be_in_capitals(folder: LocalFolder, root: Path) -> None:
    """URL schemes have no case."""
    assert folder.key_of(f"{root.as_uri()}/{KEY}".replace("file", "FILE"), USER) == KEY


async def test_link_out_of_the_folder_is_forbidden(folder: LocalFolder, root: Path, tmp_path: Path) -> None:
    """Neither a linked file nor a file in a linked folder is read."""
    (tmp_path / "secret").write_bytes(b"secret")
    uploads = root / "uploads" / USER
    uploads.mkdir(parents=True)
    (uploads / "file").symlink_to(tmp_path / "secret")
    (uploads / "folder").symlink_to(tmp_path, target_is_directory=True)
    for name in ("file", "folder/secret"):
        with pytest.raises(ImageUrlForbidden):
            await folder.download_image(f"uploads/{USER}/{name}", USER, 100)


async def test_link_to_another_user_is_forbidden(folder: LocalFolder, root: Path) -> None:
    """A link that stays in the folder does not lead to another user's upload either."""
    folder.put_upload("uploads/user-2/cat", b"secret")
    (root / "uploads" / USER).symlink_to(root / "uploads" / "user-2", target_is_directory=True)
    with pytest.raises(ImageUrlForbidden):
        await folder.download_image(KEY, USER, 100)


async def test_link_to_itself_is_refused(folder: LocalFolder, root: Path) -> None:
    """A link that leads nowhere ends in one of our errors."""
    (root / "uploads").symlink_to(root / "uploads")
    with pytest.raises((ImageUrlForbidden, ObjectNotFound)):
        await folder.download_image(KEY, USER, 100)


async def test_mask_does_not_follow_a_link(folder: LocalFolder, root: Path, tmp_path: Path) -> None:
    """A mask is not written through a link out of the folder."""
    (tmp_path / "outside").mkdir()
    (root / "masks").symlink_to(tmp_path / "outside", target_is_directory=True)
    with pytest.raises(StorageUnavailable):
        await folder.upload_mask(b"mask", "masks/user-1/task/0.png")
    assert not list((tmp_path / "outside").iterdir())


@given(text=st.text("aA./\\%25eEfFcC:~?# \0\u0301", max_size=30))
@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_image_url_leaves_the_folder(folder: LocalFolder, root: Path, text: str) -> None:
    """Whatever the image_url, with the prefix rule or without, its path stays in the folder."""
    for store in (folder, LocalFolder(root, user_prefix_required=False)):
        for start in ("", f"uploads/{USER}/", f"{root.as_uri()}/", "file://"):
            try:
                key = store.key_of(start + text, USER)
            except StorageError:
                continue
            path = os.path.normpath(os.path.realpath(root / key))
            assert path.startswith(os.path.realpath(root) + os.sep)


async def test_huge_file_is_not_read(folder: LocalFolder, root: Path) -> None:
    """A file of 64 GiB is refused with the memory of the cap."""
    folder.put_upload(KEY, b"")
    os.truncate(root / KEY, 64 << 30)
    tracemalloc.start()
    try:
        with pytest.raises(ObjectTooLarge):
            await folder.download_image(KEY, USER, 1 << 20)
        assert tracemalloc.get_traced_memory()[1] < 3 << 20
    finally:
        tracemalloc.stop()


async def test_unfinished_file_is_no_object(folder: LocalFolder, root: Path) -> None:
    """What a killed write leaves behind cannot be read, nor its name be written."""
    folder.put_upload(KEY, b"cat")
    (root / f"{KEY}.unfinished").write_bytes(b"half a c")
    with pytest.raises(ObjectNotFound):
        await folder.download_image(f"{KEY}.unfinished", USER, 100)
    with pytest.raises(ValueError, match="unfinished"):
        folder.put_upload(f"{KEY}.unfinished", b"cat")


async def test_failed_replace_leaves_nothing(folder: LocalFolder, root: Path) -> None:
    """When the last step fails, here on a folder of the mask's name, no part of the mask stays."""
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
def test_upload_that_meets_a_full_disk_leaves_nothing(folder: LocalFolder, root: Path) -> None:
    """A write that fails half-way is StorageUnavailable, and leaves the old object and no other file."""
    folder.put_upload("masks/0.png", b"old")
    assert subprocess.run([sys.executable, "-c", FULL_DISK, str(root)], check=False).returncode == 7
    assert files_below(root) == ["masks/0.png"]
    assert (root / "masks/0.png").read_bytes() == b"old"


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_upload_that_is_killed_leaves_no_object(root: Path) -> None:
    """A process that is killed half-way through a write leaves no object, only an unfinished file."""
    killed = subprocess.run([sys.executable, "-c", KILLED, str(root)], check=False)
    assert killed.returncode < 0
    left = files_below(root)
    assert [Path(name).suffix for name in left] == [".unfinished"]
    assert (root / left[0]).stat().st_size == 10_000
    with pytest.raises(ObjectNotFound):
        asyncio.run(LocalFolder(root, user_prefix_required=False).download_image(left[0], USER, 100_000))


def test_folder_that_is_a_file_is_unavailable(root: Path) -> None:
    """A root that cannot be a folder stops the start, and the message names no path."""
    root.write_bytes(b"")
    with pytest.raises(StorageUnavailable) as raised:
        LocalFolder(root)
    assert str(root) not in str(raised.value)


def test_root_may_be_a_link(root: Path, tmp_path: Path) -> None:
    """The folder itself may be reached through a link, as an operator likes it."""
    (tmp_path / "disk").mkdir()
    root.symlink_to(tmp_path / "disk", target_is_directory=True)
    folder = LocalFolder(root)
    folder.put_upload(KEY, b"cat")
    assert asyncio.run(folder.download_image(KEY, USER, 100)) == b"cat"
