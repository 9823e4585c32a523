"""The COCO file of a run, loaded by the tool that reads it."""

from __future__ import annotations

import json
import tracemalloc
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from pycocotools.coco import COCO

from bulk.coco_export import CocoFile, file_name
from bulk.rows import read_parts, write_part
from outputs.coco import coco_document
from sam3_runner.instances import PredictResult
from tests.bulk.made_rows import done, failed
from tests.outputs.masks import mask_of, result_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

# pycocotools 2.0.11 converts its arrays in the way of numpy 1.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

RING = np.pad(mask_of("####. #..#. ####. ....."), ((2, 1), (3, 4)))
DOTS = np.pad(mask_of("#.... ..... ..... ...##"), ((2, 1), (3, 4)))
NOTHING = np.zeros_like(RING)
SOURCE = "s3://pictures/summer"
PROMPTS = ["cat", "dog", "bird"]
FOUND = [result_of(RING, DOTS, prompt="cat"), result_of(DOTS, NOTHING, prompt="dog")]


@pytest.fixture
def parts() -> list[bytes]:
    """Two shards: three pictures that are done, one of them without instances, and a failed one."""
    return [
        write_part([done(f"{SOURCE}/käfer/1.jpg", FOUND), failed(f"{SOURCE}/broken.jpg")]),
        write_part(
            [
                done(f"{SOURCE}/empty.jpg", [PredictResult("cat", 0.1, 12, 7, [])]),
                done("s3://elsewhere/2.jpg", [result_of(RING, prompt="bird")]),
            ]
        ),
    ]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "coco.json"


def export(parts: Iterable[bytes], path: Path) -> dict[str, Any]:
    with CocoFile(path, prompts=PROMPTS, source=SOURCE) as file:
        for row in read_parts(parts):
            file.add(row)
    document: dict[str, Any] = json.loads(path.read_bytes())
    return document


def test_pycocotools_loads_every_mask(parts: list[bytes], path: Path) -> None:
    """Px by px, with its picture and its category; failed pictures are left out."""
    export(parts, path)
    coco = COCO(str(path))
    assert [each["file_name"] for each in coco.loadImgs(coco.getImgIds())] == [
        "käfer/1.jpg",
        "empty.jpg",
        "s3://elsewhere/2.jpg",
    ]
    found = [
        (each["image_id"], coco.cats[each["category_id"]]["name"], coco.annToMask(each))
        for each in coco.loadAnns(coco.getAnnIds())
    ]
    assert [each[:2] for each in found] == [(1, "cat"), (1, "cat"), (1, "dog"), (1, "dog"), (3, "bird")]
    assert np.array_equal([each[2] for each in found], [RING, DOTS, DOTS, NOTHING, RING])


def test_it_is_what_the_server_answers_for_each_picture(parts: list[bytes], path: Path) -> None:
    """The same entries as in the server's document of one picture, but for the numbers of a run."""
    document = export(parts, path)
    single = coco_document(FOUND, file_name="käfer/1.jpg")
    assert list(document) == list(single)
    assert document["info"] == single["info"]
    assert document["images"][0] == single["images"][0]
    assert document["categories"][:2] == single["categories"]
    # A row has rounded scores.
    rounded = [each | {"score": round(each["score"], 4)} for each in single["annotations"]]
    assert document["annotations"][:4] == rounded
    assert [each["id"] for each in document["annotations"]] == [1, 2, 3, 4, 5]
    assert [each["id"] for each in document["images"]] == [1, 2, 3]


def test_a_run_without_results(path: Path) -> None:
    """The file has its categories, and is valid JSON, when every picture failed."""
    document = export([write_part([failed("/a.jpg")])], path)
    assert (document["images"], document["annotations"]) == ([], [])
    assert [each["name"] for each in document["categories"]] == PROMPTS


def test_the_same_rows_give_the_same_bytes(parts: list[bytes], path: Path) -> None:
    export(parts, path)
    first = path.read_bytes()
    export(parts, path)
    assert path.read_bytes() == first


def test_an_interrupted_export_leaves_the_file_that_was_there(parts: list[bytes], path: Path) -> None:
    """A store that breaks in the middle leaves neither half a file nor a temporary one."""

    def breaking() -> Iterator[bytes]:
        yield parts[0]
        raise ConnectionError

    path.write_text("earlier")
    with pytest.raises(ConnectionError):
        export(breaking(), path)
    assert path.read_text() == "earlier"
    assert list(path.parent.iterdir()) == [path]


def test_memory_does_not_grow_with_the_run(path: Path) -> None:
    """Ten times as many pictures need no more memory."""
    row = done(f"{SOURCE}/1.jpg", FOUND)
    peaks = []
    for pictures in (200, 200, 2000):  # the first fills caches
        tracemalloc.start()
        with CocoFile(path, prompts=PROMPTS, source=SOURCE) as file:
            for _ in range(pictures):
                file.add(row)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert path.stat().st_size > peaks[2]
    assert peaks[2] < 1.2 * peaks[1]


@pytest.mark.parametrize(
    ("image", "source", "name"),
    [
        ("s3://pictures/summer/a/b.jpg", "s3://pictures/summer", "a/b.jpg"),
        ("s3://pictures/summer/a/b.jpg", "s3://pictures/summer/", "a/b.jpg"),
        ("s3://pictures/summer2/b.jpg", "s3://pictures/summer", "s3://pictures/summer2/b.jpg"),
        ("s3://pictures/b.jpg", "s3://pictures", "b.jpg"),
        ("s3://pictures//b.jpg", "s3://pictures", "s3://pictures//b.jpg"),
        ("/data/pictures/b.jpg", "/data/pictures", "b.jpg"),
        ("/b.jpg", "/", "b.jpg"),
        ("s3://pictures/b.jpg", "/data/pictures.csv", "s3://pictures/b.jpg"),
    ],
)
def test_names_are_relative_to_the_source(image: str, source: str, name: str) -> None:
    """A picture below the source has the path that it has there; another keeps its URI."""
    assert file_name(image, source) == name
