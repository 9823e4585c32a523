"""The pictures that `--images` names: those of a bucket's prefix, of a folder, or of a manifest."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Final, Literal

from bulk.errors import NoPictures, WrongUsage
from bulk.manifests import ENDINGS, SeenUris, is_manifest, manifest_uris
from bulk.objects import DEFAULT_MAX_WAIT_S, is_utf8, open_objects

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bulk.objects import Objects

PICTURE_ENDINGS: Final = ("png", "jpg", "jpeg", "webp")
"""Of names that count as pictures, in any case; names without an ending count too."""

_RUN_ID: Final = re.compile(r"[0-9a-f]{12}")
_RUN_FILE: Final = "run.json"
_RUN_PARTS: Final = frozenset(
    {"masks", "rows", "plan", _RUN_FILE, "plan.json", "coco.json", "summary.json", "report.html"}
)
"""Of a run's folder. Only such names cost a request: is there a run.json?"""
_BATCH_ROWS: Final = 8192


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture of a source.

    Attributes:
        image: its full URI, `s3://bucket/key` or an absolute path.
        size_bytes: as listed; None in a manifest.
        etag: as listed; None in a manifest and in a folder.
    """

    image: str
    size_bytes: int | None = None
    etag: str | None = None


@dataclass(slots=True)
class Skipped:
    """How many objects of a source are no pictures of it, by reason; counted while it is listed."""

    other_endings: int = 0
    hidden: int = 0
    of_runs: int = 0
    not_utf8: int = 0
    duplicates: int = 0

    def sentences(self) -> list[str]:
        """One for each reason with objects, such as "12 objects have other endings"."""
        counted = (
            (self.other_endings, "object has another ending", "objects have other endings"),
            (self.hidden, "file is hidden", "files are hidden"),
            (self.of_runs, "file belongs to a run", "files belong to runs"),
            (self.not_utf8, "file has a name that is not UTF-8", "files have names that are not UTF-8"),
            (self.duplicates, "row names a picture again", "rows name a picture again"),
        )
        return [f"{count} {one if count == 1 else many}" for count, one, many in counted if count]


@dataclass(frozen=True, slots=True)
class Source:
    """What `--images` names.

    Attributes:
        uri: the same for each way to write it: `s3://bucket/prefix` or an absolute path.
    """

    kind: Literal["prefix", "folder", "manifest"]
    uri: str


def source_of(images: str) -> Source:
    """The source that `--images` names. Looks at the local file system, and asks no store.

    Raises:
        WrongUsage: it names no bucket, no folder that exists and no manifest.
    """
    uri = open_objects(images).uri
    if images.startswith("s3://"):
        return Source("manifest" if is_manifest(images) else "prefix", uri)
    # Those of pathlib raise for a name that is too long, or in a closed folder.
    if os.path.isdir(uri):  # noqa: PTH112
        return Source("folder", uri)
    if not os.path.isfile(uri):  # noqa: PTH113
        raise WrongUsage(f"{images} cannot be found: name a folder, s3://bucket/prefix, or a manifest")
    if not is_manifest(uri):
        endings = " or ".join(ENDINGS)
        raise WrongUsage(f"{images} is a file, but no manifest, which ends in {endings}; name its folder")
    return Source("manifest", uri)


def list_pictures(
    images: str,
    *,
    skipped: Skipped | None = None,
    max_wait_s: float = DEFAULT_MAX_WAIT_S,
) -> Iterator[Picture]:
    """The pictures of a source, fetched while the caller iterates.

    In a prefix or a folder these are the objects whose names end in .png, .jpg, .jpeg or .webp, or have no
    ending. Hidden files and folders of a folder are left out, and so are the files of runs: those in a folder
    whose name is a run id and which holds a run.json. In a manifest each row is a picture; a picture that is
    named again is left out.

    Args:
        images: see `source_of`.
        skipped: counts what is left out; complete when the iteration has ended.
        max_wait_s: how long transient failures of one request to the store are retried.

    Raises:
        WrongUsage: see `source_of`; before the iteration. In it, the bucket or the manifest does not exist.
        NoPictures: at the end of the iteration, if there was none.
        BadManifest: a row or the file cannot be read.
        RunError: the store failed.
    """
    source = source_of(images)
    skipped = Skipped() if skipped is None else skipped
    if source.kind == "manifest":
        return _at_least_one(_listed(source, skipped, max_wait_s), source, skipped)
    objects = open_objects(source.uri, max_wait_s)
    return _at_least_one(_stored(objects, _Runs(objects), source, skipped), source, skipped)


def _at_least_one(pictures: Iterator[Picture], source: Source, skipped: Skipped) -> Iterator[Picture]:
    none = True
    for picture in pictures:
        none = False
        yield picture
    if none:
        raise NoPictures(_nothing_found(source, skipped))


def _nothing_found(source: Source, skipped: Skipped) -> str:
    if source.kind == "manifest":
        return f"the manifest {source.uri} has no row"
    endings = ", ".join(f".{ending}" for ending in PICTURE_ENDINGS)
    found = "; ".join(skipped.sentences()) or "nothing is stored there"
    return f"no picture in {source.uri}/: looked for names that end in {endings}, or have no ending ({found})"


def _listed(source: Source, skipped: Skipped, max_wait_s: float) -> Iterator[Picture]:
    """The pictures of a manifest."""
    seen = SeenUris()
    uris = manifest_uris(source.uri, max_wait_s)
    while batch := [*islice(uris, _BATCH_ROWS)]:
        is_new = seen.add(batch)
        skipped.duplicates += len(batch) - int(is_new.sum())
        yield from (Picture(uri) for uri, new in zip(batch, is_new, strict=True) if new)


def _stored(objects: Objects, runs: _Runs, source: Source, skipped: Skipped) -> Iterator[Picture]:
    """The pictures of a prefix or a folder."""
    root = objects.uri.rstrip("/") if source.kind == "folder" else objects.uri
    for found in objects.list():
        if source.kind == "folder" and not is_utf8(found.name):
            skipped.not_utf8 += 1
        elif source.kind == "folder" and _is_hidden(found.name):
            skipped.hidden += 1
        elif runs.hold(found.name):
            skipped.of_runs += 1
        elif not _has_picture_name(found.name):
            skipped.other_endings += 1
        else:
            yield Picture(f"{root}/{found.name}", found.size_bytes, found.etag)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or "/." in name


def _has_picture_name(name: str) -> bool:
    _, dot, ending = name.rpartition("/")[2].rpartition(".")
    return not dot or ending.lower() in PICTURE_ENDINGS


class _Runs:
    """The runs inside a source, of any `--out`: their masks are no pictures of it."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._known: dict[str, bool] = {}

    def hold(self, name: str) -> bool:
        """Whether an object of the source belongs to a run."""
        parts = name.split("/")
        return any(
            _RUN_ID.fullmatch(part) and inside in _RUN_PARTS and self._is_run("/".join(parts[: place + 1]))
            for place, (part, inside) in enumerate(pairwise(parts))
        )

    def _is_run(self, folder: str) -> bool:
        if folder not in self._known:
            file = f"{folder}/{_RUN_FILE}"
            self._known[folder] = any(found.name == file for found in islice(self._objects.list(file), 1))
        return self._known[folder]
