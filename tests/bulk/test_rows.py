"""Rows of a bulk run, written and read again."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from bulk.rows import (
    BATCH_ROWS,
    SCHEMA,
    PictureRow,
    TimingsMs,
    error_row,
    found_row,
    read_parts,
    read_rows,
    write_part,
)
from sam3_runner.instances import Instance, PredictResult
from tests.bulk.made_rows import Refused, failed
from tests.outputs.masks import crop_of, mask_of, result_of

if TYPE_CHECKING:
    from pathlib import Path

# pycocotools 2.0.11 converts its arrays in the way of numpy 1.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

MASK = mask_of("....... .####.. .#..#.. .####..")
OTHER = mask_of("....... ......# ......# .......")
FINISHED = datetime(2026, 11, 27, 6, 8, 55, 702999, tzinfo=timezone(timedelta(hours=2)))
KEY = "ab" + "0" * 62


def found(results: list[PredictResult]) -> PictureRow:
    return found_row(
        "s3://pictures/sommer/käfer.jpg",
        results,
        image_bytes=2**33,
        image_sha256="c" * 64,
        key=KEY,
        timings_ms=TimingsMs(fetch=12.34, decode=5.0, inference=100.06, encode=1.0),
        model_sha256="d" * 64,
        finished_at=FINISHED,
    )


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    """Done and failed pictures, from bytes and from a file, of one shard and of several."""
    rows = [
        found([result_of(MASK, OTHER), result_of(OTHER, prompt="dog")]),
        failed("/pictures/large.png"),
    ] * BATCH_ROWS
    part = write_part(rows)
    (tmp_path / "00000.parquet").write_bytes(part)
    assert list(read_rows(part)) == rows
    assert list(read_rows(tmp_path / "00000.parquet")) == rows
    assert list(read_parts([part, write_part([]), write_part(rows[:1])])) == [*rows, rows[0]]


def test_a_row_says_what_was_found() -> None:
    """Scores as the server rounds them, masks as COCO's run lengths, a mask's name where there is one."""
    crop = crop_of(MASK)
    instance = Instance(0.912345, (0.126, 1.0, 4.999, 4.0), int(MASK.sum()), 3, crop)
    results = [
        PredictResult("beetle", 0.98765, 7, 4, [instance]),
        PredictResult("cat", 0.00004, 7, 4, []),
    ]
    row = found(results)
    assert [(each.prompt, each.presence, each.mask) for each in row.prompts] == [
        ("beetle", 0.9877, f"masks/ab/{KEY}.0.png"),
        ("cat", 0.0, None),
    ]
    (part,) = row.instances
    assert (part.prompt, part.score, part.box, part.area_px) == ("beetle", 0.9123, (0.13, 1.0, 5.0, 4.0), 10)
    assert np.array_equal(coco_mask.decode(part.coco_rle), MASK)
    assert (row.status, row.width, row.height, row.error_code) == ("done", 7, 4, None)
    assert row.finished_at.isoformat() == "2026-11-27T04:08:55.702000+00:00"


def test_a_failed_picture_says_why() -> None:
    """The code and the sentence are in the row, and nothing that is not known."""
    row = failed("/pictures/large.png")
    assert (row.status, row.error_code, row.error_message) == ("error", Refused.code, Refused.message)
    assert (row.width, row.height, row.key, row.prompts, row.instances) == (None, None, None, (), ())
    assert row.timings_ms == TimingsMs(fetch=3.0)


@given(
    score=st.integers(0, 10_000),
    corner=st.tuples(st.integers(0, 6_553_600), st.integers(0, 6_553_600)),
    time=st.integers(0, 6_000_000),
)
@settings(deadline=None)
def test_no_digit_is_lost(score: int, corner: tuple[int, int], time: int) -> None:
    """float32 has all digits that the server shows, for pictures of up to 65,536 px and for ten minutes."""
    box = corner[0] / 100, corner[1] / 100, 65536.0, 65536.0
    instance = Instance(score / 10_000, box, 10, 0, crop_of(MASK))
    row = replace(
        found([PredictResult("a", score / 10_000, 7, 4, [instance])]),
        timings_ms=TimingsMs(inference=time / 10),
    )
    assert list(read_rows(write_part([row]))) == [row]


def test_a_file_has_the_schema_and_is_reproducible() -> None:
    """Other tools find the columns of SCHEMA, compressed with zstd; the same rows give the same file."""
    part = write_part([found([result_of(MASK)]), failed("/pictures/large.png")])
    metadata = pq.read_metadata(pa.BufferReader(part))
    assert metadata.schema.to_arrow_schema().equals(SCHEMA)
    assert metadata.row_group(0).column(0).compression == "ZSTD"
    assert write_part([]) != part == write_part([found([result_of(MASK)]), failed("/pictures/large.png")])


def test_a_row_without_its_picture_is_refused() -> None:
    """A column that is never null cannot be written as null."""
    without: str = None  # type: ignore[assignment]  # what a defect in the pipeline would give
    with pytest.raises(pa.ArrowInvalid, match="image"):
        write_part([replace(failed("/pictures/large.png"), image=without)])


def test_a_time_without_a_zone_is_refused() -> None:
    with pytest.raises(ValueError, match="time zone"):
        error_row(
            "/a.png",
            Refused(),
            timings_ms=TimingsMs(),
            model_sha256="d",
            finished_at=FINISHED.replace(tzinfo=None),
        )
