"""The rows of a bulk run: one a picture, in Parquet files of one shard each.

Scores and presences have 4 digits, boxes 2 and times 1, as in the server's answers. They are stored as
float32 and rounded again when they are read, so that a row is read as it was written.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from outputs.coco_rle import CocoRle, coco_rle

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from sam3_runner.instances import Instance, PredictResult

SCORE_DIGITS = 4
BOX_DIGITS = 2
TIME_DIGITS = 1

BATCH_ROWS = 16
"""Rows that are in memory as Python's values while a file is read."""


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


def _list_of(kind: pa.DataType, length: int = -1) -> pa.DataType:
    return pa.list_(_required("element", kind), length)


SCHEMA: pa.Schema = pa.schema(
    [
        _required("image", pa.string()),
        pa.field("image_bytes", pa.int64()),
        pa.field("image_sha256", pa.string()),
        pa.field("key", pa.string()),
        _required("status", pa.string()),
        pa.field("error_code", pa.string()),
        pa.field("error_message", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        _required(
            "prompts",
            _list_of(
                pa.struct(
                    [
                        _required("prompt", pa.string()),
                        _required("presence", pa.float32()),
                        pa.field("mask", pa.string()),
                    ]
                )
            ),
        ),
        _required(
            "instances",
            _list_of(
                pa.struct(
                    [
                        _required("prompt", pa.string()),
                        _required("score", pa.float32()),
                        _required("box", _list_of(pa.float32(), 4)),
                        _required("area_px", pa.int64()),
                        _required(
                            "coco_rle",
                            pa.struct(
                                [
                                    _required("size", _list_of(pa.int32(), 2)),
                                    _required("counts", pa.string()),
                                ]
                            ),
                        ),
                    ]
                )
            ),
        ),
        _required(
            "timings_ms",
            pa.struct(
                [pa.field(stage, pa.float32()) for stage in ("fetch", "decode", "inference", "encode")]
            ),
        ),
        _required("model_sha256", pa.string()),
        _required("finished_at", pa.timestamp("ms", tz="UTC")),
    ]
)
"""Of `rows/*.parquet`. The attributes of `PictureRow` explain the columns."""


@dataclass(frozen=True, slots=True)
class PromptPart:
    """What a row says of one prompt.

    Attributes:
        presence: probability that the concept is in the picture at all.
        mask: name of the PNG below the run's folder; None where nothing was found.
    """

    prompt: str
    presence: float
    mask: str | None


@dataclass(frozen=True, slots=True)
class InstancePart:
    """One object that was found.

    Attributes:
        box: x0, y0, x1, y1 in px of the picture; the decoder's box, not that of the mask.
        area_px: px of the mask.
        coco_rle: the mask, as compressed run lengths of COCO.
    """

    prompt: str
    score: float
    box: tuple[float, float, float, float]
    area_px: int
    coco_rle: CocoRle


@dataclass(frozen=True, slots=True)
class TimingsMs:
    """How long each stage took, in ms; None for a stage that was not reached."""

    fetch: float | None = None
    decode: float | None = None
    inference: float | None = None
    encode: float | None = None


@dataclass(frozen=True, slots=True)
class PictureRow:
    """One picture of a run.

    Attributes:
        image: full URI, `s3://bucket/key`, or an absolute path.
        image_bytes, image_sha256: of the object that was read; None where none was.
        key: sha256 of the object's sha256 and the settings' digest, in hex; it names the masks.
        error_code, error_message: None for a picture that is done.
        width, height: px, as a viewer shows the picture; None where it was not decoded.
        prompts: in the run's order; empty in an error's row.
        instances: prompt by prompt, best score first.
        model_sha256: of the weights.
        finished_at: UTC, in whole ms.
    """

    image: str
    image_bytes: int | None
    image_sha256: str | None
    key: str | None
    status: Literal["done", "error"]
    error_code: str | None
    error_message: str | None
    width: int | None
    height: int | None
    prompts: tuple[PromptPart, ...]
    instances: tuple[InstancePart, ...]
    timings_ms: TimingsMs
    model_sha256: str
    finished_at: datetime


class Failure(Protocol):
    """Why a picture has no result, such as a `PictureError`."""

    @property
    def code(self) -> str:
        """For programs, such as `TOO_LARGE`."""

    @property
    def message(self) -> str:
        """For people."""


def found_row(
    image: str,
    results: Sequence[PredictResult],
    *,
    image_bytes: int,
    image_sha256: str,
    key: str,
    timings_ms: TimingsMs,
    model_sha256: str,
    finished_at: datetime,
) -> PictureRow:
    """The row of a picture that was segmented.

    Args:
        image: full URI, or an absolute path.
        results: one a prompt, in the run's order; at least one.
        image_bytes: of the object that was read.
        image_sha256: of the same.
        key: names the masks, by `mask_name`.
        timings_ms: of the stages.
        model_sha256: of the weights.
        finished_at: with a time zone.
    """
    return PictureRow(
        image=image,
        image_bytes=image_bytes,
        image_sha256=image_sha256,
        key=key,
        status="done",
        error_code=None,
        error_message=None,
        width=results[0].image_width,
        height=results[0].image_height,
        prompts=tuple(
            PromptPart(
                prompt=result.prompt,
                presence=round(result.presence, SCORE_DIGITS),
                mask=mask_name(key, number) if result.instances else None,
            )
            for number, result in enumerate(results)
        ),
        instances=tuple(
            _instance_part(result, instance) for result in results for instance in result.instances
        ),
        timings_ms=_rounded(timings_ms),
        model_sha256=model_sha256,
        finished_at=_in_whole_ms(finished_at),
    )


def error_row(
    image: str,
    failure: Failure,
    *,
    timings_ms: TimingsMs,
    model_sha256: str,
    finished_at: datetime,
    image_bytes: int | None = None,
    image_sha256: str | None = None,
    key: str | None = None,
) -> PictureRow:
    """The row of a picture that has no result. The arguments are those of `found_row`."""
    return PictureRow(
        image=image,
        image_bytes=image_bytes,
        image_sha256=image_sha256,
        key=key,
        status="error",
        error_code=failure.code,
        error_message=failure.message,
        width=None,
        height=None,
        prompts=(),
        instances=(),
        timings_ms=_rounded(timings_ms),
        model_sha256=model_sha256,
        finished_at=_in_whole_ms(finished_at),
    )


def mask_name(key: str, prompt_number: int) -> str:
    """The name of a prompt's PNG below the run's folder; prompts are numbered from 0."""
    return f"masks/{key[:2]}/{key}.{prompt_number}.png"


def table_of(rows: Iterable[PictureRow]) -> pa.Table:
    """The rows as a table with `SCHEMA`."""
    return pa.Table.from_pylist([asdict(row) for row in rows], schema=SCHEMA)


def write_part(rows: Iterable[PictureRow]) -> bytes:
    """The Parquet file of a shard, compressed with zstd. Equal rows give equal bytes."""
    file = pa.BufferOutputStream()
    pq.write_table(table_of(rows), file, compression="zstd")
    content: bytes = file.getvalue().to_pybytes()
    return content


def read_rows(part: bytes | Path) -> Iterator[PictureRow]:
    """The rows of a shard's Parquet file, in order, `BATCH_ROWS` of them in memory at once.

    Raises:
        pyarrow.ArrowInvalid: it is not a Parquet file.
    """
    source = pa.BufferReader(part) if isinstance(part, bytes) else part
    with pq.ParquetFile(source) as file:
        for batch in file.iter_batches(batch_size=BATCH_ROWS):
            yield from map(_row_of, batch.to_pylist())


def read_parts(parts: Iterable[bytes | Path]) -> Iterator[PictureRow]:
    """The rows of several shards, one after the other; one of their files is in memory at a time."""
    return chain.from_iterable(map(read_rows, parts))


def _instance_part(result: PredictResult, instance: Instance) -> InstancePart:
    x0, y0, x1, y1 = (round(side, BOX_DIGITS) for side in instance.box)
    return InstancePart(
        prompt=result.prompt,
        score=round(instance.score, SCORE_DIGITS),
        box=(x0, y0, x1, y1),
        area_px=instance.area_px,
        coco_rle=coco_rle(instance.mask, result.image_width, result.image_height),
    )


def _rounded(timings_ms: TimingsMs) -> TimingsMs:
    times = asdict(timings_ms)
    return TimingsMs(
        **{stage: None if time is None else round(time, TIME_DIGITS) for stage, time in times.items()}
    )


def _in_whole_ms(time: datetime) -> datetime:
    if time.tzinfo is None:
        raise ValueError("finished_at has no time zone; give one, such as datetime.now(UTC)")
    time = time.astimezone(UTC)
    return time.replace(microsecond=time.microsecond // 1000 * 1000)


def _row_of(values: Mapping[str, Any]) -> PictureRow:
    """A row from the values that pyarrow reads."""
    finished_at = values["finished_at"].astimezone(UTC)
    prompts = tuple(
        PromptPart(each["prompt"], round(each["presence"], SCORE_DIGITS), each["mask"])
        for each in values["prompts"]
    )
    instances = tuple(
        InstancePart(
            each["prompt"],
            round(each["score"], SCORE_DIGITS),
            tuple(round(side, BOX_DIGITS) for side in each["box"]),
            each["area_px"],
            CocoRle(size=each["coco_rle"]["size"], counts=each["coco_rle"]["counts"]),
        )
        for each in values["instances"]
    )
    changed = {
        "prompts": prompts,
        "instances": instances,
        "timings_ms": _rounded(TimingsMs(**values["timings_ms"])),
        "finished_at": finished_at,
    }
    return PictureRow(**{**values, **changed})
