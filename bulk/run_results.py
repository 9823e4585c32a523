"""What a run leaves behind beside its rows: COCO, summary and report, from one pass over the rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bulk.coco_export import CocoFile
from bulk.report import RunDescription, report_html
from bulk.rows import read_parts
from bulk.samples import Samples
from bulk.summary import Summary

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from bulk.samples import ReadPicture

COCO = "coco.json"
SUMMARY = "summary.json"
REPORT = "report.html"


def write_results(
    parts: Iterable[bytes | Path], folder: Path, run: RunDescription, read_picture: ReadPicture
) -> Summary:
    """Write `coco.json`, `summary.json` and `report.html` of a run to a local folder.

    Memory does not grow with the run: one part is read at a time, in the order of the shards.

    Args:
        parts: the Parquet files of the run's rows, as bytes or as paths.
        folder: where the files are written; files of these names are replaced.
        run: what the report says besides the numbers.
        read_picture: the bytes of a picture by its URI, for the report's samples.

    Raises:
        KeyError: an instance has a prompt that is not of the run.
        DecoderFailed: no picture can be decoded on this machine.
    """
    summary, samples = Summary(run.prompts), Samples()
    with CocoFile(folder / COCO, prompts=run.prompts, source=run.source) as coco:
        for row in read_parts(parts):
            coco.add(row)
            summary.add(row)
            samples.add(row)
    (folder / SUMMARY).write_text(summary.to_json(), encoding="utf-8")
    (folder / REPORT).write_text(report_html(run, summary, samples.draw(read_picture)), encoding="utf-8")
    return summary
