"""Rows for the tests of bulk/, made as the run makes them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from bulk.rows import TimingsMs, error_row, found_row

if TYPE_CHECKING:
    from bulk.rows import PictureRow
    from sam3_runner.instances import PredictResult

FINISHED = datetime(2026, 11, 27, 4, 8, 55, 702000, tzinfo=UTC)
TIMINGS_MS = TimingsMs(fetch=12.3, decode=5.0, inference=100.1, encode=1.0)
MODEL_SHA256 = "d" * 64


@dataclass(frozen=True)
class Refused:
    """Why a picture has no result."""

    code: str = "TOO_LARGE"
    message: str = "the object has 11 MB; 10 MB are allowed"


def done(
    image: str,
    results: list[PredictResult],
    *,
    content: bytes = b"",
    finished_at: datetime = FINISHED,
    timings_ms: TimingsMs = TIMINGS_MS,
) -> PictureRow:
    """The row of a picture that was segmented."""
    digest = hashlib.sha256(content).hexdigest()
    return found_row(
        image,
        results,
        image_bytes=len(content),
        image_sha256=digest,
        key=digest,
        timings_ms=timings_ms,
        model_sha256=MODEL_SHA256,
        finished_at=finished_at,
    )


def failed(image: str, failure: Refused | None = None, *, finished_at: datetime = FINISHED) -> PictureRow:
    """The row of a picture that was only fetched."""
    return error_row(
        image,
        failure or Refused(),
        timings_ms=TimingsMs(fetch=3.0),
        model_sha256=MODEL_SHA256,
        finished_at=finished_at,
    )
