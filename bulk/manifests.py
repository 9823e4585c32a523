"""Manifests: lists of pictures in a CSV or Parquet file with a column `image`, read in batches."""

from __future__ import annotations

import csv
import hashlib
import os
import posixpath
import re
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bulk.errors import BadManifest, PictureError, StoreRefused, WrongUsage
from bulk.objects import open_uri

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import BinaryIO

    from numpy.typing import NDArray

ENDINGS: Final = (".csv", ".parquet")
COLUMN: Final = "image"

_MAX_LINE_BYTES: Final = 1 << 20
_BUFFER_BYTES: Final = 8 << 20
_BATCH_ROWS: Final = 8192
_BUCKET: Final = re.compile(r"[A-Za-z0-9._-]{1,255}|arn:.*")
_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def is_manifest(uri: str) -> bool:
    """Whether a place is a manifest by its name; a bucket, such as `s3://photos.csv`, is none."""
    name = uri.removeprefix("s3://").partition("/")[2] if uri.startswith("s3://") else uri
    return name.lower().endswith(ENDINGS)


def manifest_uris(manifest: str, max_wait_s: float) -> Iterator[str]:
    """The full URI of each row's picture, in the manifest's order, with its duplicates.

    A row names `s3://bucket/key`, an absolute path, or a name relative to the manifest's folder. Any name is
    a picture, whatever its ending.

    Args:
        manifest: `s3://bucket/key` or an absolute path, ending in .csv or .parquet.
        max_wait_s: how long transient failures of the store are retried.

    Raises:
        BadManifest: it cannot be read, has no column `image`, or has a row without a name that can be used.
        WrongUsage: it does not exist.
        RunError: the store failed.
    """
    rows = _parquet_rows if manifest.lower().endswith(".parquet") else _csv_rows
    with _opened(manifest, max_wait_s) as file:
        for place, name in rows(file, manifest):
            if not name.strip():
                raise BadManifest(f"{manifest}, {place}: the column {COLUMN} is empty")
            try:
                yield _full_uri(name, manifest)
            except ValueError as error:
                raise BadManifest(f"{manifest}, {place}: {error}") from None


class SeenUris:
    """The URIs of the manifest so far, as 64-bit digests: 8 bytes each, 16 while they are merged.

    Two of n different URIs are taken for one with a probability of n^2 / 2^65: 3e-6 for ten million.
    """

    def __init__(self) -> None:
        # Sorted, and each at least twice as long as the next.
        self._runs: list[NDArray[np.uint64]] = []

    def add(self, uris: Sequence[str]) -> NDArray[np.bool_]:
        """Which of `uris` are seen for the first time, (N,) bool."""
        digests = np.frombuffer(b"".join(map(_digest, uris)), np.uint64)
        is_new = np.zeros(len(digests), np.bool_)
        is_new[np.unique(digests, return_index=True)[1]] = True
        for run in self._runs:
            places = np.minimum(np.searchsorted(run, digests), len(run) - 1)
            is_new &= run[places] != digests
        self._keep(np.sort(digests[is_new]))
        return is_new

    def _keep(self, run: NDArray[np.uint64]) -> None:
        if not len(run):
            return
        while self._runs and len(self._runs[-1]) < 2 * len(run):
            run = np.sort(np.concatenate((self._runs.pop(), run)), kind="stable")
        self._runs.append(run)


def _digest(uri: str) -> bytes:
    return hashlib.blake2b(uri.encode(), digest_size=8).digest()


def _opened(manifest: str, max_wait_s: float) -> BinaryIO:
    try:
        return open_uri(manifest, max_wait_s)
    except PictureError as error:
        if error.code == "NOT_FOUND":
            raise WrongUsage(f"the manifest {manifest} does not exist: {error.message}") from None
        raise StoreRefused(f"the manifest {manifest} cannot be read: {error.message}") from None


