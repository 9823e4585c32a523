"""Objects in a folder of a file system that all workers share."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final
from uuid import uuid4

from bulk.errors import PictureError, RunError, StoreFull, StoreRefused, StoreUnavailable, WrongUsage
from bulk.objects.base import StoredObject

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import BinaryIO

_UNFINISHED_PREFIX: Final = ".sam3-"
_UNFINISHED_SUFFIX: Final = ".unfinished"
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})
_MISPLACED: Final = frozenset({errno.EEXIST, errno.ENOTDIR, errno.EISDIR})
_REFUSED: Final = frozenset({errno.EACCES, errno.EPERM})
# The errors of an open when no file has this name, or none can have it.
_ABSENT: Final = frozenset(
    {
        *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP),
        # A socket, and a device without a driver.
        *(errno.ENXIO, errno.EOPNOTSUPP, errno.ENODEV),
    }
)
# Some network file systems cannot synchronise a folder.
_NO_SYNCHRONISATION: Final = frozenset({errno.EINVAL, errno.ENOTSUP})
_NO_HARD_LINKS: Final = frozenset({errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK})


@dataclass(frozen=True)
class FolderObjects:
    """Objects as files below the folder `uri`, which need not exist. See `Objects`.

    Symbolic links are followed. A folder that is reached through several of them is listed once.
    """

    uri: str

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """See Objects. Lists one folder at a time."""
        folder, slash, start = prefix.rpartition("/")
        root = self._path(folder) if slash else self.uri
        yield from _Walk(self.uri).files(root, f"{folder}{slash}", start)

    def read(self, name: str, max_bytes: int | None = None) -> bytes:
        """See Objects. Only regular files are objects."""
        with self.open(name) as file, self._errors_of_reads():
            data = file.read(-1 if max_bytes is None else max_bytes + 1)
        if max_bytes is not None and len(data) > max_bytes:
            raise PictureError("TOO_LARGE", f"the file has more than {max_bytes} bytes")
        return data

    def open(self, name: str) -> BinaryIO:
        """See Objects. Only regular files are objects."""
        with self._errors_of_reads():
            # Without O_NONBLOCK the open of a FIFO would wait for a writer.
            descriptor = os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                raise PictureError("NOT_FOUND", "no file is stored there")
            return os.fdopen(descriptor, "rb")

    def create(self, name: str, data: bytes, content_type: str) -> bool:
        """See Objects. A hard link gives the complete file its name, which fails if the name is taken."""
        del content_type  # files have none
        path = self._path(name)
        if os.path.lexists(path):
            return False
        with self._errors_of_writes(), _unfinished(path, lambda file: _write(file, data)) as unfinished:
            try:
                os.link(unfinished, path)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno in _NO_HARD_LINKS:
                    raise StoreRefused(
                        f"the file system of {self.uri} has no hard links, which new files need; "
                        "choose another folder, or a bucket"
                    ) from None
                raise
        return True

    def replace(self, name: str, data: bytes, content_type: str) -> None:
        """See Objects."""
        del content_type
        path = self._path(name)
        with self._errors_of_writes(), _unfinished(path, lambda file: _write(file, data)) as unfinished:
            Path(unfinished).replace(path)

    def upload(self, name: str, path: Path, content_type: str) -> None:
        """See Objects."""
        del content_type
        target = self._path(name)

        def copy(file: BinaryIO) -> None:
            with path.open("rb") as source:
                shutil.copyfileobj(source, file, 1 << 20)

        with self._errors_of_writes(), _unfinished(target, copy) as unfinished:
            Path(unfinished).replace(target)

    def _path(self, name: str) -> str:
        _check_name(name)
        return f"{self.uri.rstrip('/')}/{name}"

    @contextmanager
    def _errors_of_reads(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in _ABSENT:
                raise PictureError("NOT_FOUND", "no file is stored there") from None
            if error.errno in _REFUSED:
                raise PictureError("FORBIDDEN", "this user may not read the file") from None
            raise _unavailable(self.uri, error) from None

    @contextmanager
    def _errors_of_writes(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in _FULL:
                raise StoreFull(
                    f"{self.uri} is full or read-only ({os.strerror(error.errno or 0)}); make space there, "
                    "and start the same command again"
                ) from None
            if error.errno in _REFUSED:
                raise StoreRefused(f"this user may not write to {self.uri}") from None
            if error.errno in _MISPLACED:
                raise StoreRefused(
                    f"in {self.uri} a file lies where a folder is needed, or a folder where a file is"
                ) from None
            raise _unavailable(self.uri, error) from None


def _unavailable(uri: str, error: OSError) -> RunError:
    return StoreUnavailable(f"{uri} cannot be used: {error.strerror or type(error).__name__}")


def _check_name(name: str) -> None:
    """Raises WrongUsage for a name that leaves the folder, or that no file can have."""
    if any(part in {"", ".", ".."} for part in name.split("/")) or "\0" in name:
        raise WrongUsage("a name in a folder is a relative path without '.', '..' or empty parts")


@contextmanager
def _unfinished(path: str, write: Callable[[BinaryIO], None]) -> Iterator[str]:
    """A complete file beside `path`, under a name that is never listed; gone after the block.

    After the block the folder is synchronised, so that the new name outlives a power failure.
    """
    folder = Path(path).parent
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{_UNFINISHED_PREFIX}{uuid4().hex}{_UNFINISHED_SUFFIX}"
    try:
        with unfinished.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        yield str(unfinished)
    finally:
        with suppress(FileNotFoundError):
            unfinished.unlink()
    _synchronise(folder)


def _write(file: BinaryIO, data: bytes) -> None:
    file.write(data)


def _synchronise(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNCHRONISATION:
            raise
    finally:
        os.close(descriptor)


class _Walk:
    """Lists the files below a folder, each real folder once."""

    def __init__(self, root: str) -> None:
        self._root = os.path.realpath(root)
        self._listed: set[tuple[int, int]] = set()
        self._is_new(self._root)

    def files(self, folder: str, prefix: str, start: str) -> Iterator[StoredObject]:
        """The files below `folder`, named from `prefix` on, of its entries that begin with `start`."""
        # A stack of folders, each with its entries that are left; a folder may lie thousands deep.
        stack = [_Opened(folder, prefix, start=start, linked=False)]
        while stack:
            opened = stack[-1]
            if not opened.entries:
                stack.pop()
                continue
            name = opened.entries.pop()
            path = f"{opened.path}/{name.removesuffix('/')}"
            if name.endswith("/"):
                is_link = Path(path).is_symlink()
                if self._enters(path, is_link=is_link, linked=opened.linked):
                    stack.append(_Opened(path, opened.prefix + name, linked=opened.linked or is_link))
            else:
                with suppress(FileNotFoundError):  # removed meanwhile
                    yield StoredObject(opened.prefix + name, _size_bytes(path))

    def _enters(self, path: str, *, is_link: bool, linked: bool) -> bool:
        """Whether a folder is listed here.

        A link to a folder inside the root is not followed: its files are listed under their own names.
        """
        if is_link and Path(os.path.realpath(path)).is_relative_to(self._root):
            return False
        return self._is_new(path) if is_link or linked else True

    def _is_new(self, path: str) -> bool:
        try:
            status = Path(path).stat()
        except OSError:  # listing it says why
            return True
        identity = (status.st_dev, status.st_ino)
        is_new = identity not in self._listed
        self._listed.add(identity)
        return is_new


class _Opened:
    """A folder that is being listed.

    Attributes:
        prefix: of the names of its entries.
        linked: it was reached through a symbolic link.
        entries: those that are left, the next one last; folders end with a slash.
    """

    def __init__(self, path: str, prefix: str, *, start: str = "", linked: bool) -> None:
        self.path = path
        self.prefix = prefix
        self.linked = linked
        self.entries = _entries(path, start)


def _entries(folder: str, start: str) -> list[str]:
    """The names of files and folders that begin with `start`, in descending order of whole names."""
    try:
        with os.scandir(folder) as entries:
            # Names alone: a folder may have millions of files.
            names = [name for entry in entries if (name := _listed_name(entry)).startswith(start) and name]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except PermissionError:
        raise StoreRefused(f"this user may not list the folder {folder}") from None
    except OSError as error:
        raise _unavailable(folder, error) from None
    names.sort(key=os.fsencode, reverse=True)
    return names


def _listed_name(entry: os.DirEntry[str]) -> str:
    """The name, with a slash if it is a folder; empty for what is neither a file nor a folder."""
    if entry.name.startswith(_UNFINISHED_PREFIX) and entry.name.endswith(_UNFINISHED_SUFFIX):
        return ""
    try:
        if entry.is_dir():
            return f"{entry.name}/"
        return entry.name if entry.is_file() else ""
    except PermissionError:  # a link to what this user may not see
        return entry.name
    except OSError:  # a link to itself
        return ""


def _size_bytes(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except PermissionError:
        return 0
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _unavailable(path, error) from None
