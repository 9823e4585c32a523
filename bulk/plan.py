"""The list of a run's pictures, made once, before the first is segmented.

A shard is a number. Its pictures are a part of one file of `plan/`, its results are `rows/<shard>.parquet`.
So a shard is done when its rows exist, whoever wrote them, and no picture is in two shards.
"""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from bulk.errors import OtherRun, PictureError
from bulk.sources import Picture

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from bulk.objects import Objects

PLAN = "plan.json"
"""Is written last: without it the list is not complete, and is made anew."""
SHARDS_PER_FILE = 64
ROWS = "rows/"
PARQUET = "application/vnd.apache.parquet"
JSON = "application/json"
_SCHEMA = pa.schema([("image", pa.string()), ("size_bytes", pa.int64()), ("etag", pa.string())])


@dataclass(frozen=True, slots=True)
class Plan:
    """The frozen list: how many pictures, and how many of them each shard has but the last."""

    pictures: int
    shard_pictures: int

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
    """An object of the run's folder, or None."""
    try:
        return folder.read(name)
    except PictureError as error:
        if error.code != "NOT_FOUND":
            raise
        return None


def make_plan(
    folder: Objects,
    pictures: Iterable[Picture],
    shard_pictures: int,
    report: Callable[[int], None] = lambda _: None,
) -> Plan:
    """Write the list; raises what `pictures` raises.

    Args:
        folder: of the run.
        pictures: in the order in which they are to be segmented.
        shard_pictures: of one shard.
        report: is called with the number of pictures that are listed.
    """
    total = 0
    listed = iter(pictures)
    for number, part in enumerate(_parts(listed, shard_pictures * SHARDS_PER_FILE)):
        folder.replace(_plan_file(number), _encode(part), PARQUET)
        total += len(part)
        report(total)
    plan = Plan(total, shard_pictures)
    folder.replace(PLAN, json.dumps(asdict(plan)).encode(), JSON)
    return plan


def _parts(pictures: Iterator[Picture], size: int) -> Iterator[list[Picture]]:
    while part := list(islice(pictures, size)):
        yield part


def _plan_file(number: int) -> str:
    return f"plan/{number:06}.parquet"


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
            self._table = pq.read_table(io.BytesIO(self._folder.read(_plan_file(number))))
            self._number = number
        size = self._plan.shard_pictures
        rows = self._table.slice(place * size, size).to_pylist()
        return [Picture(**row) for row in rows]


def rows_file(shard: int) -> str:
    """Name of the results of a shard."""
    return f"{ROWS}{shard:07}.parquet"


def done_shards(folder: Objects) -> set[int]:
    """The shards whose rows are written."""
    return {
        int(stored.name.removeprefix(ROWS).removesuffix(".parquet"))
        for stored in folder.list(ROWS)
        if stored.name.endswith(".parquet")
    }
