"""Exemplar tasks: boxes round some objects of a scene, with a text or without, and the objects they mean.

One rule covers all tasks. Two objects are alike when they share colour and shape. The text means the objects
that it names; without a text the model reads "visual", which names nothing. A positive box adds the objects
that are like its own, a negative box takes the objects away that are like its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from training.concepts import PROMPTS_PER_SCENE, choose_concept, objects_of
from training.scenes import MAX_OBJECTS

if TYPE_CHECKING:
    from torch import Tensor

    from training.scenes import Pictures, Scenes

EXEMPLAR_KINDS = ("box alone", "text and box", "text and negative box", "boxes of both labels")
KIND_SHARES = (0.35, 0.2, 0.25, 0.2)
EXEMPLARS_PER_SCENE = 2
TASKS_PER_SCENE = PROMPTS_PER_SCENE + EXEMPLARS_PER_SCENE
"""Of a training scene: first its text prompts, then its exemplar tasks."""
MAX_POSITIVE, MAX_NEGATIVE = 3, 2
MAX_BOXES = MAX_POSITIVE + MAX_NEGATIVE
EXEMPLAR_UNIFORMS = 3 * MAX_OBJECTS + 4 * MAX_BOXES + 7
EXEMPLAR_SEEDS = 2_000_000_000
"""Added to a scene's seed for its exemplar tasks."""

_BOX_ALONE, _TEXT_AND_BOX, _TEXT_AND_NEGATIVE, _BOTH = range(4)
_STRANGE_SHARE = 0.25
"""Share of the tasks with positive boxes in which one of them is round an object of another kind."""
_EMPTY_SHARE = 0.1
"""Share of the tasks with negative boxes that take everything away: what the text or no text leaves."""
_MAX_SHIFT = 0.12
"""Of a box's sides, as a share of its width or height: people draw boxes loosely."""


@dataclass(frozen=True, slots=True)
class Exemplars:
    """E exemplar tasks for each of B scenes.

    Attributes:
        concept: (B, E) int64, what the text names.
        has_text: (B, E) bool; False: the text is "visual".
        boxes: (B, E, 5, 4), cx cy w h in 0..1; zeros where there is no box.
        labels: (B, E, 5) bool, True for a positive box.
        boxes_valid: (B, E, 5) bool.
        matching: (B, E, 7) bool, visible objects that are to be found.
        valid: (B, E) bool, False for a scene in which no object counts.
    """

    concept: Tensor
    has_text: Tensor
    boxes: Tensor
    labels: Tensor
    boxes_valid: Tensor
    matching: Tensor
    valid: Tensor


def sample_kinds(uniforms: Tensor) -> Tensor:
    """Kinds of tasks, indices into `EXEMPLAR_KINDS`, from uniform numbers of any shape."""
    edges = torch.tensor(KIND_SHARES, device=uniforms.device).cumsum(0)[:-1]
    return torch.bucketize(uniforms, edges)


