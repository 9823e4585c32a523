"""Evaluate a checkpoint through `SAM3Predictor`: `python -m training.evaluate`.

New scenes, drawn on the CPU from seeds that no training run uses, are segmented as an upload would be, at
the default threshold. Writes a JSON report; exits 1 when a figure misses its target.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from PIL import Image
from tqdm import tqdm

from sam3_runner.predictor import SAM3Predictor
from sam3_runner.prompts import ConceptPrompt
from sam3_runner.weights.checkpoint import DEMO, DEMO_FOLDER
from training.concepts import (
    PROMPT_SEEDS,
    PROMPT_UNIFORMS,
    PROMPTS_PER_SCENE,
    kind_of,
    name_of,
    sample_prompts,
)
from training.exemplars import EXEMPLAR_KINDS, EXEMPLAR_SEEDS, EXEMPLAR_UNIFORMS, sample_exemplars
from training.scenes import MAX_OBJECTS, draw_scenes
from training.score import HIT_IOU, Overlaps, Tally

if TYPE_CHECKING:
    from sam3_runner.instances import PredictResult
    from training.concepts import ScenePrompts
    from training.exemplars import Exemplars
    from training.scenes import Pictures, Scenes

FIRST_SEED = 800_000_000
"""Evaluation scenes have seeds from this one on; training and validation use other seeds."""

SQUARE = "336x336"
TARGETS = {
    SQUARE: {"f1": 0.92, "mean_iou_of_hits": 0.90, "presence_accuracy": 0.97},
    "640x480": {"f1": 0.85},
    "1920x1080": {"f1": 0.85},
    "500x1200": {"f1": 0.85},
}
EXEMPLAR_TARGETS = dict.fromkeys(EXEMPLAR_KINDS, 0.85)
"""F1 of each kind of exemplar task."""
UNKNOWN_PROMPTS = ("dog", "a person riding a bicycle", "red car", "the blue house", "green apples", "hexagon")
"""Words without a meaning in the scenes; one more prompt for each square scene, with figures of its own."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture, its T tasks, and the ground truth.

    Attributes:
        owner: (H, W) uint8, see `Pictures`.
        matching: (T, 7) bool.
        counted: (7,) bool.
    """

    picture: Image.Image
    prompts: list[ConceptPrompt]
    kinds: list[str]
    owner: np.ndarray
    matching: np.ndarray
    counted: np.ndarray


def make_sample(seed: int, *, width: int, height: int) -> Sample | None:
    """The scene of one seed with four text prompts; None if no object in it counts."""
    scenes, pictures = draw_scenes(1, seed, width=width, height=height)
    if not pictures.counted.any():
        return None
    sampled = _text_prompts(scenes, pictures, seed)
    concepts = sampled.concept[0].tolist()
    rng = random.Random(seed)  # noqa: S311 - reproducible on purpose
    names = [name_of(concept, plural=rng.random() < 0.5) for concept in concepts]
    texts = [rng.choice((str.lower, str.upper, str.capitalize))(name) for name in names]
    return Sample(
        picture=_picture(pictures),
        prompts=[ConceptPrompt(text) for text in texts],
        kinds=[kind_of(concept) for concept in concepts],
        owner=pictures.owner[0].numpy(),
        matching=sampled.matching[0].numpy(),
        counted=pictures.counted[0].numpy(),
    )


def make_exemplar_sample(seed: int, *, width: int, height: int) -> Sample | None:
    """A scene with alike objects: an exemplar task of each kind, and four text prompts beside them."""
    scenes, pictures = draw_scenes(1, seed, width=width, height=height, alike_share=1.0)
    if not pictures.counted.any():
        return None
    generator = torch.Generator().manual_seed(seed + EXEMPLAR_SEEDS)
    uniforms = torch.rand(1, len(EXEMPLAR_KINDS), EXEMPLAR_UNIFORMS, generator=generator)
    exemplars = sample_exemplars(scenes, pictures, torch.arange(len(EXEMPLAR_KINDS))[None], uniforms)
    texts = _text_prompts(scenes, pictures, seed)
    prompts = [_concept_prompt(exemplars, row, width, height) for row in range(len(EXEMPLAR_KINDS))]
    prompts += [ConceptPrompt(name_of(concept, plural=False)) for concept in texts.concept[0].tolist()]
    return Sample(
        picture=_picture(pictures),
        prompts=prompts,
        kinds=[*EXEMPLAR_KINDS, *["text alone"] * PROMPTS_PER_SCENE],
        owner=pictures.owner[0].numpy(),
        matching=torch.cat([exemplars.matching[0], texts.matching[0]]).numpy(),
        counted=pictures.counted[0].numpy(),
    )


def _text_prompts(scenes: Scenes, pictures: Pictures, seed: int) -> ScenePrompts:
    generator = torch.Generator().manual_seed(seed + PROMPT_SEEDS)
    return sample_prompts(scenes, pictures, torch.rand(1, PROMPT_UNIFORMS, generator=generator))


def _concept_prompt(exemplars: Exemplars, row: int, width: int, height: int) -> ConceptPrompt:
    """Task number `row` as a caller sends it, with boxes in px."""
    valid = exemplars.boxes_valid[0, row]
    center, size = exemplars.boxes[0, row][valid].double().chunk(2, dim=1)
    side = torch.tensor([width, height])
    corners = torch.cat([(center - size / 2) * side, (center + size / 2) * side], dim=1)
    return ConceptPrompt(
        name_of(int(exemplars.concept[0, row]), plural=False) if exemplars.has_text[0, row] else None,
        tuple((x0, y0, x1, y1) for x0, y0, x1, y1 in corners.tolist()),
        tuple(bool(label) for label in exemplars.labels[0, row][valid]),
    )


def _picture(pictures: Pictures) -> Image.Image:
    return Image.fromarray(pictures.pixels[0].round().to(torch.uint8).permute(1, 2, 0).numpy())


def compare(sample: Sample, prompt: int, result: PredictResult) -> Overlaps:
    """Pixels that the instances of prompt number `prompt` share with the scene's objects."""
    intersections = np.zeros((len(result.instances), MAX_OBJECTS + 1))
    for row, instance in enumerate(result.instances):
        owners = sample.owner[instance.mask.window][instance.mask.array()]
        intersections[row] = np.bincount(owners, minlength=MAX_OBJECTS + 1)
    areas = np.bincount(sample.owner.ravel(), minlength=MAX_OBJECTS + 1)
    return Overlaps(
        intersections=intersections[:, 1:],
        predicted=intersections.sum(axis=1),
        visible=areas[1:].astype(np.float64),
        matching=sample.matching[prompt],
        counted=sample.counted,
    )


