"""The accuracy command over a COCO-format folder that the tests draw."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from benchmarks.accuracy import score
from benchmarks.coco import DatasetError, read_dataset
from benchmarks.drawn_coco import draw
from commands.local_server import ROOT

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight drawn scenes with their annotations."""
    return draw(tmp_path_factory.mktemp("drawn"), scenes=8, side_px=336).parent


def accuracy(images: Path, annotations: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """The command as a user runs it, on the demo checkpoint."""
    command = [sys.executable, "-m", "benchmarks.accuracy", "--device", "cpu", "--out", str(out)]
    command += ["--images", str(images), "--annotations", str(annotations), *more]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def as_result(annotation: dict[str, Any], score: float) -> dict[str, Any]:
    """Convert an annotation to a result."""
    kept = ("image_id", "category_id", "segmentation", "bbox")
    return {name: annotation[name] for name in kept} | {"score": score}


@pytest.fixture(scope="module")
def summary(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The command's summary for the demo checkpoint, and the path of its results."""
    out = tmp_path_factory.mktemp("out") / "new" / "results.json"
    ended = accuracy(folder, folder / "annotations.json", out)
    assert ended.returncode == 0, ended.stderr
    written: dict[str, Any] = json.loads((out.parent / "results.summary.json").read_text())
    assert f"AP {written['segm']['AP']:.3f}" in ended.stdout
    assert f"cgF1 {written['cgF1']['cgF1']:.3f}" in ended.stdout
    return written | {"out": out}


def test_demo_checkpoint_scores_high_on_drawn_scenes(summary: dict[str, Any]) -> None:
    """The demo checkpoint finds the shapes of its training, with accurate masks."""
    assert (summary["checkpoint"], summary["images"], summary["prompts"]) == ("demo", 8, 48)
    assert summary["segm"]["AP"] > 0.9
    assert summary["bbox"]["AP50"] > 0.9
    assert summary["cgF1"]["cgF1"] > 0.75
    assert summary["cgF1"]["cgF1"] == pytest.approx(summary["cgF1"]["pmF1"] * summary["cgF1"]["IL_MCC"])


def test_results_file_works_in_other_coco_tools(summary: dict[str, Any], folder: Path) -> None:
    """The printed AP can be computed from the results file by pycocotools alone."""
    truth = COCO(str(folder / "annotations.json"))
    results = truth.loadRes(str(summary["out"]))
    evaluation = COCOeval(truth, results, "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(summary["segm"]["AP"])
    found = json.loads(summary["out"].read_text())
    assert summary["instances"] == len(found) > 8
    assert set(found[0]) == {"image_id", "category_id", "segmentation", "bbox", "score"}
    assert found[0]["segmentation"]["size"] == [336, 336]


def test_true_annotations_score_one(folder: Path) -> None:
    """The annotations used as results get 1 in every metric."""
    dataset = read_dataset(folder, folder / "annotations.json")
    truth = [
        as_result(annotation, 1.0)
        for annotation in dataset.coco.dataset["annotations"]
        if not annotation["iscrowd"]
    ]
    figures = score(dataset, truth)
    assert figures["segm"]["AP"] == figures["bbox"]["AP"] == pytest.approx(1.0)
    assert figures["cgF1"]["cgF1"] == pytest.approx(1.0, abs=1e-3)


def test_empty_results_score_zero(folder: Path) -> None:
    """Without results AP and cgF1 are 0, and nothing fails."""
    figures = score(read_dataset(folder, folder / "annotations.json"), [])
    assert figures["segm"]["AP"] == figures["cgF1"]["cgF1"] == 0.0


def test_cgf1_ignores_low_scores(folder: Path) -> None:
    """A score below 0.5 counts for AP, but not for cgF1."""
    dataset = read_dataset(folder, folder / "annotations.json")
    low = [as_result(annotation, 0.4) for annotation in dataset.coco.dataset["annotations"]]
    figures = score(dataset, low)
    assert figures["segm"]["AP"] > 0.9
    assert figures["cgF1"]["cgF1"] == 0.0


SQUARE: dict[str, Any] = {
    "image_id": 7,
    "category_id": 1,
    "segmentation": [[10, 10, 30, 10, 30, 30, 10, 30]],
    "bbox": [10, 10, 20, 20],
}
"""20 px wide, in an image of 64."""


def write_truth(folder: Path, annotation: dict[str, Any], **tables: list[Any]) -> Path:
    """Write a dataset of one grey image, one category and one annotation."""
    Image.new("RGB", (64, 64), "grey").save(folder / "grey.png")
    truth = {
        "images": [{"id": 7, "file_name": "grey.png", "width": 64, "height": 64}],
        "annotations": [annotation],
        "categories": [{"id": 1, "name": "blue square"}],
    }
    path = folder / "truth.json"
    path.write_text(json.dumps(truth | tables))
    return path


def without(name: str) -> dict[str, Any]:
    """The square without one entry."""
    return {key: value for key, value in SQUARE.items() if key != name}


ROWS = np.zeros((64, 64), dtype=bool)
ROWS[10:30, 10:30] = True
RUNS = [len(list(run)) for _, run in groupby(ROWS.T.flatten().tolist())]


@pytest.mark.parametrize(
    "annotation",
    [
        {"id": 0, **SQUARE},
        without("bbox"),
        {**SQUARE, "segmentation": {"size": [64, 64], "counts": RUNS}},
    ],
    ids=["polygon, id 0", "no box", "uncompressed RLE"],
)
def test_every_kind_of_annotation_is_read(tmp_path: Path, annotation: dict[str, Any]) -> None:
    """Polygons and RLE are read, and missing fields are computed from the mask."""
    dataset = read_dataset(tmp_path, write_truth(tmp_path, annotation))
    mask: Any = rle.encode(np.asfortranarray(ROWS.astype(np.uint8)))
    found = {**SQUARE, "score": 0.9, "segmentation": {**mask, "counts": mask["counts"].decode()}}
    figures = score(dataset, [found])
    assert figures["segm"]["AP"] == figures["bbox"]["AP"] == pytest.approx(1.0)
    assert figures["cgF1"]["pmF1"] == pytest.approx(1.0, abs=1e-3)


def test_size_class_comes_from_the_mask_not_the_box(tmp_path: Path) -> None:
    """A thin mask in a large box is a small object: a false positive lowers APs, not APm."""
    dataset = read_dataset(tmp_path, write_truth(tmp_path, SQUARE))
    line = np.zeros((64, 64), dtype=np.uint8, order="F")
    line[60, :50] = 1
    mask: Any = rle.encode(line)
    stray = {"image_id": 7, "category_id": 1, "bbox": [0, 0, 60, 60], "score": 0.9}
    stray["segmentation"] = {**mask, "counts": mask["counts"].decode()}
    hit = {**SQUARE, "score": 0.8, "segmentation": dataset.coco.anns[1]["segmentation"]}
    assert score(dataset, [stray, hit])["segm"]["APs"] == pytest.approx(0.5)


def test_crowds_do_not_count_as_objects(tmp_path: Path) -> None:
    """AP ignores a crowd region, and cgF1 counts it as absent."""
    dataset = read_dataset(tmp_path, write_truth(tmp_path, {**SQUARE, "iscrowd": 1}))
    figures = score(dataset, [])
    assert figures["segm"]["AP"] == -1
    assert figures["cgF1"]["IL_MCC"] == figures["cgF1"]["pmF1"] == 0.0


def test_two_categories_may_share_a_name(folder: Path, tmp_path: Path) -> None:
    """Two categories with one name get the same instances."""
    truth = json.loads((folder / "annotations.json").read_text())
    name = truth["categories"][truth["annotations"][0]["category_id"] - 1]["name"]
    truth["categories"] = [{"id": 1, "name": name}, {"id": 2, "name": name}]
    truth["annotations"] = []
    (tmp_path / "twins.json").write_text(json.dumps(truth))
    ended = accuracy(folder, tmp_path / "twins.json", tmp_path / "r.json", "--limit", "1")
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / "r.json").read_text())
    of_category = [
        [each["segmentation"] for each in found if each["category_id"] == number] for number in (1, 2)
    ]
    assert of_category[0]
    assert of_category[0] == of_category[1]


def test_limit_scores_only_the_first_images(folder: Path, tmp_path: Path) -> None:
    """--limit predicts and scores the first images only."""
    ended = accuracy(folder, folder / "annotations.json", tmp_path / "r.json", "--limit", "2")
    assert ended.returncode == 0, ended.stderr
    assert {each["image_id"] for each in json.loads((tmp_path / "r.json").read_text())} == {1, 2}
    assert json.loads((tmp_path / "r.summary.json").read_text())["segm"]["AP"] > 0.8


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "is not a COCO file: the whole file"),
        ("[]", "is not a COCO file: the whole file"),
        ('{"images": [], "annotations": [], "categories": []}', "is not a COCO file: images: "),
    ],
)
def test_other_files_than_coco_are_refused(tmp_path: Path, content: str, sentence: str) -> None:
    """A file that is not COCO is refused in one sentence, with exit status 2, and nothing is written."""
    (tmp_path / "bad.json").write_text(content)
    ended = accuracy(tmp_path, tmp_path / "bad.json", tmp_path / "out" / "r.json")
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("cannot score: ")
    assert sentence in ended.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("annotation", "sentence"),
    [
        (without("image_id"), "annotations.0.image_id: Field required"),
        (without("segmentation"), "annotations.0.segmentation: Field required"),
        (SQUARE | {"segmentation": []}, "annotations.0.segmentation.polygons"),
        (SQUARE | {"segmentation": [[1, 1, 9, 9]]}, "annotations.0.segmentation.polygons.0"),
        (SQUARE | {"segmentation": None}, "annotations.0.segmentation.rle"),
        (SQUARE | {"segmentation": {"size": [5, 5], "counts": [25]}}, "not its image's size"),
        (SQUARE | {"image_id": 8}, "that is not listed"),
        (SQUARE | {"category_id": 8}, "that is not listed"),
    ],
)
def test_bad_annotations_are_refused(tmp_path: Path, annotation: dict[str, Any], sentence: str) -> None:
    """The error names the bad annotation and its fault."""
    with pytest.raises(DatasetError) as caught:
        read_dataset(tmp_path, write_truth(tmp_path, annotation))
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        ({"file_name": "no.png"}, "no.png is missing"),
        ({"file_name": "truth.json"}, "truth.json cannot be read: cannot identify"),
        ({"width": 9}, "annotated as (9, 64)"),
    ],
)
def test_bad_images_are_refused(tmp_path: Path, image: dict[str, Any], sentence: str) -> None:
    """The error names an image that is missing, damaged or of another size."""
    images = [{"id": 7, "file_name": "grey.png", "width": 64, "height": 64} | image]
    truth = write_truth(tmp_path, SQUARE, images=images, annotations=[])
    ended = accuracy(tmp_path, truth, tmp_path / "r.json")
    assert ended.returncode == 2
    assert sentence in ended.stderr.splitlines()[-1]
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("--limit", "0", "1 or more"),
        ("--threshold", "0.5", "must be at least 0 and below 0.5"),
        ("--device", "gpu", "invalid choice"),
        ("--weights", "no/such/file", "cannot score: no weights at no/such/file"),
        ("--out", "Makefile/r.json", "cannot score: "),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, option: str, value: str, sentence: str) -> None:
    """A wrong option is refused before the first prediction."""
    ended = accuracy(tmp_path, write_truth(tmp_path, SQUARE), tmp_path / "r.json", option, value)
    assert ended.returncode == 2
    assert sentence in ended.stderr.splitlines()[-1]
    assert "images:" not in ended.stderr
