"""What a store of objects does, whichever it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import BinaryIO

DEFAULT_MAX_WAIT_S: Final = 300.0


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One object of a listing.

    Attributes:
        name: relative to the store's `uri`.
        etag: changes with the content; None where the store has none.
    """

    name: str
    size_bytes: int
    etag: str | None = None


def is_utf8(name: str) -> bool:
    """Whether a name, as Python has it from the system, is UTF-8: rows and lists hold no others."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


class Objects(Protocol):
    """The objects below one place: a prefix of a bucket, or a folder.

    Names are relative to `uri`, with "/" between their parts. All methods may be called from several
    threads, and an instance may be pickled or used after a fork. Transient failures are retried.

    Every method may raise a RunError: `StoreUnavailable`, `CredentialsRefused`, `StoreRefused`, `StoreFull`
    or `WrongUsage`.
    """

    @property
    def uri(self) -> str:
        """`s3://bucket/prefix` or an absolute path, without a slash at its end.

        The full URI of an object is `f"{uri}/{name}"`.
        """
        ...

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """The objects whose names begin with `prefix`, fetched while the caller iterates.

        They come in ascending order of the names' UTF-8 bytes, from every store that keeps to S3's order;
        SeaweedFS lists `a/b` before `a.b`. A place that does not exist has none.
        """
        ...

    def read(self, name: str, max_bytes: int | None = None) -> bytes:
        """The whole object.

        Raises:
            PictureError: NOT_FOUND, TOO_LARGE (more than `max_bytes`; no more than that is read),
                FORBIDDEN or REFUSED.
        """
        ...

    def open(self, name: str) -> BinaryIO:
        """A seekable file for a large object, which is read in parts.

        Raises:
            PictureError: NOT_FOUND, FORBIDDEN or REFUSED.
        """
        ...

    def create(self, name: str, data: bytes, content_type: str) -> bool:
        """Store a new object, all of it or nothing.

        Returns:
            False if one of this name exists already, which is then unchanged. After an answer that was
            lost, it may be what this call stored itself.
        """
        ...

    def replace(self, name: str, data: bytes, content_type: str) -> None:
        """Store an object, all of it or nothing; replaces one of the same name."""
        ...

    def upload(self, name: str, path: Path, content_type: str) -> None:
        """`replace` with the content of a local file of any size."""
        ...
