"""Access to files below a folder that follows no symbolic link, without a race between check and open.

Each folder on the path is opened relative to its parent's descriptor (openat). On systems without such calls
(Windows) the path is checked for links first; a link created between check and open is followed.
"""

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final
from uuid import uuid4

UNFINISHED_SUFFIX: Final = ".unfinished"
"""Of the names of files that are being written; a killed process leaves such a file."""

_HAS_DIR_FD: Final = os.open in os.supports_dir_fd and hasattr(os, "O_NOFOLLOW")
_NOFOLLOW: Final[int] = getattr(os, "O_NOFOLLOW", 0)
_FOLDER: Final[int] = getattr(os, "O_DIRECTORY", 0) | _NOFOLLOW
# On Linux O_PATH opens a folder that may not be listed. A folder that is synced needs O_RDONLY.
_TRAVERSE: Final[int] = getattr(os, "O_PATH", os.O_RDONLY)
# O_NONBLOCK: a FIFO without a writer would block. O_NOCTTY: no file becomes the controlling terminal.
_READ: Final[int] = (
    os.O_RDONLY
    | _NOFOLLOW
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_NOCTTY", 0)
    | getattr(os, "O_BINARY", 0)
)
_CREATE: Final[int] = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NOFOLLOW | getattr(os, "O_BINARY", 0)


class SymlinkFound(Exception):
    """A folder on the path, or the file itself, is a symbolic link."""


class OpenFolder:
    """A folder below a root, open together with all folders between them; see `open_folder`."""

    def __init__(self, path: Path, descriptors: Sequence[int]) -> None:
        self._path = path
        self._descriptors = descriptors

    @contextmanager
    def open_file(self, name: str) -> Iterator[BinaryIO]:
        """The regular file `name`, for reading.

        Raises SymlinkFound, or OSError: FileNotFoundError for a folder, a FIFO or a device, ENXIO or
        EOPNOTSUPP for a socket. A hard link is a regular file.
        """
        try:
            descriptor = os.open(self._at(name), _READ, dir_fd=self._descriptor)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise SymlinkFound from error
            raise
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise FileNotFoundError(errno.ENOENT, "not a regular file")
            yield file

    def write(self, name: str, data: bytes) -> None:
        """Write `data` to `name` atomically and durably. Raises SymlinkFound, OSError."""
        unfinished = uuid4().hex + UNFINISHED_SUFFIX
        here = self._descriptor
        try:
            with os.fdopen(os.open(self._at(unfinished), _CREATE, 0o666, dir_fd=here), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(self._at(unfinished), self._at(name), src_dir_fd=here, dst_dir_fd=here)
        except BaseException:  # KeyboardInterrupt included
            with suppress(FileNotFoundError):
                self.remove(unfinished)
            raise
        # Up to the root, since any folder on the path may be new. Windows cannot sync a folder.
        for descriptor in reversed(self._descriptors):
            os.fsync(descriptor)

    def remove(self, name: str) -> None:
        """Remove the file `name`. Raises SymlinkFound, OSError."""
        os.unlink(self._at(name), dir_fd=self._descriptor)

    @property
    def _descriptor(self) -> int | None:
        return self._descriptors[-1] if self._descriptors else None

    def _at(self, name: str) -> str:
        return name if self._descriptors else str(_without_links(self._path / name))


@contextmanager
def open_folder(root: Path, names: Sequence[str], *, make: bool = False) -> Iterator[OpenFolder]:
    """The folder `root/names[0]/names[1]/...`, to the end of the block.

    Args:
        root: a real path.
        names: without "", "." and "..".
        make: create missing folders, and open all of them so that they can be synced.

    Raises:
        SymlinkFound: one of `names` is a link.
        OSError: of the system call that failed.
    """
    path = root.joinpath(*names)
    if not _HAS_DIR_FD:
        if make:
            _without_links(path).mkdir(parents=True, exist_ok=True)
        yield OpenFolder(_without_links(path), ())
        return
    with ExitStack() as opened:
        access = os.O_RDONLY if make else _TRAVERSE
        descriptors = [os.open(root, access | os.O_DIRECTORY)]
        opened.callback(os.close, descriptors[0])
        for name in names:
            if make:
                with suppress(FileExistsError):
                    os.mkdir(name, dir_fd=descriptors[-1])
            descriptors.append(_open_subfolder(name, access, descriptors[-1]))
            opened.callback(os.close, descriptors[-1])
        yield OpenFolder(path, descriptors)


def _open_subfolder(name: str, access: int, parent: int) -> int:
    try:
        return os.open(name, access | _FOLDER, dir_fd=parent)
    except OSError as error:
        # A link gives ENOTDIR on Linux and ELOOP elsewhere; a file gives ENOTDIR everywhere.
        if error.errno in {errno.ENOTDIR, errno.ELOOP} and _is_link(name, parent):
            raise SymlinkFound from error
        raise


def _is_link(name: str, parent: int) -> bool:
    return stat.S_ISLNK(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)


def _without_links(path: Path) -> Path:
    # Any link is refused: one that stays inside may lead to another user's upload.
    if Path(os.path.realpath(path)) != path:
        raise SymlinkFound
    return path
