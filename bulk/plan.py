"""The list of a run's pictures, made once, before the first is segmented.

A shard is a number. Its pictures are a part of one file of `plan/`, its results are `rows/<shard>.parquet`.
So a shard is done when its rows exist, whoever wrote them, and no picture is in two shards.
"""

from __future__ import annotations

import io
import json
import re
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq

from bulk.errors import OtherRun, PictureError, StoreRefused
from bulk.sources import Picture

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from bulk.objects import Objects

PLAN = "plan.json"
"""Is written last, and never again: without it the list is not complete, and is made anew."""
SHARDS_PER_FILE = 64
ROWS = "rows/"
_ROWS_FILE = re.compile(ROWS + r"(\d{7,})\.parquet")
PARQUET = "application/vnd.apache.parquet"
JSON = "application/json"
_SCHEMA = pa.schema([("image", pa.string()), ("size_bytes", pa.int64()), ("etag", pa.string())])


@dataclass(frozen=True, slots=True)
class Plan:
    """The frozen list.

    Attributes:
        pictures: how many.
        shard_pictures: how many of them each shard has, but the last.
        files: the folder of its files below `plan/`: of two commands that list at once, each has its own.
    """

    pictures: int
    shard_pictures: int
    files: str

    @property
    def shards(self) -> int:
        """How many shards."""
        return -(-self.pictures // self.shard_pictures)

    def pictures_in(self, shard: int) -> int:
        """How many pictures a shard has."""
        return min(self.shard_pictures, self.pictures - shard * self.shard_pictures)


def read_plan(folder: Objects) -> Plan | None:
    """The run's plan; None: it is not made yet, or not completely."""
    data = read_if_there(folder, PLAN)
    if data is None:
        return None
    try:
        return Plan(**json.loads(data))
    except (ValueError, TypeError) as error:
        raise OtherRun(f"{PLAN} in {folder.uri} is damaged: choose another --out") from error


def read_if_there(folder: Objects, name: str) -> bytes | None:
    """An object of the run's folder, or None. Raises StoreRefused: it may not be read."""
    try:
        return folder.read(name)
    except PictureError as error:
        if error.code == "NOT_FOUND":
            return None
        raise StoreRefused(
            f"{name} in {folder.uri} cannot be read: {error.message}; the run needs the rights to list, read "
            "and write there"
        ) from None


def read_part(folder: Objects, name: str) -> bytes:
    """An object of the run's folder that was written before. Raises StoreRefused: it is gone."""
    data = read_if_there(folder, name)
    if data is None:
        raise StoreRefused(
            f"{name} is gone from {folder.uri}: start the same command again, or choose another --out"
        )
    return data


def make_plan(
    folder: Objects,
    pictures: Iterable[Picture],
    shard_pictures: int,
    report: Callable[[int], None] = lambda _: None,
) -> Plan:
    """Write the list; raises what `pictures` raises. Returns the one of another command that was faster.

    Args:
        folder: of the run.
        pictures: in the order in which they are to be segmented.
        shard_pictures: of one shard.
        report: is called with the number of pictures that are listed.
    """
    total, files = 0, uuid4().hex
    listed = iter(pictures)
    for number, part in enumerate(_parts(listed, shard_pictures * SHARDS_PER_FILE)):
        folder.create(_plan_file(files, number), _encode(part), PARQUET)
        total += len(part)
        report(total)
    folder.create(PLAN, json.dumps(asdict(Plan(total, shard_pictures, files))).encode(), JSON)
    plan = read_plan(folder)
    assert plan is not None
    return plan


def _parts(pictures: Iterator[Picture], size: int) -> Iterator[list[Picture]]:
    while part := list(islice(pictures, size)):
        yield part


def _plan_file(files: str, number: int) -> str:
    return f"plan/{files}/{number:06}.parquet"


def _encode(pictures: list[Picture]) -> bytes:
    buffer = io.BytesIO()
    columns = [
        pa.array([getattr(picture, field.name) for picture in pictures], field.type) for field in _SCHEMA
    ]
    pq.write_table(pa.table(columns, schema=_SCHEMA), buffer, compression="zstd")
    return buffer.getvalue()


class PlanReader:
    """Reads shards in one process; keeps the file that was read last, since its next shard is often next."""

    def __init__(self, folder: Objects, plan: Plan) -> None:
        self._folder, self._plan = folder, plan
        self._number: int | None = None
        self._table = _SCHEMA.empty_table()

    def pictures(self, shard: int) -> list[Picture]:
        """The pictures of a shard, in order."""
        number, place = divmod(shard, SHARDS_PER_FILE)
        if number != self._number:
            data = read_part(self._folder, _plan_file(self._plan.files, number))
            self._table = pq.read_table(io.BytesIO(data))
            self._number = number
        size = self._plan.shard_pictures
        rows = self._table.slice(place * size, size).to_pylist()
        return [Picture(**row) for row in rows]


def rows_file(shard: int) -> str:
    """Name of the results of a shard."""
    return f"{ROWS}{shard:07}.parquet"


def done_shards(folder: Objects) -> set[int]:
    """The shards whose rows are written."""
    names = (_ROWS_FILE.fullmatch(stored.name) for stored in folder.list(ROWS))
    return {int(name[1]) for name in names if name is not None}
