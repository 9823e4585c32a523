"""Training batches: scenes, their prompts, and the degradations that real uploads show."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 - torch's usual alias

from training.architecture import SIDE_PX
from training.concepts import PROMPT_UNIFORMS, PROMPTS_PER_SCENE, PromptTokens, sample_prompts
from training.exemplars import (
    EXEMPLAR_UNIFORMS,
    EXEMPLARS_PER_SCENE,
    TASKS_PER_SCENE,
    sample_exemplars,
    sample_kinds,
)
from training.scenes import paint, render, sample_noise, sample_scenes

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from training.concepts import ScenePrompts
    from training.exemplars import Exemplars
    from training.scenes import Painter

_UNKNOWN_SHARE = 0.2
"""Share of the absent prompts that are words without a meaning in the scenes."""

_VISUAL_SHARE = 0.1
"""Of those, the share that is the word which the model reads when boxes come without a text."""
_ALIKE_SHARE = 0.5
"""Share of the scenes in which many objects are alike; see `sample_scenes`."""

_DEGRADATION_UNIFORMS = 4
_BLOCK = 8


@dataclass(frozen=True, slots=True)
class Batch:
    """B scenes with P = 6B tasks, four texts and two exemplar tasks each; task p belongs to scene p // 6.

    Attributes:
        pixels: (B, 3, S, S) uint8.
        owner: (B, S, S) uint8, see `Pictures`.
        boxes: (B, 7, 4), x0 y0 x1 y1 in 0..1.
        ids, ids_valid: (P, L) int64 and bool.
        exemplars: (P, 5, 4) boxes, cx cy w h in 0..1.
        labels: (P, 5) bool, True for a positive box.
        exemplars_valid: (P, 5) bool; all False for a text alone.
        matching: (P, 7) bool, objects that match the task; each is assigned a query.
        counted: (P, 7) bool, the matching objects that contribute to the loss.
        valid: (P,) bool, False for tasks that do not contribute to the loss.
    """

    pixels: Tensor
    owner: Tensor
    boxes: Tensor
    ids: Tensor
    ids_valid: Tensor
    exemplars: Tensor
    labels: Tensor
    exemplars_valid: Tensor
    matching: Tensor
    counted: Tensor
    valid: Tensor


class BatchMaker:
    """Makes the batch of any step of a training run, from only the run's seed and the step's number."""

    def __init__(self, *, scenes: int, seed: int, device: str, compiled: bool) -> None:
        self._scenes, self._seed, self._device = scenes, seed, device
        self._tokens = PromptTokens(device)
        self._rng = torch.Generator(device)
        self._paint: Painter = torch.compile(paint, dynamic=False) if compiled else paint
        self._degrade: Callable[..., Tensor] = torch.compile(degrade, dynamic=False) if compiled else degrade

    def make(self, step: int) -> Batch:
        """The batch of one step."""
        rng = self._rng.manual_seed(self._seed * 1_000_003 + step)
        scenes = sample_scenes(self._scenes, rng, frame=None, alike_share=_ALIKE_SHARE)
        noise = sample_noise(self._scenes, SIDE_PX, SIDE_PX, rng)
        degradations = self._uniforms(self._scenes, _DEGRADATION_UNIFORMS)
        pictures = render(scenes, *noise, paint=self._paint)
        pixels = self._degrade(pictures.pixels, noise[1], degradations).to(torch.uint8)
        sampled = sample_prompts(scenes, pictures, self._uniforms(self._scenes, PROMPT_UNIFORMS))
        exemplars = sample_exemplars(
            scenes,
            pictures,
            sample_kinds(self._uniforms(self._scenes, EXEMPLARS_PER_SCENE)),
            self._uniforms(self._scenes, EXEMPLARS_PER_SCENE, EXEMPLAR_UNIFORMS),
        )
        ids, ids_valid = self._texts(sampled, exemplars)
        matching = torch.cat([sampled.matching, exemplars.matching], dim=1)
        boxes, labels, boxes_valid = (
            F.pad(each.flatten(2), (0, 0, PROMPTS_PER_SCENE, 0)).flatten(0, 1)
            for each in (exemplars.boxes, exemplars.labels, exemplars.boxes_valid)
        )
        return Batch(
            pixels=pixels,
            owner=pictures.owner,
            boxes=pictures.boxes,
            ids=ids,
            ids_valid=ids_valid,
            exemplars=boxes.reshape(len(ids), -1, 4),
            labels=labels,
            exemplars_valid=boxes_valid,
            matching=matching.flatten(0, 1),
            counted=(matching & pictures.counted[:, None]).flatten(0, 1),
            valid=torch.cat([sampled.valid, exemplars.valid], dim=1).flatten(),
        )

    def _texts(self, sampled: ScenePrompts, exemplars: Exemplars) -> tuple[Tensor, Tensor]:
        """Token ids and validity of all tasks, (P, 8)."""
        words = self._uniforms(self._scenes * TASKS_PER_SCENE, 7)
        concepts = torch.cat([sampled.concept, exemplars.concept], dim=1)
        ids, ids_valid = self._tokens.encode(concepts.flatten(), words)
        unknown_ids, unknown_valid = self._tokens.encode_unknown(words)
        place = torch.arange(TASKS_PER_SCENE, device=self._device).repeat(self._scenes)
        unknown = (place == PROMPTS_PER_SCENE - 1) & (words[:, 6] < _UNKNOWN_SHARE)
        # The word alone, without a box, means nothing.
        visual = unknown & (words[:, 6] < _UNKNOWN_SHARE * _VISUAL_SHARE)
        visual |= F.pad(~exemplars.has_text, (PROMPTS_PER_SCENE, 0)).flatten()
        ids = torch.where(unknown[:, None], unknown_ids, ids)
        ids_valid = torch.where(unknown[:, None], unknown_valid, ids_valid)
        return self._tokens.replace_visual(ids, ids_valid, visual)

    def _uniforms(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._rng, device=self._device)


def degrade(pixels: Tensor, noise: Tensor, uniforms: Tensor) -> Tensor:
    """Blur, grain and JPEG's blocks, each on some of the (B, 3, S, S) pictures; integer levels 0..255."""
    blur, grain, block, strength = uniforms.unbind(dim=1)
    # A kernel of three taps, (w, 1 - 2w, w): w is up to 0.33, and 0 for two pictures in five.
    side = ((blur - 0.4).clamp(min=0.0) / 0.6 * 0.33)[:, None, None, None]
    for dims in ((0, 0, 1, 1), (1, 1, 0, 0)):
        padded = F.pad(pixels, dims, mode="replicate")
        height, width = pixels.shape[-2:]
        before, after = padded[..., :height, :width], padded[..., -height:, -width:]
        pixels = pixels * (1.0 - 2.0 * side) + (before + after) * side
    # The background's noise, shifted: different enough, and no second field to sample.
    shifted = noise.roll((37, 91), dims=(-2, -1)) - 0.5
    pixels = pixels + shifted * ((grain - 0.5).clamp(min=0.0) * 40.0)[:, None, None, None]
    quantised = _quantise_blocks(pixels, 4.0 + 36.0 * strength**2)
    return torch.where((block < 0.4)[:, None, None, None], quantised, pixels).round().clamp(0.0, 255.0)


def _quantise_blocks(pixels: Tensor, step: Tensor) -> Tensor:
    """Quantise the cosine transform of 8 x 8 blocks, high frequencies more coarsely, as JPEG does."""
    index = torch.arange(_BLOCK, device=pixels.device, dtype=torch.float32)
    basis = (math.pi / _BLOCK * (index[None] + 0.5) * index[:, None]).cos() * math.sqrt(2.0 / _BLOCK)
    basis = torch.cat([basis[:1] / math.sqrt(2.0), basis[1:]])
    count, channels, height, width = pixels.shape
    grid = (height // _BLOCK, _BLOCK, width // _BLOCK, _BLOCK)
    blocks = pixels.reshape(count, channels, *grid).transpose(3, 4)
    coefficients = basis @ blocks @ basis.T
    quantum = step[:, None, None, None, None, None] * (0.4 + 0.2 * (index[:, None] + index[None]))
    restored = basis.T @ ((coefficients / quantum).round() * quantum) @ basis
    quantised: Tensor = restored.transpose(3, 4).reshape(pixels.shape)
    return quantised
