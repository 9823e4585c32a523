r"""Measure a checkpoint's accuracy on a COCO-format folder, through SAM3Predictor.

Each category's name is a prompt for each image. Writes the instances as COCO results with RLE masks, which
any COCO tool can score. Prints AP (pycocotools, masks and boxes) and cgF1 (benchmarks/cgf1.py).

    python -m benchmarks.accuracy --images val2017 --annotations instances_val2017.json \
        --weights weights/sam3.pt

AP counts instances with a score above --threshold; the official evaluation uses 0.3. cgF1 counts those with a
score of 0.5 or more. benchmarks.drawn_coco draws a folder for the demo checkpoint, if you do not have COCO.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from benchmarks.cgf1 import MIN_SCORE, ConceptTally
from benchmarks.coco import Dataset, DatasetError, read_dataset
from sam3_runner import PredictResult, SAM3Error

if TYPE_CHECKING:
    from sam3_runner import SAM3Predictor

AP_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""The order of COCOeval.stats."""


def predict(dataset: Dataset, predictor: SAM3Predictor) -> list[dict[str, Any]]:
    """Find every instance of every category in every image; returns COCO results."""
    found = []
    prompts = dataset.prompts
    for image_id in tqdm(dataset.image_ids, desc="images", disable=None):
        results = predictor.predict_batch(dataset.image(image_id), list(prompts.values()))
        for category_id, result in zip(prompts, results, strict=True):
            found.extend(_coco_results(image_id, category_id, result))
    return found


def score(dataset: Dataset, found: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Compute AP of masks and boxes, and cgF1, of COCO results."""
    return {
        "segm": _average_precision(dataset, found, "segm"),
        "bbox": _average_precision(dataset, found, "bbox"),
        "cgF1": _concept_f1(dataset, found),
    }


def _coco_results(image_id: int, category_id: int, result: PredictResult) -> list[dict[str, Any]]:
    found = []
    for instance in result.instances:
        mask = np.zeros((result.image_height, result.image_width), dtype=np.uint8, order="F")
        mask[instance.mask.window] = instance.mask.array()
        encoded: Any = rle.encode(mask)
        left, top, right, bottom = instance.box
        found.append(
            {
                "image_id": image_id,
                "category_id": category_id,
                "segmentation": {"size": encoded["size"], "counts": encoded["counts"].decode()},
                "bbox": [round(side, 2) for side in (left, top, right - left, bottom - top)],
                "score": instance.score,
            }
        )
    return found


def _average_precision(dataset: Dataset, found: list[dict[str, Any]], kind: str) -> dict[str, float]:
    with contextlib.redirect_stdout(io.StringIO()):
        results = _coco_index(dataset, found, kind)
        evaluation = COCOeval(dataset.coco, results, kind)
        evaluation.params.imgIds = dataset.image_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(AP_NAMES, evaluation.stats.tolist(), strict=True))


def _coco_index(dataset: Dataset, found: list[dict[str, Any]], kind: str) -> Any:
    if not found:  # loadRes cannot take an empty list
        empty = COCO()
        empty.dataset = {**dataset.coco.dataset, "annotations": []}
        empty.createIndex()
        return empty
    # loadRes changes its argument. If a result has a box, it uses the box's area for the mask's.
    excluded = "bbox" if kind == "segm" else "segmentation"
    return dataset.coco.loadRes([{name: each[name] for name in each if name != excluded} for each in found])


def _concept_f1(dataset: Dataset, found: list[dict[str, Any]]) -> dict[str, float]:
    predicted: dict[tuple[int, int], list[Any]] = {}
    for each in found:
        if each["score"] >= MIN_SCORE:
            predicted.setdefault((each["image_id"], each["category_id"]), []).append(each["segmentation"])
    truth: dict[tuple[int, int], list[Any]] = {}
    for annotation in dataset.coco.anns.values():
        if not annotation["iscrowd"]:
            pair = annotation["image_id"], annotation["category_id"]
            truth.setdefault(pair, []).append(annotation["segmentation"])
    tally = ConceptTally()
    for image_id in dataset.image_ids:
        for category_id in dataset.prompts:
            pair = image_id, category_id
            masks, objects = predicted.get(pair, []), truth.get(pair, [])
            ious = rle.iou(masks, objects, [0] * len(objects)) if masks and objects else []
            tally.add(np.asarray(ious, dtype=np.float64).reshape(len(masks), len(objects)))
    return tally.figures()


def main() -> int:
    """Predict, score, write the files and print."""
    arguments = _parse()
    try:
        dataset = read_dataset(arguments.images, arguments.annotations, arguments.limit)
        # Fails before the work, which may take hours.
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        from sam3_runner import SAM3Predictor  # noqa: PLC0415 - imports torch, which takes seconds

        predictor = SAM3Predictor(arguments.weights, arguments.device, score_threshold=arguments.threshold)
        predictor.load()
        found = predict(dataset, predictor)
        arguments.out.write_text(json.dumps(found), encoding="utf-8")
    except (DatasetError, SAM3Error, OSError) as error:
        sys.stderr.write(f"cannot score: {error}\n")
        return 2
    assert predictor.checkpoint is not None
    summary = {
        "checkpoint": predictor.checkpoint.name,
        "device": str(predictor.device),
        "dtype": predictor.dtype,
        "images": len(dataset.image_ids),
        "prompts": len(dataset.prompts),
        "instances": len(found),
        "score_threshold": {"AP": arguments.threshold, "cgF1": MIN_SCORE},
        **score(dataset, found),
    }
    summary_path = arguments.out.with_suffix(".summary.json")
    summary_path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    _print(summary)
    sys.stdout.write(f"results: {arguments.out}\nsummary: {summary_path}\n")
    return 0


def _print(summary: dict[str, Any]) -> None:
    sys.stdout.write(
        f"{summary['checkpoint']}: {summary['instances']} instances of {summary['prompts']} prompts "
        f"in {summary['images']} images\n"
    )
    for kind in ("segm", "bbox", "cgF1"):
        # COCOeval returns -1 if there is no object of this size.
        figures = [
            f"{name} {'-' if value == -1 else f'{value:.3f}'}" for name, value in summary[kind].items()
        ]
        sys.stdout.write(f"{kind:6}" + "  ".join(figures) + "\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True, help="folder of the images")
    parser.add_argument("--annotations", type=Path, required=True, help="COCO instances, a JSON file")
    parser.add_argument("--weights", default="demo", help="as SAM3_WEIGHTS_PATH")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    parser.add_argument("--threshold", type=_threshold, default=0.3, help="minimum score for AP")
    parser.add_argument("--limit", type=_count, help="number of images; default: all")
    parser.add_argument("--out", type=Path, default=Path("data/accuracy/results.json"))
    return parser.parse_args()


def _threshold(text: str) -> float:
    if not 0 <= float(text) < MIN_SCORE:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below {MIN_SCORE}, the threshold of cgF1")
    return float(text)


def _count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
