"""The stage that reads files, without Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bulk.objects import open_objects
from bulk.plan import make_plan
from bulk.settings import Run, RunSettings
from bulk.sources import Skipped, list_pictures
from bulk.stages.blocks import block_of, files_of, states_of
from bulk.stages.fetch import MAX_BLOCK_BYTES, Fetch

if TYPE_CHECKING:
    from pathlib import Path

SIZES_BYTES = (MAX_BLOCK_BYTES // 2, MAX_BLOCK_BYTES // 4, MAX_BLOCK_BYTES // 2, 10)


@pytest.mark.parametrize("is_listed", [True, False])
def test_block_is_bounded(tmp_path: Path, *, is_listed: bool) -> None:
    """What does not fit into a block is left for the next stage, whether sizes are known or not."""
    folder = tmp_path / "in"
    folder.mkdir()
    paths = [folder / f"{number}.jpg" for number in range(len(SIZES_BYTES))]
    for path, size_bytes in zip(paths, SIZES_BYTES, strict=True):
        path.write_bytes(bytes(size_bytes))
    manifest = tmp_path / "list.csv"
    manifest.write_text("\n".join(["image", *map(str, paths)]))
    source = str(folder if is_listed else manifest)

    run = Run(RunSettings(("star",), "0" * 64), source, str(tmp_path / "out"), "demo", side_px=336)
    pictures = list_pictures(source, exclude=run.out, skipped=Skipped())
    plan = make_plan(open_objects(run.folder), pictures, 64, lambda _: None)
    block = Fetch(run, plan)(block_of(0, []))

    files = files_of(block)
    assert 0 < sum(len(file) for file in files if file is not None) <= MAX_BLOCK_BYTES
    assert None in files
    for state, file in zip(states_of(block), files, strict=True):
        assert state.error is None
        assert file is None or state.size_bytes == len(file)
