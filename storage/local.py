"""Images and masks in a folder: the embedded default, for one host and for development."""

import asyncio
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from storage.errors import (
    ImageUrlForbidden,
    ObjectNotFound,
    ObjectTooLarge,
    StorageError,
    StorageUnavailable,
)
from storage.keys import answer_key, checked_key, image_key, is_mask_url, percent_decoded
from storage.nofollow import UNFINISHED_SUFFIX, SymlinkFound, open_folder

# The errors of an open when the folder has no object of that name, or cannot have one.
_ABSENT: Final = frozenset(
    {
        *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EINVAL),
        # A socket (on Linux and macOS), and a device without a driver.
        *(errno.ENXIO, errno.EOPNOTSUPP, errno.ENODEV),
    }
)


class LocalFolder:
    """An ObjectStore in the folder `root`, which is created when it is missing.

    `image_url` is a bare key or a `file://` URL inside the folder; mask URLs are `file://` URLs.
    Raises StorageUnavailable when the folder cannot be created.
    """

    def __init__(self, root: Path, *, user_prefix_required: bool = True) -> None:
        with _os_errors():
            root.mkdir(parents=True, exist_ok=True)
        self._root = Path(os.path.realpath(root))
        # As text ("/srv/s3/", on Windows "/C:/srv/s3/"): a URL is checked without access to the file system.
        self._url_path = percent_decoded(self._root.as_uri().removeprefix("file://").rstrip("/") + "/")
        self._user_prefix_required = user_prefix_required

    def key_of(self, image_url: str, user_id: str) -> str:
        """See ObjectStore."""
        return image_key(
            image_url,
            user_id,
            key_in_url=self._key_in_url,
            user_prefix_required=self._user_prefix_required,
        )

    async def download_image(self, image_url: str, user_id: str, max_bytes: int) -> bytes:
        """See ObjectStore. A symbolic link anywhere below the folder raises ImageUrlForbidden.

        A FIFO, a socket or a device raises ObjectNotFound at once: only regular files are images.
        """
        return await asyncio.to_thread(self._read, self.key_of(image_url, user_id), max_bytes)

    async def upload_mask(self, mask: bytes, key: str) -> str:
        """See ObjectStore."""
        return await asyncio.to_thread(self._write, key, mask)

    async def download_answer(self, answer_url: str, user_id: str, task_id: str, max_bytes: int) -> bytes:
        """See ObjectStore."""
        key = answer_key(answer_url, user_id, task_id, key_in_url=self._key_in_url)
        return await asyncio.to_thread(self._read, key, max_bytes)

    async def delete_mask(self, key: str) -> None:
        """See ObjectStore."""
        await asyncio.to_thread(self._delete, key)

    def holds_mask(self, mask_url: str, user_id: str, task_id: str) -> bool:
        """See ObjectStore."""
        return is_mask_url(mask_url, user_id, task_id, key_in_url=self._key_in_url)

    def put_upload(self, key: str, data: bytes) -> None:
        """Store an image at `key`, as the Edge does. Blocks; raises the errors of `upload_mask`."""
        self._write(key, data)

    async def check(self) -> list[str]:
        """See ObjectStore; the constructor has created the folder."""
        return []

    async def close(self) -> None:
        """See ObjectStore; there is nothing to close."""

    def describe(self) -> str:
        """See ObjectStore."""
        return f"folder {self._root} (embedded storage)"

    def _key_in_url(self, image_url: str) -> str:
        scheme, _, rest = image_url.partition("://")
        if scheme.lower() != "file":
            raise ImageUrlForbidden("image_url is not in the storage folder")
        if "?" in rest or "#" in rest:
            raise ValueError("has a query or a fragment")
        path = percent_decoded(rest)
        # A host, "localhost" included, comes before the first slash and fails here.
        if not path.startswith(self._url_path):
            raise ImageUrlForbidden("image_url is not in the storage folder")
        return path.removeprefix(self._url_path)

    def _read(self, key: str, max_bytes: int) -> bytes:
        *folders, name = key.split("/")
        if name.endswith(UNFINISHED_SUFFIX):
            raise ObjectNotFound("no image is stored there")
        link = ImageUrlForbidden("image_url is not in the storage folder")
        with (
            _os_errors(absent=_ABSENT, link=link),
            open_folder(self._root, folders) as folder,
            folder.open_file(name) as file,
        ):
            data = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise ObjectTooLarge(max_bytes)
        return data

    def _write(self, key: str, data: bytes) -> str:
        *folders, name = checked_key(key).split("/")
        if name.endswith(UNFINISHED_SUFFIX):
            raise ValueError(f"a key cannot end with {UNFINISHED_SUFFIX}")
        with _os_errors(), open_folder(self._root, folders, make=True) as folder:
            folder.write(name, data)
        return self._root.joinpath(*folders, name).as_uri()

    def _delete(self, key: str) -> None:
        *folders, name = checked_key(key).split("/")
        with _os_errors(), suppress(FileNotFoundError), open_folder(self._root, folders) as folder:
            folder.remove(name)


@contextmanager
def _os_errors(*, absent: frozenset[int] = frozenset(), link: StorageError | None = None) -> Iterator[None]:
    """Convert an OSError, whose text holds a path, to a StorageError, whose text does not."""
    try:
        yield
    except SymlinkFound as error:
        raise (link or StorageUnavailable("the object's path holds a symbolic link")) from error
    except OSError as error:
        if error.errno in absent:
            raise ObjectNotFound("no image is stored there") from error
        raise StorageUnavailable(f"the storage folder failed: {os.strerror(error.errno or 0)}") from error
