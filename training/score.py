"""What counts as found: predictions against objects, one prompt at a time, and the sums over prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name that every PyTorch reader knows
from scipy.optimize import linear_sum_assignment

from sam3_runner.checkpoint import SCORE_THRESHOLD
from sam3_runner.model import decode_masks, decode_prompts, draw_masks, encode_image, encode_text
from training.concepts import PROMPT_SEEDS, PROMPT_UNIFORMS, PROMPTS_PER_SCENE, PromptTokens, ask, kind_of
from training.scenes import MAX_OBJECTS, draw_scenes

if TYPE_CHECKING:
    from typing import Any

    import numpy.typing as npt
    from torch import Tensor

HIT_IOU = 0.5


@dataclass(frozen=True, slots=True)
class Overlaps:
    """One prompt's K predictions over the scene's 7 objects, in pixels.

    Attributes:
        common: (K, 7), pixels of the prediction that show the object.
        predicted, shown: (K,) and (7,), pixels of each.
        wanted, counted: (7,) bool; a wanted object that does not count is neither to find nor to avoid.
    """

    common: npt.NDArray[np.float64]
    predicted: npt.NDArray[np.float64]
    shown: npt.NDArray[np.float64]
    wanted: npt.NDArray[np.bool_]
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
        """Count one prompt: the best one-to-one pairing of predictions with objects, at IoU 0.5."""
        goals = overlaps.wanted & overlaps.counted
        common = overlaps.common[:, goals]
        iou = common / (overlaps.predicted[:, None] + overlaps.shown[goals] - common).clip(min=1.0)
        rows, columns = linear_sum_assignment(np.where(iou >= HIT_IOU, iou, 0.0), maximize=True)
        best = iou[rows, columns]
        hit = best >= HIT_IOU
        # A prediction that lies mostly on an object that shows too little is left out of the score.
        dim = overlaps.common[:, overlaps.wanted & ~overlaps.counted].sum(axis=1)
        stray = dim < 0.5 * overlaps.predicted.clip(min=1.0)
        stray[rows[hit]] = False
        self.ious.extend(best[hit].tolist())
        self.hits += int(hit.sum())
        self.missed += int(goals.sum()) - int(hit.sum())
        self.false += int(stray.sum())
        self.presence_right += int((len(iou) > 0) == bool(goals.any()))
        self.prompts += 1

    def figures(self) -> dict[str, float | int]:
        """F1, precision, recall, mean IoU of hits, presence accuracy, and the counts behind them."""
        found, there = self.hits + self.false, self.hits + self.missed
        return {
            "f1": round(2 * self.hits / max(found + there, 1), 4),
            "precision": round(self.hits / max(found, 1), 4),
            "recall": round(self.hits / max(there, 1), 4),
            "mean_iou_of_hits": round(float(np.mean(self.ious)) if self.ious else 0.0, 4),
            "presence_accuracy": round(self.presence_right / max(self.prompts, 1), 4),
            "prompts": self.prompts,
            "objects": there,
            "hits": self.hits,
            "missed": self.missed,
            "false": self.false,
        }


@torch.no_grad()
def score_weights(model: Any, *, scenes: int, seed: int, device: str) -> dict[str, Tally]:
    """Score a model on fresh square scenes without the server around it, for the training's own log."""
    tokens = PromptTokens(device)
    tallies = {"all": Tally()}
    for start in range(0, scenes, 32):
        generator = torch.Generator(device).manual_seed(seed + start + PROMPT_SEEDS)
        drawn, pictures = draw_scenes(32, seed + start, width=336, height=336, device=device)
        asked = ask(drawn, pictures, torch.rand(32, PROMPT_UNIFORMS, generator=generator, device=device))
        words = torch.rand(32 * PROMPTS_PER_SCENE, 7, generator=generator, device=device)
        ids, valid = tokens.encode(asked.concept.flatten(), words)
        pixels = pictures.pixels.round().to(torch.uint8)
        masks, prompt = predict_masks(model, pixels, ids, valid)
        shown = F.one_hot(pictures.owner.flatten(1).long(), MAX_OBJECTS + 1)[..., 1:].float()
        common = torch.einsum("kn,kno->ko", masks.flatten(1).float(), shown[prompt // PROMPTS_PER_SCENE])
        area, whole = masks.sum(dim=(1, 2)).cpu().numpy(), shown.sum(dim=1).cpu().numpy()
        rows, owners = common.cpu().numpy(), prompt.cpu().numpy()
        wanted, counted = asked.wanted.flatten(0, 1).cpu().numpy(), pictures.counted.cpu().numpy()
        for number, concept in enumerate(asked.concept.flatten().tolist()):
            scene, mine = number // PROMPTS_PER_SCENE, owners == number
            if not counted[scene].any():
                continue
            overlaps = Overlaps(rows[mine], area[mine], whole[scene], wanted[number], counted[scene])
            for key in ("all", kind_of(concept)):
                tallies.setdefault(key, Tally()).add(overlaps)
    return tallies


def predict_masks(model: Any, pixels: Tensor, ids: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Kept masks (K, S, S) bool and their prompts (K,), of four prompts for each picture."""
    prompt = torch.arange(len(ids), device=ids.device)
    scene = prompt // PROMPTS_PER_SCENE
    image, text = encode_image(model, pixels), encode_text(model, ids, valid)
    found = decode_prompts(model, image, text, scene, prompt)
    score = found.logits.sigmoid() * found.presence_logits.sigmoid()[:, None]
    pair, query = (score > SCORE_THRESHOLD).nonzero(as_tuple=True)
    features = decode_masks(model, image, found, scene, prompt)
    grids = torch.func.vmap(lambda cells, few: draw_masks(model, cells, few))(features, found.queries[-1])
    logits = F.interpolate(
        grids[pair, query][:, None], pixels.shape[-2:], mode="bilinear", align_corners=False
    )
    return logits[:, 0] > 0.0, pair
