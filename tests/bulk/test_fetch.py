"""The stage that reads files, without Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bulk.errors import StoreRefused, StoreUnavailable
from bulk.objects import open_objects
from bulk.plan import make_plan
from bulk.settings import Run, RunSettings
from bulk.sources import Picture, Skipped, list_pictures
from bulk.stages.blocks import block_of, files_of, states_of
from bulk.stages.fetch import MAX_BLOCK_BYTES, Fetch
from tests.bulk.buckets import use_service

if TYPE_CHECKING:
    from pathlib import Path

    from bulk.stages.blocks import PictureState
    from tests.services.objects import S3Service

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
    pictures = list_pictures(source, skipped=Skipped())
    plan = make_plan(open_objects(run.folder), pictures, 64, lambda _: None)
    block = Fetch(run, plan)(block_of(0, []))

    files = files_of(block)
    assert 0 < sum(len(file) for file in files if file is not None) <= MAX_BLOCK_BYTES
    assert None in files
    for state, file in zip(states_of(block), files, strict=True):
        assert state.error is None
        assert file is None or state.size_bytes == len(file)


def _fetched(images: str, pictures: list[str], tmp_path: Path) -> list[PictureState]:
    """The states of a shard of these pictures."""
    run = Run(RunSettings(("star",), "0" * 64), images, str(tmp_path / "out"), "demo", side_px=336)
    plan = make_plan(open_objects(run.folder), map(Picture, pictures), 64)
    return states_of(Fetch(run, plan)(block_of(0, [])))


@pytest.mark.services
def test_source_that_may_not_be_read_ends_the_run(
    tmp_path: Path, seaweedfs: S3Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Credentials that may list and not read make no error rows; one closed object among others is one."""
    use_service(monkeypatch, seaweedfs)
    closed = "s3://of-somebody-else"
    with pytest.raises(
        StoreRefused, match=r"none of 2 pictures in turn can be read, such as s3://of-.*/1\.png"
    ):
        _fetched(closed, [f"{closed}/1.png", f"{closed}/2.png"], tmp_path)
    [state] = _fetched(closed, [f"{closed}/1.png"], tmp_path / "another")
    assert state.error is not None
    assert state.error.code == "FORBIDDEN"


def test_folder_that_is_not_mounted_ends_the_run(tmp_path: Path) -> None:
    """Pictures that somebody has removed are error rows; a source without any picture is not there."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "left.png").write_bytes(b"1")
    gone = [str(folder / f"{number}.png") for number in range(3)]
    errors = [state.error for state in _fetched(str(folder), gone, tmp_path)]
    assert [error.code for error in errors if error is not None] == ["NOT_FOUND"] * 3
    (folder / "left.png").unlink()
    with pytest.raises(StoreUnavailable, match="is empty on this machine"):
        _fetched(str(folder), gone, tmp_path / "another")