def evaluate_size(
    predictor: SAM3Predictor,
    *,
    width: int,
    height: int,
    scenes: int,
    first_seed: int,
    unknown: bool = False,
    exemplars: bool = False,
) -> dict[str, Any]:
    """Figures over `scenes` scenes of one size, overall and for each kind of prompt.

    Args:
        predictor: loaded.
        width: of the pictures in px.
        height: of the pictures in px.
        scenes: number of scenes with an object that counts.
        first_seed: the first scene's; the following seeds are used in order.
        unknown: add one of `UNKNOWN_PROMPTS` to each scene.
        exemplars: the tasks are those of `make_exemplar_sample`.
    """
    make = make_exemplar_sample if exemplars else make_sample
    tallies = {"all": Tally()}
    false_positives, seed, done = 0, first_seed, 0
    with tqdm(total=scenes, desc=f"{width}x{height}", disable=None) as bar:
        while done < scenes:
            sample = make(seed, width=width, height=height)
            seed += 1
            if sample is None:
                continue
            extra = [UNKNOWN_PROMPTS[done % len(UNKNOWN_PROMPTS)]] if unknown else []
            results = predictor.predict_batch(sample.picture, [*sample.prompts, *extra])
            for prompt, kind in enumerate(sample.kinds):
                overlaps = compare(sample, prompt, results[prompt])
                for key in ("all", kind):
                    tallies.setdefault(key, Tally()).add(overlaps)
            false_positives += sum(bool(result.instances) for result in results[len(sample.prompts) :])
            done += 1
            bar.update()
    figures: dict[str, Any] = {
        "scenes": done,
        "seeds": [first_seed, seed - 1],
        **tallies.pop("all").figures(),
    }
    if unknown:
        figures["strange_prompts"] = {"prompts": done, "found_something": false_positives}
    return figures | {"kinds": {kind: tally.figures() for kind, tally in sorted(tallies.items())}}


