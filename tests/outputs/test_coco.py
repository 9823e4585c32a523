"""COCO documents, loaded by the tools that read them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from pycocotools.coco import COCO

from outputs.coco import coco_document
from tests.outputs.masks import mask_of, result_of

if TYPE_CHECKING:
    from pathlib import Path

    from sam3_runner.instances import PredictResult

# pycocotools 2.0.11 converts its arrays in the way of numpy 1.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

RING = np.pad(mask_of("####. #..#. ####. ....."), ((2, 1), (3, 4)))
DOTS = np.pad(mask_of("#.... ..... ..... ...##"), ((2, 1), (3, 4)))
NOTHING = np.zeros_like(RING)


@pytest.fixture
def results() -> list[PredictResult]:
    """Two prompts, one of them twice, and four instances, one without px."""
    return [
        result_of(RING, DOTS, prompt="cat"),
        result_of(DOTS, prompt="dog"),
        result_of(NOTHING, prompt="cat"),
    ]


def test_document(results: list[PredictResult]) -> None:
    """Ids are numbers of instances, boxes those of the masks, and each distinct prompt is one category."""
    document = coco_document(results, file_name="photo.jpg")
    assert document["images"] == [{"id": 1, "file_name": "photo.jpg", "width": 12, "height": 7}]
    assert [(each["id"], each["name"]) for each in document["categories"]] == [(1, "cat"), (2, "dog")]
    annotations = document["annotations"]
    assert [each["id"] for each in annotations] == [1, 2, 3, 4]
    assert [each["category_id"] for each in annotations] == [1, 1, 2, 1]
    assert [each["bbox"] for each in annotations] == [[3, 2, 4, 3], [3, 2, 5, 4], [3, 2, 5, 4], [0, 0, 0, 0]]
    assert [each["area"] for each in annotations] == [10, 3, 3, 0]
    assert [each["iscrowd"] for each in annotations] == [0, 0, 0, 0]
    assert [each["score"] for each in annotations] == [0.9, 0.8, 0.9, 0.9]


def test_pycocotools_loads_it(results: list[PredictResult], tmp_path: Path) -> None:
    """It finds every mask, px by px."""
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(coco_document(results, file_name="photo.jpg")))
    coco = COCO(str(path))
    loaded = coco.loadAnns(coco.getAnnIds(imgIds=[1]))
    masks = [coco.annToMask(annotation) for annotation in loaded]
    assert np.array_equal(masks, [RING, DOTS, DOTS, NOTHING])
    assert coco.getAnnIds(catIds=coco.getCatIds(catNms=["dog"])) == [3]


def test_supervision_loads_it(results: list[PredictResult], tmp_path: Path) -> None:
    """It finds every mask, px by px, with its class."""
    supervision = pytest.importorskip("supervision")
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(coco_document(results[:2], file_name="photo.jpg")))
    dataset = supervision.DetectionDataset.from_coco(str(tmp_path), str(path), force_masks=True)
    (detections,) = dataset.annotations.values()
    assert np.array_equal(detections.mask, [RING, DOTS, DOTS])
    assert [dataset.classes[index] for index in detections.class_id] == ["cat", "cat", "dog"]
    assert detections.xyxy.tolist() == [[3, 2, 7, 5], [3, 2, 8, 6], [3, 2, 8, 6]]


def test_no_results() -> None:
    """Without a result the image's size is unknown."""
    with pytest.raises(ValueError, match="results is empty"):
        coco_document([], file_name="photo.jpg")
