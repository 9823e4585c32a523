"""The stage of the model, without Ray: blocks in, blocks out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from bulk.errors import ClusterUnavailable, StoreUnavailable
from bulk.settings import Run, RunSettings
from bulk.sources import Picture
from bulk.stages.blocks import PictureState, block_of, states_of
from bulk.stages.segment import Segment
from tests.drawn import scene
from tests.edge import png_bytes

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def segment() -> Segment:
    settings = RunSettings(("circle",), "0" * 64)
    return Segment(Run(settings, "in", "out", "demo", side_px=336, max_wait_s=1.0), decoders=1)


def test_file_that_was_not_sent_is_read(segment: Segment, tmp_path: Path) -> None:
    """Files of a block beyond its room come without their content."""
    path = tmp_path / "scene.png"
    path.write_bytes(png_bytes(scene(7).image))
    sent, unsent = (PictureState(Picture(str(path))) for _ in range(2))
    [first, second] = states_of(segment(block_of(0, [sent, unsent], [path.read_bytes(), None])))
    assert first.error is None
    assert second.error is None
    assert second.size_bytes == path.stat().st_size
    assert [result.confidence for result in first.results] == [result.confidence for result in second.results]


def test_store_that_fails_ends_the_run(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sentence reaches the user, and no picture is blamed."""
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    states = [PictureState(Picture(f"s3://bucket/{number}.png")) for number in range(3)]
    with pytest.raises(StoreUnavailable, match="s3://bucket"):
        segment(block_of(0, states, [None] * 3))


@pytest.mark.parametrize("is_full_for_all", [True, False])
def test_full_device_is_no_fault_of_the_picture(
    segment: Segment, monkeypatch: pytest.MonkeyPatch, *, is_full_for_all: bool
) -> None:
    """Where not even a picture of our own fits, the run ends; else the picture is an error row."""
    predictor = segment._engine._predictor
    assert predictor is not None
    segment_mixed = predictor.segment_mixed

    def full(requests: Any, *arguments: Any, **options: Any) -> Any:
        if is_full_for_all or requests[0][0].height > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return segment_mixed(requests, *arguments, **options)

    monkeypatch.setattr(predictor, "segment_mixed", full)
    file = png_bytes(scene(7).image)
    block = block_of(0, [PictureState(Picture("/a.png"))], [file])
    if is_full_for_all:
        with pytest.raises(ClusterUnavailable, match=r"the model cannot work: .*memory"):
            segment(block)
    else:
        [state] = states_of(segment(block))
        assert state.error is not None
        assert state.error.code == "INFERENCE_FAILED"
