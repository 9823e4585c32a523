"""Forms of a result, and what its overlay shows."""

from __future__ import annotations

import io
import json
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from sam3_client import Instance, Result
from sam3_client.overlay import PALETTE
from sam3_client.pictures import Picture

if TYPE_CHECKING:
    from pathlib import Path

    from sam3_client.coco_rle import Mask

# pycocotools 2.0.11 converts its arrays in the way of numpy 1.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

HEIGHT, WIDTH = 240, 400
GREY = (90, 90, 90)


def rectangle(x0: int, y0: int, x1: int, y1: int) -> Mask:
    """A mask of a rectangle."""
    mask = np.zeros((HEIGHT, WIDTH), np.bool_)
    mask[y0:y1, x0:x1] = True
    return mask


MASKS = (rectangle(40, 60, 120, 160), rectangle(100, 100, 200, 200), rectangle(240, 20, 390, 230))
LABELS = ("cat", "cat", "grüner Hund")
SCORES = (0.75, 0.95, 0.85)


def instance_of(mask: Mask, label: str, score: float) -> Instance:
    """An instance whose box is its mask's rectangle."""
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    x, y, width, height = coco_mask.toBbox(rle)
    return Instance(
        label,
        score,
        (x, y, x + width, y + height),
        {"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode("ascii")},
    )


@pytest.fixture
def result() -> Result:
    """Two cats that overlap, of which the second has the higher score, and a green dog."""
    return Result(
        Picture.of(Image.new("RGB", (WIDTH, HEIGHT), GREY)),
        width=WIDTH,
        height=HEIGHT,
        prompts=["cat", "mouse", "grüner Hund"],
        presence={"cat": 0.9, "mouse": 0.1, "grüner Hund": 0.8},
        instances=[instance_of(*each) for each in zip(MASKS, LABELS, SCORES, strict=True)],
    )


def test_arrays(result: Result) -> None:
    """Masks, boxes, scores, union and label map have their shapes and types; the better one is on top."""
    assert np.array_equal(result.masks, MASKS)
    assert result.boxes.tolist()[0] == [40, 60, 120, 160]
    assert {str(array.dtype) for array in (result.boxes, result.scores)} == {"float32"}
    assert result.scores.tolist() == pytest.approx(SCORES)
    assert np.array_equal(result.union(), np.any(MASKS, axis=0))
    numbers = result.label_map()
    assert numbers.dtype == np.uint16
    assert (numbers[150, 110], numbers[70, 50], numbers[30, 250], numbers[0, 0]) == (2, 1, 3, 0)
    assert repr(result) == "<Result 400 x 240: 2 'cat', 0 'mouse', 1 'grüner Hund'>"


def test_nothing_found(result: Result) -> None:
    """Without instances every form has its shape."""
    empty = result.filter(min_score=1)
    assert (empty.masks.shape, empty.boxes.shape, empty.scores.shape) == ((0, HEIGHT, WIDTH), (0, 4), (0,))
    assert not empty.union().any()
    assert not empty.label_map().any()
    assert empty.to_coco()["annotations"] == []
    assert np.array_equal(np.asarray(empty.overlay()), np.asarray(result.image))


def test_filter(result: Result) -> None:
    """Instances are kept by score, the bound included, and by label; the first result stays as it was."""
    assert result.filter(min_score=0.85).labels == ["cat", "grüner Hund"]
    assert result.filter(labels="cat").labels == result.filter(labels=["cat"]).labels == ["cat", "cat"]
    assert result.filter(labels=[]).labels == []
    assert len(result.instances) == 3


def test_pycocotools_loads_the_document(result: Result, tmp_path: Path) -> None:
    """Every mask, rectangle, area and score is found in the document, as are names of all prompts."""
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(result.to_coco("pets.jpg", image_id=7)))
    coco = COCO(str(path))
    assert coco.loadImgs([7]) == [{"id": 7, "file_name": "pets.jpg", "width": WIDTH, "height": HEIGHT}]
    annotations = coco.loadAnns(coco.getAnnIds(imgIds=[7]))
    assert np.array_equal([coco.annToMask(each) for each in annotations], MASKS)
    assert [each["bbox"] for each in annotations] == [
        coco_mask.toBbox(a["segmentation"]).tolist() for a in annotations
    ]
    assert [each["area"] for each in annotations] == [mask.sum() for mask in MASKS]
    assert [each["score"] for each in annotations] == [*SCORES]
    names = [coco.loadCats([each["category_id"]])[0]["name"] for each in annotations]
    assert (names, len(coco.getCatIds())) == ([*LABELS], 3)