def _csv_rows(file: BinaryIO, manifest: str) -> Iterator[tuple[str, str]]:
    """The place and the name of each row. Empty lines may only end the file."""
    reader = csv.reader(_text_lines(file, manifest), strict=True)
    line = 1
    try:
        column = _column_of_header(next(reader, []), manifest)
        empty_line = 0
        line = reader.line_num + 1
        for row in reader:
            if not row:
                empty_line = empty_line or line
            elif empty_line:
                yield f"line {empty_line}", ""
            else:
                yield f"line {line}", row[column] if column < len(row) else ""
            line = reader.line_num + 1
    except csv.Error as error:
        raise BadManifest(f"{manifest}, line {line}: is not CSV: {error}") from None


def _column_of_header(header: list[str], manifest: str) -> int:
    names = [name.strip() for name in header]
    if COLUMN not in names:
        raise BadManifest(_no_column(manifest, names))
    return names.index(COLUMN)


def _no_column(manifest: str, names: Sequence[str]) -> str:
    found = ", ".join(repr(name[:40]) for name in names[:10]) or "none"
    return f"{manifest} has no column {COLUMN!r} (its columns: {found})"


def _text_lines(file: BinaryIO, manifest: str) -> Iterator[str]:
    number = 0
    while line := file.readline(_MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > _MAX_LINE_BYTES:
            raise BadManifest(f"{manifest}, line {number}: has more than {_MAX_LINE_BYTES} bytes")
        try:
            # Excel writes a byte order mark.
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise BadManifest(f"{manifest}, line {number}: is not UTF-8") from None


def _parquet_rows(file: BinaryIO, manifest: str) -> Iterator[tuple[str, str]]:
    """The place and the name of each row; of the file, only the column is read."""
    try:
        # With pre_buffer the column of a whole row group would be in memory.
        parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER_BYTES)
        _check_column(parquet.schema_arrow, manifest)
        row = 0
        for batch in parquet.iter_batches(_BATCH_ROWS, columns=[COLUMN], use_threads=False):
            for name in _names(batch, f"{manifest}, rows {row + 1} to {row + batch.num_rows}"):
                row += 1
                yield f"row {row}", name or ""
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0][:200]
        raise BadManifest(f"{manifest} cannot be read as Parquet: {reason}") from None


def _check_column(schema: pa.Schema, manifest: str) -> None:
    if schema.get_field_index(COLUMN) < 0:
        raise BadManifest(_no_column(manifest, schema.names))
    kind = schema.field(COLUMN).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    # Some writers do not mark texts as such.
    texts = (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.null())
    if kind not in texts:
        raise BadManifest(f"{manifest}: the column {COLUMN} holds {kind}, not names")


def _names(batch: pa.RecordBatch, place: str) -> list[str | None]:
    try:
        names: Any = batch.column(0).cast(pa.string()).to_pylist()
    except (pa.ArrowInvalid, UnicodeDecodeError):
        raise BadManifest(f"{place}: a name is not UTF-8") from None
    return list(names)


def _full_uri(name: str, manifest: str) -> str:
    """The full URI of a row's name. Raises ValueError with a sentence."""
    if name.startswith("s3://"):
        bucket, _, key = name.removeprefix("s3://").partition("/")
        if not bucket or not key:
            raise ValueError("names no object: write s3://bucket/key")
        if not _BUCKET.fullmatch(bucket):
            raise ValueError(f"{bucket!r} cannot be the name of a bucket")
        return name
    if _SCHEME.match(name):
        raise ValueError("is neither s3://bucket/key nor a path, so it cannot be read")
    if not manifest.startswith("s3://"):
        return os.path.normpath(os.path.join(os.path.dirname(manifest), name))  # noqa: PTH118, PTH120 - text
    if name.startswith("/"):
        raise ValueError("is a path of a machine, which a manifest in a bucket cannot name")
    return _beside(name, manifest)


def _beside(name: str, manifest: str) -> str:
    """A relative name in a bucket, without the parts "." and ".."."""
    bucket, _, key = manifest.removeprefix("s3://").partition("/")
    folder = posixpath.dirname(key)
    if {".", ".."} & set(name.split("/")):
        name = posixpath.normpath(posixpath.join(folder, name))
        if name.startswith(".."):
            raise ValueError("leaves the bucket")
        return f"s3://{bucket}/{name}"
    return f"s3://{bucket}/{folder}/{name}" if folder else f"s3://{bucket}/{name}"
