"""Scores predictions against objects, one prompt at a time, and sums the scores over prompts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's usual alias
from scipy.optimize import linear_sum_assignment

from sam3_runner.instances import SCORE_THRESHOLD
from sam3_runner.network.masks import mask_logits
from training.architecture import SIDE_PX
from training.concepts import (
    PROMPT_SEEDS,
    PROMPT_UNIFORMS,
    PROMPTS_PER_SCENE,
    PromptTokens,
    kind_of,
    sample_prompts,
)
from training.exemplars import EXEMPLAR_KINDS, EXEMPLAR_SEEDS, EXEMPLAR_UNIFORMS, sample_exemplars
from training.scenes import MAX_OBJECTS, draw_scenes

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt
    from torch import Tensor

    from sam3_runner.network.model import SAM3Network
    from training.scenes import Pictures

HIT_IOU = 0.5
_SCENES_PER_BATCH = 32


@dataclass(frozen=True, slots=True)
class Overlaps:
    """One prompt's K predictions and the scene's 7 objects, in pixels.

    Attributes:
        intersections: (K, 7), pixels that a prediction shares with an object.
        predicted, visible: (K,) and (7,), pixels of each.
        matching, counted: (7,) bool; a matching object that does not count is neither a hit nor a miss.
    """

    intersections: npt.NDArray[np.float64]
    predicted: npt.NDArray[np.float64]
    visible: npt.NDArray[np.float64]
    matching: npt.NDArray[np.bool_]
    counted: npt.NDArray[np.bool_]


@dataclass(slots=True)
class Tally:
    """Sums over prompts."""

    hits: int = 0
    missed: int = 0
    false: int = 0
    presence_right: int = 0
    prompts: int = 0
    ious: list[float] = field(default_factory=list)

    def add(self, overlaps: Overlaps) -> None:
        """Add one prompt: the best one-to-one assignment of predictions to objects, at IoU 0.5."""
        targets = overlaps.matching & overlaps.counted
        intersections = overlaps.intersections[:, targets]
        unions = overlaps.predicted[:, None] + overlaps.visible[targets] - intersections
        iou = intersections / unions.clip(min=1.0)
        rows, columns = linear_sum_assignment(np.where(iou >= HIT_IOU, iou, 0.0), maximize=True)
        best = iou[rows, columns]
        hit = best >= HIT_IOU
        # A prediction that is mostly on matching objects that do not count is not scored.
        uncounted = overlaps.intersections[:, overlaps.matching & ~overlaps.counted].sum(axis=1)
        false = uncounted < 0.5 * overlaps.predicted.clip(min=1.0)
        false[rows[hit]] = False
        self.ious.extend(best[hit].tolist())
        self.hits += int(hit.sum())
        self.missed += int(targets.sum()) - int(hit.sum())
        self.false += int(false.sum())
        self.presence_right += int((len(iou) > 0) == bool(targets.any()))
        self.prompts += 1

    def figures(self) -> dict[str, float | int]:
        """F1, precision, recall, mean IoU of hits, presence accuracy, and the counts behind them."""
        predictions, objects = self.hits + self.false, self.hits + self.missed
        return {
            "f1": round(2 * self.hits / max(predictions + objects, 1), 4),
            "precision": round(self.hits / max(predictions, 1), 4),
            "recall": round(self.hits / max(objects, 1), 4),
            "mean_iou_of_hits": round(float(np.mean(self.ious)) if self.ious else 0.0, 4),
            "presence_accuracy": round(self.presence_right / max(self.prompts, 1), 4),
            "prompts": self.prompts,
            "objects": objects,
            "hits": self.hits,
            "missed": self.missed,
            "false": self.false,
        }


@torch.no_grad()
def score_weights(network: SAM3Network, *, scenes: int, seed: int, device: str) -> dict[str, Tally]:
    """Score a model on new square scenes, without `SAM3Predictor`: for the log of a training run.

    "all" sums the text prompts. The exemplar tasks are on scenes of their own, with many objects alike.
    """
    tokens, tallies = PromptTokens(device), {"all": Tally()}
    for start in range(0, scenes, _SCENES_PER_BATCH):
        _score_texts(network, tokens, seed + start, device, tallies)
        _score_exemplars(network, tokens, seed + start, device, tallies)
    return tallies


def _score_texts(
    network: SAM3Network, tokens: PromptTokens, seed: int, device: str, tallies: dict[str, Tally]
) -> None:
    generator = torch.Generator(device).manual_seed(seed + PROMPT_SEEDS)
    drawn, pictures = draw_scenes(_SCENES_PER_BATCH, seed, width=SIDE_PX, height=SIDE_PX, device=device)
    uniforms = torch.rand(_SCENES_PER_BATCH, PROMPT_UNIFORMS, generator=generator, device=device)
    sampled = sample_prompts(drawn, pictures, uniforms)
    words = torch.rand(_SCENES_PER_BATCH * PROMPTS_PER_SCENE, 7, generator=generator, device=device)
    text = tokens.encode(sampled.concept.flatten(), words)
    found = kept_masks(network, pictures.pixels.round().to(torch.uint8), *text)
    for prompt, overlaps in _overlaps(found, pictures, sampled.matching):
        for key in ("all", kind_of(int(sampled.concept.flatten()[prompt]))):
            tallies.setdefault(key, Tally()).add(overlaps)


def _score_exemplars(
    network: SAM3Network, tokens: PromptTokens, seed: int, device: str, tallies: dict[str, Tally]
) -> None:
    generator = torch.Generator(device).manual_seed(seed + EXEMPLAR_SEEDS)
    drawn, pictures = draw_scenes(
        _SCENES_PER_BATCH, seed, width=SIDE_PX, height=SIDE_PX, device=device, alike_share=1.0
    )
    tasks = (_SCENES_PER_BATCH, len(EXEMPLAR_KINDS))
    kind = torch.arange(tasks[1], device=device).expand(tasks)
    uniforms = torch.rand(*tasks, EXEMPLAR_UNIFORMS, generator=generator, device=device)
    sampled = sample_exemplars(drawn, pictures, kind, uniforms)
    words = torch.rand(math.prod(tasks), 7, generator=generator, device=device)
    text = tokens.replace_visual(
        *tokens.encode(sampled.concept.flatten(), words), ~sampled.has_text.flatten()
    )
    boxes = (sampled.boxes.flatten(0, 1), sampled.labels.flatten(0, 1), sampled.boxes_valid.flatten(0, 1))
    found = kept_masks(network, pictures.pixels.round().to(torch.uint8), *text, boxes)
    for task, overlaps in _overlaps(found, pictures, sampled.matching):
        tallies.setdefault(EXEMPLAR_KINDS[task % tasks[1]], Tally()).add(overlaps)


def _overlaps(
    found: tuple[Tensor, Tensor], pictures: Pictures, matching: Tensor
) -> Iterator[tuple[int, Overlaps]]:
    """Each task of the scenes in which an object counts, with its `Overlaps`; `matching` is (B, T, 7)."""
    masks, tasks = found
    per_scene = matching.shape[1]
    visible = F.one_hot(pictures.owner.flatten(1).long(), MAX_OBJECTS + 1)[..., 1:].float()
    intersections = torch.einsum("kn,kno->ko", masks.flatten(1).float(), visible[tasks // per_scene])
    predicted, areas = masks.sum(dim=(1, 2)).cpu().numpy(), visible.sum(dim=1).cpu().numpy()
    rows, task_of_row = intersections.cpu().numpy(), tasks.cpu().numpy()
    wanted, counted = matching.flatten(0, 1).cpu().numpy(), pictures.counted.cpu().numpy()
    for task in range(len(wanted)):
        scene, own = task // per_scene, task_of_row == task
        if counted[scene].any():
            yield task, Overlaps(rows[own], predicted[own], areas[scene], wanted[task], counted[scene])


def kept_masks(
    network: SAM3Network,
    pixels: Tensor,
    ids: Tensor,
    valid: Tensor,
    exemplars: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Kept masks (K, S, S) bool and their tasks (K,), of equally many tasks for each picture.

    Args:
        network: on the device of the tensors.
        pixels: (B, 3, S, S) uint8.
        ids: (P, L) of the texts.
        valid: (P, L) bool.
        exemplars: boxes (P, 5, 4), labels and validity (P, 5), as in `Exemplars`; None: texts alone.
    """
    scene = torch.arange(len(ids), device=ids.device) // (len(ids) // len(pixels))
    image, text = network.encode_image(pixels), network.encode_text(ids, valid)
    tokens, tokens_valid = image.geometry_token[scene], None
    if exemplars is not None:
        tokens, tokens_valid = network.encode_boxes(image.coarse[scene], *exemplars)
    detections = network.decode(
        image.attended[scene], tokens, text.tokens, text.valid, geometry_valid=tokens_valid
    )
    pair, query = (detections.scores > SCORE_THRESHOLD).nonzero(as_tuple=True)
    features = network.pixel_features(
        detections.fused,
        detections.prompt,
        detections.prompt_valid,
        tuple(level[scene] for level in image.finer),
    )
    grids = mask_logits(*network.mask_decoder.embed(detections.queries[-1]), features)
    logits = F.interpolate(
        grids[pair, query][:, None], pixels.shape[-2:], mode="bilinear", align_corners=False
    )
    return logits[:, 0] > 0.0, pair
