"""The accuracy command over a COCO-format folder that the tests draw."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from benchmarks.accuracy import read_dataset, score
from benchmarks.drawn_coco import draw
from local_server import ROOT

if TYPE_CHECKING:
    from pathlib import Path


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
    """An annotation, handed in as a result."""
    kept = ("image_id", "category_id", "segmentation", "bbox")
    return {name: annotation[name] for name in kept} | {"score": score}


@pytest.fixture(scope="module")
def summary(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command writes about the demo checkpoint, and where its results lie."""
    out = tmp_path_factory.mktemp("out") / "new" / "results.json"
    ended = accuracy(folder, folder / "annotations.json", out)
    assert ended.returncode == 0, ended.stderr
    written: dict[str, Any] = json.loads((out.parent / "results.summary.json").read_text())
    assert f"AP {written['segm']['AP']:.3f}" in ended.stdout
    assert f"cgF1 {written['cgF1']['cgF1']:.3f}" in ended.stdout
    return written | {"out": out}


def test_demo_checkpoint_is_good_at_drawn_scenes(summary: dict[str, Any]) -> None:
    """The demo checkpoint finds what it learnt, with masks that fit."""
    assert (summary["checkpoint"], summary["images"], summary["prompts"]) == ("demo", 8, 48)
    assert summary["segm"]["AP"] > 0.9
    assert summary["bbox"]["AP50"] > 0.9
    assert summary["cgF1"]["cgF1"] > 0.75
    assert summary["cgF1"]["cgF1"] == pytest.approx(summary["cgF1"]["pmF1"] * summary["cgF1"]["IL_MCC"])


def test_results_are_any_coco_tools(summary: dict[str, Any], folder: Path) -> None:
    """The results file, read by pycocotools alone, gives the AP that was printed."""
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


def test_truth_scores_one(folder: Path) -> None:
    """The annotations handed in as results are perfect by every measure."""
    dataset = read_dataset(folder, folder / "annotations.json")
    truth = [
        {name: annotation[name] for name in ("image_id", "category_id", "segmentation", "bbox")}
        | {"score": 1.0}
        for annotation in dataset.coco.dataset["annotations"]
        if not annotation["iscrowd"]
    ]
    figures = score(dataset, truth)
    assert figures["segm"]["AP"] == figures["bbox"]["AP"] == pytest.approx(1.0)
    assert figures["cgF1"]["cgF1"] == pytest.approx(1.0, abs=1e-3)


def test_nothing_found_scores_nothing(folder: Path) -> None:
    """No results at all are AP 0 and cgF1 0, not a crash."""
    figures = score(read_dataset(folder, folder / "annotations.json"), [])
    assert figures["segm"]["AP"] == figures["cgF1"]["cgF1"] == 0.0


def test_unsure_instances_are_not_for_cgf1(folder: Path) -> None:
    """What scores under 0.5 counts for AP, and is unseen by cgF1."""
    dataset = read_dataset(folder, folder / "annotations.json")
    unsure = [
        {name: annotation[name] for name in ("image_id", "category_id", "segmentation", "bbox")}
        | {"score": 0.4}
        for annotation in dataset.coco.dataset["annotations"]
    ]
    figures = score(dataset, unsure)
    assert figures["segm"]["AP"] > 0.9
    assert figures["cgF1"]["cgF1"] == 0.0


def test_polygons_and_bare_annotations(tmp_path: Path) -> None:
    """Polygons, and annotations without area, iscrowd or an id above 0, are read."""
    square = {"image_id": 7, "category_id": 1, "bbox": [10, 10, 20, 20]}
    polygon = [[10, 10, 30, 10, 30, 30, 10, 30]]
    (tmp_path / "truth.json").write_text(
        json.dumps(
            {
                "images": [{"id": 7, "file_name": "a.png", "width": 64, "height": 64}],
                "annotations": [{"id": 0, "segmentation": polygon, **square}],
                "categories": [{"id": 1, "name": "square"}],
            }
        )
    )
    dataset = read_dataset(tmp_path, tmp_path / "truth.json")
    [annotation] = dataset.coco.dataset["annotations"]
    mask = dataset.coco.annToRLE(annotation)
    found = {**square, "score": 0.9, "segmentation": {**mask, "counts": mask["counts"].decode()}}
    figures = score(dataset, [found])
    assert figures["segm"]["AP"] == figures["bbox"]["AP"] == pytest.approx(1.0)


def test_limit(folder: Path, tmp_path: Path) -> None:
    """--limit asks for the first images, and scores those alone."""
    ended = accuracy(folder, folder / "annotations.json", tmp_path / "r.json", "--limit", "2")
    assert ended.returncode == 0, ended.stderr
    assert {each["image_id"] for each in json.loads((tmp_path / "r.json").read_text())} == {1, 2}
    assert json.loads((tmp_path / "r.summary.json").read_text())["segm"]["AP"] > 0.8


def one_image(file_name: str) -> str:
    """A dataset of one image of 9 px and one category."""
    image = {"id": 1, "file_name": file_name, "width": 9, "height": 9}
    return json.dumps({"images": [image], "annotations": [], "categories": [{"id": 1, "name": "cat"}]})


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "cannot be read"),
        ("[]", "is no COCO file"),
        ('{"images": [], "annotations": []}', "is no COCO file"),
        ('{"images": [], "annotations": [], "categories": []}', "names no image"),
        (one_image("no.png"), "no.png cannot be read"),
        (one_image("000001.png"), "annotated as (9, 9)"),
    ],
)
def test_bad_folders(folder: Path, tmp_path: Path, content: str, sentence: str) -> None:
    """What is no COCO folder is told in one sentence, with the exit status 2."""
    (tmp_path / "bad.json").write_text(content)
    ended = accuracy(folder, tmp_path / "bad.json", tmp_path / "r.json")
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("cannot score: ")
    assert sentence in ended.stderr
    assert not (tmp_path / "r.json").exists()