def evaluate(checkpoint: str, device: str | None, scenes: int, scenes_per_size: int) -> dict[str, Any]:
    """The whole report."""
    predictor = SAM3Predictor(checkpoint, device)
    predictor.load()
    assert predictor.checkpoint is not None
    started_s = time.monotonic()
    sizes: dict[str, Any] = {}
    for index, size in enumerate(TARGETS):
        width, height = map(int, size.split("x"))
        square = size == SQUARE
        sizes[size] = evaluate_size(
            predictor,
            width=width,
            height=height,
            scenes=scenes if square else scenes_per_size,
            first_seed=FIRST_SEED + index * 1_000_000,
            unknown=square,
        )
    width, height = map(int, SQUARE.split("x"))
    exemplars = evaluate_size(
        predictor,
        width=width,
        height=height,
        scenes=scenes_per_size,
        first_seed=FIRST_SEED + len(TARGETS) * 1_000_000,
        exemplars=True,
    )
    missed = [
        f"{size} {name}: {sizes[size][name]} < {least}"
        for size, targets in TARGETS.items()
        for name, least in targets.items()
        if sizes[size][name] < least
    ]
    missed += [
        f"{kind} f1: {exemplars['kinds'][kind]['f1']} < {least}"
        for kind, least in EXEMPLAR_TARGETS.items()
        if exemplars["kinds"][kind]["f1"] < least
    ]
    return {
        "weights_sha256": hashlib.sha256(predictor.checkpoint.weights_file.read_bytes()).hexdigest(),
        "parameters": predictor.parameters,
        "score_threshold": predictor.score_threshold,
        "hit_iou": HIT_IOU,
        "targets": TARGETS | {"exemplars": {kind: {"f1": least} for kind, least in EXEMPLAR_TARGETS.items()}},
        "targets_missed": missed,
        "sizes": sizes,
        "exemplars": exemplars,
        "device": _device_name(predictor.device),
        "dtype": predictor.dtype,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "seconds": round(time.monotonic() - started_s, 1),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def main() -> None:
    """Evaluate and write the report; exit 1 when a target is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default=DEMO, help="`demo` or a transformers folder")
    parser.add_argument("--device", help="cuda or cpu; default: cuda if there is one")
    parser.add_argument("--scenes", type=int, default=1000, help="square scenes")
    parser.add_argument("--scenes-per-size", type=int, default=200, help="scenes of each other size")
    parser.add_argument("--report", type=Path, default=DEMO_FOLDER / "report.json")
    arguments = parser.parse_args()
    report = evaluate(arguments.checkpoint, arguments.device, arguments.scenes, arguments.scenes_per_size)
    arguments.report.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for size, figures in report["sizes"].items():
        print(size, {name: figures[name] for name in TARGETS[SQUARE]})  # noqa: T201
    for kind, figures in sorted(report["exemplars"]["kinds"].items()):
        print(f"exemplars, {kind}: F1 {figures['f1']}")  # noqa: T201
    if report["targets_missed"]:
        sys.exit("missed: " + "; ".join(report["targets_missed"]))


if __name__ == "__main__":
    main()