def sample_exemplars(scenes: Scenes, pictures: Pictures, kind: Tensor, uniforms: Tensor) -> Exemplars:
    """Tasks of kinds (B, E), chosen by uniform numbers (B, E, `EXEMPLAR_UNIFORMS`)."""
    order, rest = uniforms[..., : 3 * MAX_OBJECTS], uniforms[..., 3 * MAX_OBJECTS :]
    order = order.reshape(*kind.shape, 3, MAX_OBJECTS)
    shifts, amount, numbers = rest[..., : 4 * MAX_BOXES], rest[..., -7], rest[..., -6:]
    alike, counted = alike_objects(scenes, pictures), pictures.counted[:, None]
    # An object with others like it makes the better exemplar.
    company = (alike & counted).sum(dim=2) > 1
    target = (order[..., 0, :] + counted.float() + 0.7 * (company[:, None] & counted)).argmax(dim=-1)
    like_target = _rows(alike, target)
    concept = _concepts(scenes, target, kind, numbers[..., 0])
    has_text = (kind == _TEXT_AND_BOX) | (kind == _TEXT_AND_NEGATIVE)
    has_text |= (kind == _BOTH) & (numbers[..., 1] < 0.5)
    named = objects_of(concept, scenes) & pictures.visible[:, None] & has_text[..., None]
    takes_all = (numbers[..., 2] < _EMPTY_SHARE) & (kind >= _TEXT_AND_NEGATIVE)
    has_positive = (kind != _TEXT_AND_NEGATIVE) & ~takes_all

    # The target first, then others like it; sometimes an object of another kind in second place.
    positive_count = 1 + (numbers[..., 3] * MAX_POSITIVE).long()
    strange = (numbers[..., 4] < _STRANGE_SHARE) & (kind <= _TEXT_AND_BOX)
    first = torch.nn.functional.one_hot(target, MAX_OBJECTS).bool()
    others = like_target | strange[..., None]
    key = order[..., 1, :] + 2.0 * (others & ~like_target) + 4.0 * first
    positives = _pick(key, others & counted & has_positive[..., None], positive_count, MAX_POSITIVE)
    like_positive = _united(alike, positives)

    # Objects that the text names, or that resemble the target, before others.
    negative_count = 1 + (numbers[..., 5] < 0.3).long()
    negative_count = negative_count * (kind >= _TEXT_AND_NEGATIVE)
    spared = torch.where(takes_all[..., None], ~like_target, like_target | like_positive)
    near = torch.where(has_text[..., None], named, objects_of(concept, scenes))
    allowed = counted & ~spared
    # Where the text names nothing else, its own objects are taken away.
    alone = (kind == _TEXT_AND_NEGATIVE) & ~allowed.any(dim=-1)
    allowed |= counted & like_target & alone[..., None]
    key = order[..., 2, :] + 2.0 * near
    negatives = _pick(key, allowed & ~like_positive, negative_count, MAX_NEGATIVE)

    matching = (named | like_positive) & ~_united(alike, negatives)
    index, valid = torch.cat([positives[0], negatives[0]], -1), torch.cat([positives[1], negatives[1]], -1)
    labels = torch.arange(MAX_BOXES, device=kind.device) < MAX_POSITIVE
    return Exemplars(
        concept=concept,
        has_text=has_text,
        boxes=_loose_boxes(pictures, index, shifts, amount) * valid[..., None],
        labels=labels.expand_as(valid),
        boxes_valid=valid,
        matching=matching,
        valid=pictures.counted.any(dim=1, keepdim=True).expand_as(kind),
    )


def alike_objects(scenes: Scenes, pictures: Pictures) -> Tensor:
    """(B, 7, 7) bool: whether two visible objects share colour and shape; True on the diagonal."""
    colour = scenes.colour[:, :, None] == scenes.colour[:, None]
    shape = scenes.shape[:, :, None] == scenes.shape[:, None]
    return colour & shape & pictures.visible[:, :, None] & pictures.visible[:, None]


def _concepts(scenes: Scenes, target: Tensor, kind: Tensor, uniforms: Tensor) -> Tensor:
    """(B, E) what the text names: for negative boxes mostly a shape or a colour, which leaves a choice."""
    negative = kind >= _TEXT_AND_NEGATIVE
    both = torch.where(negative, 0.2, 0.4)
    colour, shape = scenes.colour.gather(1, target), scenes.shape.gather(1, target)
    return choose_concept(colour, shape, uniforms, both, both + (1.0 - both) / 2)


def _rows(alike: Tensor, index: Tensor) -> Tensor:
    """(B, E, 7): the rows (B, E) of (B, 7, 7)."""
    return alike.gather(1, index[..., None].expand(-1, -1, MAX_OBJECTS))


def _pick(key: Tensor, allowed: Tensor, count: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The `count` (B, E) allowed objects of highest key (B, E, 7): indices and validity (B, E, most)."""
    highest, index = key.masked_fill(~allowed, -1.0).topk(most, dim=-1)
    return index, (highest >= 0.0) & (torch.arange(most, device=key.device) < count[..., None])


def _united(alike: Tensor, picked: tuple[Tensor, Tensor]) -> Tensor:
    """(B, E, 7): the objects that are like one of those picked."""
    index, valid = picked
    rows = alike[:, None].expand(-1, index.shape[1], -1, -1)
    rows = rows.gather(2, index[..., None].expand(-1, -1, -1, MAX_OBJECTS))
    return (rows & valid[..., None]).any(dim=2)


def _loose_boxes(pictures: Pictures, index: Tensor, shifts: Tensor, amount: Tensor) -> Tensor:
    """(B, E, K, 4) boxes cx cy w h of objects (B, E, K), their sides shifted."""
    boxes = pictures.boxes[:, None].expand(-1, index.shape[1], -1, -1)
    boxes = boxes.gather(2, index[..., None].expand(-1, -1, -1, 4))
    sides = (boxes[..., 2:] - boxes[..., :2]).repeat(1, 1, 1, 2)
    shift = (2.0 * shifts.reshape(*index.shape, 4) - 1.0) * _MAX_SHIFT * amount[..., None, None]
    low, high = (boxes + shift * sides).clamp(0.0, 1.0).chunk(2, dim=-1)
    return torch.cat([(low + high) / 2, high - low], dim=-1)
