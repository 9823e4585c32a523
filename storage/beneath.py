"""Files beneath a folder, reached without following a link: what was looked at is what is opened.

Each folder on the way is opened by its name in the one above. Where the system has no such calls (Windows),
links are looked for first, and one that is put there in between is followed.
"""

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final
from uuid import uuid4

UNFINISHED: Final = ".unfinished"
"""Ends the names of files that are being written; a killed process leaves such a file behind."""

_BY_DESCRIPTOR: Final = os.open in os.supports_dir_fd and hasattr(os, "O_NOFOLLOW")
_NOFOLLOW: Final[int] = getattr(os, "O_NOFOLLOW", 0)
_FOLDER: Final[int] = getattr(os, "O_DIRECTORY", 0) | _NOFOLLOW
# Linux lets a folder be passed through that may not be listed; only what is synced must be opened for more.
_PASS_THROUGH: Final[int] = getattr(os, "O_PATH", os.O_RDONLY)
# A FIFO without a writer would hold the thread, a terminal would become this process's own.
_READ: Final[int] = (
    os.O_RDONLY
    | _NOFOLLOW
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_NOCTTY", 0)
    | getattr(os, "O_BINARY", 0)
)
_CREATE: Final[int] = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NOFOLLOW | getattr(os, "O_BINARY", 0)


class LinkInTheWay(Exception):
    """A name on the way, or the last one, is a symbolic link."""


class OpenFolder:
    """A folder beneath a root, open together with all that lie between; made by `open_folder`."""

    def __init__(self, path: Path, descriptors: Sequence[int]) -> None:
        self._path = path
        self._descriptors = descriptors

    @contextmanager
    def open_file(self, name: str) -> Iterator[BinaryIO]:
        """The regular file `name`, for reading.

        Raises LinkInTheWay, or OSError: FileNotFoundError for a folder, a FIFO, a device; ENXIO or EOPNOTSUPP
        for a socket. A hard link is the file that it names.
        """
        try:
            descriptor = os.open(self._at(name), _READ, dir_fd=self._descriptor)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise LinkInTheWay from error
            raise
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise FileNotFoundError(errno.ENOENT, "not a regular file")
            yield file

    def write(self, name: str, data: bytes) -> None:
        """Put `data` at `name` at once or not at all, durably. Raises LinkInTheWay, OSError."""
        unfinished = uuid4().hex + UNFINISHED
        here = self._descriptor
        try:
            with os.fdopen(os.open(self._at(unfinished), _CREATE, 0o666, dir_fd=here), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(self._at(unfinished), self._at(name), src_dir_fd=here, dst_dir_fd=here)
        except BaseException:  # a Ctrl-C leaves no litter either
            with suppress(FileNotFoundError):
                self.remove(unfinished)
            raise
        # Up to the root: any folder on the way may be new. Windows has no way to sync a folder.
        for descriptor in reversed(self._descriptors):
            os.fsync(descriptor)

    def remove(self, name: str) -> None:
        """Remove the file `name`. Raises LinkInTheWay, OSError."""
        os.unlink(self._at(name), dir_fd=self._descriptor)

    @property
    def _descriptor(self) -> int | None:
        return self._descriptors[-1] if self._descriptors else None

    def _at(self, name: str) -> str:
        return name if self._descriptors else str(_checked(self._path / name))


@contextmanager
def open_folder(root: Path, names: Sequence[str], *, make: bool = False) -> Iterator[OpenFolder]:
    """The folder `root/names[0]/names[1]/...`, to the end of the block.

    Args:
        root: a real path.
        names: without "", "." and "..".
        make: make what is missing, and open all so that they can be synced.

    Raises:
        LinkInTheWay: one of `names` is a link.
        OSError: as the system says.
    """
    path = root.joinpath(*names)
    if not _BY_DESCRIPTOR:
        if make:
            _checked(path).mkdir(parents=True, exist_ok=True)
        yield OpenFolder(_checked(path), ())
        return
    with ExitStack() as opened:
        access = os.O_RDONLY if make else _PASS_THROUGH
        descriptors = [os.open(root, access | os.O_DIRECTORY)]
        opened.callback(os.close, descriptors[0])
        for name in names:
            if make:
                with suppress(FileExistsError):
                    os.mkdir(name, dir_fd=descriptors[-1])
            descriptors.append(_enter(name, access, descriptors[-1]))
            opened.callback(os.close, descriptors[-1])
        yield OpenFolder(path, descriptors)


def _enter(name: str, access: int, above: int) -> int:
    try:
        return os.open(name, access | _FOLDER, dir_fd=above)
    except OSError as error:
        # For a link Linux says ENOTDIR, others ELOOP; for a file all say ENOTDIR.
        if error.errno in {errno.ENOTDIR, errno.ELOOP} and _is_link(name, above):
            raise LinkInTheWay from error
        raise


def _is_link(name: str, above: int) -> bool:
    return stat.S_ISLNK(os.stat(name, dir_fd=above, follow_symlinks=False).st_mode)


def _checked(path: Path) -> Path:
    # Any link, not only one that leads outside: a link to another user's upload is as bad.
    if Path(os.path.realpath(path)) != path:
        raise LinkInTheWay
    return path
