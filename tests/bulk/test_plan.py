"""The list of a run: every picture in one shard, whole or made anew."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulk.cluster import Sizes
from bulk.errors import OtherRun, StoreRefused, StoreUnavailable
from bulk.objects import open_objects
from bulk.plan import PARQUET, PlanReader, done_shards, make_plan, read_plan, rows_file
from bulk.settings import Run, RunSettings
from bulk.sources import Picture
from outputs.refinement import Refinement

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from bulk.objects import Objects

SHARD = 3
FILE = SHARD * 64
"""Pictures of one file of the plan."""


@pytest.fixture
def folder(tmp_path: Path) -> Objects:
    return open_objects(str(tmp_path))


def _pictures(count: int) -> Iterator[Picture]:
    return (Picture(f"s3://bucket/ü {number}.jpg", number, f'"{number}"') for number in range(count))


@pytest.mark.parametrize("count", [1, SHARD, FILE - 1, FILE, FILE + 1, 2 * FILE + SHARD + 1])
def test_every_picture_is_in_one_shard_in_order(folder: Objects, count: int) -> None:
    reported: list[int] = []
    plan = make_plan(folder, _pictures(count), SHARD, reported.append)
    assert read_plan(folder) == plan
    assert reported[-1] == count
    reader = PlanReader(folder, plan)
    shards = [reader.pictures(shard) for shard in range(plan.shards)]
    assert [picture for shard in shards for picture in shard] == list(_pictures(count))
    assert [len(shard) for shard in shards] == [plan.pictures_in(shard) for shard in range(plan.shards)]
    # In any order, as the processes of a run take them.
    assert [reader.pictures(shard) for shard in reversed(range(plan.shards))] == shards[::-1]


def test_list_that_was_interrupted_is_made_anew(folder: Objects) -> None:
    """A store that fails while it is listed leaves no plan; the next one has no picture of the first."""

    def failing() -> Iterator[Picture]:
        yield from _pictures(2 * FILE)
        raise StoreUnavailable("away")

    with pytest.raises(StoreUnavailable):
        make_plan(folder, failing(), SHARD)
    assert read_plan(folder) is None
    plan = make_plan(folder, _pictures(5), SHARD)
    reader = PlanReader(folder, plan)
    assert [len(reader.pictures(shard)) for shard in range(plan.shards)] == [3, 2]


def test_two_commands_that_list_at_once_have_one_list(folder: Objects) -> None:
    """Pictures come and go meanwhile: the list that was complete first is that of both."""
    others = []

    def slow() -> Iterator[Picture]:
        yield from _pictures(FILE + 1)
        others.append(make_plan(folder, _pictures(FILE + 4), SHARD + 1))
        yield from _pictures(1)

    plan = make_plan(folder, slow(), SHARD)
    assert [plan] == others
    reader = PlanReader(folder, plan)
    assert [picture for shard in range(plan.shards) for picture in reader.pictures(shard)] == list(
        _pictures(FILE + 4)
    )


def test_list_that_is_gone_is_a_sentence(folder: Objects, tmp_path: Path) -> None:
    plan = make_plan(folder, _pictures(1), SHARD)
    for file in tmp_path.glob("plan/*/*.parquet"):
        file.unlink()
    with pytest.raises(StoreRefused, match=r"is gone from .*: start the same command again, or"):
        PlanReader(folder, plan).pictures(0)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"pictures": 3}', b'{"shards": 1}'])
def test_damaged_plan_is_a_sentence(folder: Objects, data: bytes) -> None:
    folder.replace("plan.json", data, "application/json")
    with pytest.raises(OtherRun, match="is damaged: choose another --out"):
        read_plan(folder)


def test_shards_are_done_when_their_rows_exist(folder: Objects) -> None:
    for shard in (0, 7, 1_234_567):
        assert folder.create(rows_file(shard), b"rows", PARQUET)
    folder.create("rows/readme.txt", b"", "text/plain")
    folder.create("rows/all.parquet", b"", PARQUET)
    assert done_shards(folder) == {0, 7, 1_234_567}


SETTINGS = RunSettings(("star",), "0" * 64)
RUN = Run(SETTINGS, "s3://bucket/in", "s3://bucket/out", "demo", 336)


def test_other_settings_are_another_run_and_other_masks() -> None:
    """Each setting that changes a result changes the run and the keys; the arrangement changes neither."""
    others = [
        replace(SETTINGS, prompts=("star", "circle")),
        replace(SETTINGS, weights_sha256="1" * 64),
        replace(SETTINGS, score_threshold=0.0),
        replace(SETTINGS, score_threshold=0.5),
        replace(SETTINGS, refinement=Refinement(min_area_px=1)),
        replace(SETTINGS, write_masks=False),
        replace(SETTINGS, max_image_bytes=1),
        replace(SETTINGS, max_image_pixels=1),
    ]
    runs = [RUN, *(replace(RUN, settings=each) for each in others), replace(RUN, images="s3://bucket/in2")]
    assert set(Counter(run.run_id for run in runs).values()) == {1}
    keys = [each.picture_key("ab") for each in (SETTINGS, *others)] + [SETTINGS.picture_key("cd")]
    assert set(Counter(keys).values()) == {1}
    same = replace(RUN, max_batch=1, shard_pictures=9, background=True, device="cuda", max_wait_s=1.0)
    assert same.run_id == RUN.run_id
    assert replace(RUN, images="elsewhere").settings.picture_key("ab") == SETTINGS.picture_key("ab")


@given(cpus=st.integers(1, 512), gpus=st.integers(0, 16))
def test_stages_fit_the_cluster(cpus: int, gpus: int) -> None:
    """Each stage has a process, and Ray has CPUs for all of them: without, the run would wait for ever."""
    sizes = Sizes.of(cpus, gpus)
    assert sizes.models == (gpus or max(1, cpus // 4))
    assert min(sizes.fetch, sizes.decoders, sizes.write, sizes.streams, sizes.max_batch) >= 1
    # Ray counts ten thousandths of a CPU.
    model_units, stage_units = (round(each * 10_000) for each in (sizes.model_cpus, sizes.stage_cpus))
    assert 0 < sizes.models * model_units + (sizes.fetch + sizes.write) * stage_units <= cpus * 10_000
    assert sizes.models * sizes.model_gpus <= gpus