def test_overlay(result: Result) -> None:
    """Tints are light, outlines run outside their masks, and several prompts have a colour each."""
    drawn = np.asarray(result.overlay()).astype(int)
    assert drawn.shape == (HEIGHT, WIDTH, 3)
    cat, dog = PALETTE[1].astype(int), PALETTE[3].astype(int)
    assert np.abs(drawn[130, 60] - (0.78 * np.array(GREY) + 0.22 * cat)).max() <= 1
    assert np.abs(drawn[130, 300] - (0.78 * np.array(GREY) + 0.22 * dog)).max() <= 1
    assert np.array_equal(drawn[130, 39], cat)
    assert np.array_equal(drawn[130, 239], dog)
    assert np.array_equal(drawn[5, 5], GREY)
    assert result.overlay(max_side_px=100).size == (100, 60)
    alone = np.asarray(result.filter(labels="cat").overlay())
    assert np.array_equal(alone[130, 39], PALETTE[1])


def test_labels_do_not_hide_each_other() -> None:
    """Of many instances at one place the best one's label is whole, and others stand beside it."""
    crowd = [instance_of(rectangle(150, 100, 250, 140), "cat", score / 100) for score in range(89, 59, -1)]
    picture = Picture.of(Image.new("RGB", (WIDTH, HEIGHT), GREY))
    many = Result(picture, width=WIDTH, height=HEIGHT, prompts=["cat"], presence={}, instances=crowd)
    best = np.asarray(many.filter(min_score=0.89).overlay())[:98]  # above box and outline
    is_label = (best != GREY).any(axis=2)
    assert (best[is_label].max(axis=1) < 80).any(), "no ink"
    drawn = np.asarray(many.overlay())[:98]
    assert np.array_equal(drawn[is_label], best[is_label])
    assert (drawn[~is_label] != GREY).any()


def test_label_stands_beside_its_neighbour(result: Result) -> None:
    """No label hides a part of the object above its own."""
    pair = [instance_of(rectangle(50, top, 150, top + 80), "cat", 0.9 - top / 1000) for top in (30, 112)]
    both = Result(
        Picture.of(result.image), width=WIDTH, height=HEIGHT, prompts=["cat"], presence={}, instances=pair
    )
    upper = both.filter(min_score=0.85)
    drawn, alone = np.asarray(both.overlay()), np.asarray(upper.overlay())
    assert np.array_equal(drawn[:110, 49:150], alone[:110, 49:150])
    beside = np.r_[:49, 150:WIDTH]
    assert (drawn[:, beside] != alone[:, beside]).any()


def test_in_a_notebook(result: Result, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A notebook shows the overlay as a PNG; elsewhere a window does; a file has the format of its name."""
    with Image.open(io.BytesIO(result._repr_png_())) as shown:
        assert (shown.format, shown.size) == ("PNG", (WIDTH, HEIGHT))
    result.save_overlay(tmp_path / "found.jpg")
    with Image.open(tmp_path / "found.jpg") as saved:
        assert saved.format == "JPEG"
    displayed: list[Any] = []
    display = SimpleNamespace(display=displayed.append)
    notebook = SimpleNamespace(get_ipython=object, display=display)
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    result.show()
    assert displayed == [result]
    monkeypatch.delitem(sys.modules, "IPython")

    def show(image: Image.Image) -> None:
        displayed.append(image)

    monkeypatch.setattr(Image.Image, "show", show)
    result.show()
    assert displayed[1].size == (WIDTH, HEIGHT)
