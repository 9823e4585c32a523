"""What a picture leaves in a bulk run, as the benchmark measures it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from benchmarks.bulk_parts import SHARDS, measure
from bulk.run_results import COCO
from bulk.settings import DEFAULT_SHARD_PICTURES

if TYPE_CHECKING:
    from pathlib import Path


def test_figures_are_those_of_the_files(tmp_path: Path) -> None:
    """Bytes a picture are the files' own, and more objects take more."""
    one, five = measure(1, tmp_path), measure(5, tmp_path)
    coco = json.loads((tmp_path / COCO).read_text())
    assert len(coco["images"]) == SHARDS * DEFAULT_SHARD_PICTURES
    assert len(coco["annotations"]) == 5 * len(coco["images"])
    assert five["coco_bytes"] == round((tmp_path / COCO).stat().st_size / len(coco["images"]))
    for name in ("png_bytes", "row_bytes", "coco_bytes"):
        assert 100 < float(str(one[name])) < float(str(five[name])) < 20_000
