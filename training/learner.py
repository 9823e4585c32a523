"""One training step's mathematics: the serving forward, the matching with objects, the losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name that every PyTorch reader knows

from sam3_runner.model import (
    decode_masks,
    decode_prompts,
    draw_masks,
    encode_image,
    encode_text,
    refine_boxes,
    score_queries,
)
from training.concepts import PROMPTS_PER_SCENE

if TYPE_CHECKING:
    from torch import Tensor

    from training.batches import Batch

_AUCTION_ROUNDS = 16
_AUCTION_RAISE = 0.02
_DRAWN_PROMPTS = 1
"""Prompts of a scene whose masks are learnt in a step: the mask head is dear, and learns fast."""
_MASKS_PER_SCENE = 2
"""Masks drawn per scene on average; a batch with more objects asked for leaves some out."""

_FOCUS = 2.0
_WEIGHTS = {"score": 2.0, "presence": 1.0, "box": 5.0, "giou": 2.0, "mask": 10.0, "dice": 5.0}


@dataclass(frozen=True, slots=True)
class Answers:
    """The model's answers to P prompts, for each of its N decoder layers.

    Attributes:
        logits: (N, P, Q), of score = sigmoid(logit) x sigmoid(presence logit), the one that is served.
        presence: (N, P) logits.
        boxes: (N, P, Q, 4), x0 y0 x1 y1 in 0..1.
        queries: (P, Q, D), of the last layer.
        features: (B, D, 4g, 4g), of the first prompt of each scene, what masks are drawn from.
    """

    logits: Tensor
    presence: Tensor
    boxes: Tensor
    queries: Tensor
    features: Tensor


def hold_positions(model: Any) -> None:
    """Make the position grids constants in fp32: the same numbers, without a wait for the device.

    transformers builds them anew in every call, through sizes read back from the device, and in bf16
    under autocast.
    """
    grid = model.config.vision_config.backbone_config
    side = grid.image_size // grid.patch_size
    device = next(model.parameters()).device
    line = torch.arange(side, device=device, dtype=torch.float32) / side
    model.detr_decoder._get_coords = lambda *_args, **_named: (line, line)  # noqa: SLF001
    encoding = model.vision_encoder.neck.position_encoding
    build = encoding.build_sine_position_embedding
    features = encoding.num_position_features
    encoding.forward = lambda shape, device, dtype: build(  # noqa: ARG005
        shape, device, torch.float32, features, encoding.normalize, encoding.scale, encoding.temperature
    )


def compile_parts(model: Any) -> None:
    """Compile what gains by it: layers of one kind share one compilation, a whole model takes minutes."""
    for layer in model.vision_encoder.backbone.layers:
        layer.compile(dynamic=False)
    decoder = model.detr_decoder
    decoder._get_rpb_matrix = torch.compile(decoder._get_rpb_matrix, dynamic=False)  # noqa: SLF001


def answer(model: Any, pixels: Tensor, ids: Tensor, ids_valid: Tensor) -> Answers:
    """Ask the prompts of (B, 3, S, S) pictures, four for each, through the code that serves."""
    prompt = torch.arange(len(ids), device=ids.device)
    scene = prompt // PROMPTS_PER_SCENE
    image = encode_image(model, pixels)
    text = encode_text(model, ids, ids_valid)
    found = decode_prompts(model, image, text, scene, prompt)
    raw = score_queries(model, found.queries, found.prompt, found.prompt_valid)
    return Answers(
        logits=_served_logits(raw, found.layer_presence_logits[..., None]),
        presence=found.layer_presence_logits,
        boxes=refine_boxes(model, found.queries, found.reference_boxes),
        queries=found.queries[-1],
        features=decode_masks(model, image, found, scene, _drawn(prompt)),
    )


@torch.no_grad()
def match(answers: Answers, batch: Batch) -> Tensor:
    """(P, 7) the query that is to find each wanted object, -1 elsewhere; by the last layer's answers."""
    boxes = batch.boxes.repeat_interleave(PROMPTS_PER_SCENE, dim=0)
    guesses = answers.boxes[-1]
    far = (boxes[:, :, None] - guesses[:, None]).abs().sum(dim=-1)
    apart = 1.0 - generalised_iou(boxes[:, :, None], guesses[:, None])
    cost = 5.0 * far + 2.0 * apart - 2.0 * answers.logits[-1].sigmoid()[:, None]
    return assign(cost, batch.wanted)


def assign(cost: Tensor, wanted: Tensor) -> Tensor:
    """Give each wanted object (P, T) its own query at the least cost (P, T, Q); -1 where none.

    Bertsekas' auction: every object without a query raises the price of its favourite to where it would
    rather take the second best; within T x `_AUCTION_RAISE` of the optimum, and the device never waits.
    """
    price = torch.zeros_like(cost[:, 0])
    holder = torch.full_like(price, -1, dtype=torch.int64)
    objects = torch.arange(cost.shape[1], device=cost.device)[None, :, None]
    for _ in range(_AUCTION_ROUNDS):
        idle = wanted & ~(holder[:, None] == objects).any(dim=2)
        value, query = (-cost - price[:, None]).topk(2, dim=2)
        step = torch.where(idle, value[..., 0] - value[..., 1] + _AUCTION_RAISE, 0.0)
        bids = torch.zeros_like(cost).scatter(2, query[..., :1], step[..., None])
        highest, bidder = bids.max(dim=1)
        holder = torch.where(highest > 0.0, bidder, holder)
        price = price + highest
    held = holder[:, None] == objects
    return torch.where(held.any(dim=2), held.int().argmax(dim=2), -1)


def losses(model: Any, answers: Answers, batch: Batch, chosen: Tensor) -> dict[str, Tensor]:
    """The weighted losses, each a scalar; `chosen` is what `match` gave."""
    learnt = batch.counted & (chosen >= 0)
    number = learnt.sum().clamp(min=1).float()
    query = chosen.clamp(min=0)
    terms = {
        "score": _score_loss(answers, batch, chosen, number),
        "presence": _presence_loss(answers, batch),
        **_box_losses(answers, batch, query, learnt, number),
        **_mask_losses(model, answers, batch, query, learnt),
    }
    return {name: _WEIGHTS[name] * term for name, term in terms.items()}


def generalised_iou(a: Tensor, b: Tensor) -> Tensor:
    """GIoU of boxes (..., 4), x0 y0 x1 y1, broadcast against each other."""
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0.0)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0.0)
    area_a, area_b = _area(a[..., 2:] - a[..., :2]), _area(b[..., 2:] - b[..., :2])
    common, whole = _area(overlap), _area(hull)
    union = area_a + area_b - common
    return common / union.clamp(min=1e-7) - (whole - union) / whole.clamp(min=1e-7)


def _area(sides: Tensor) -> Tensor:
    # Not prod(): its backward counts zeros on the host, which a CUDA graph cannot hold.
    return sides[..., 0] * sides[..., 1]


def _served_logits(logits: Tensor, presence: Tensor) -> Tensor:
    """The logit of sigmoid(logit) x sigmoid(presence)."""
    return -torch.logaddexp(torch.logaddexp(-logits, -presence), -logits - presence)


def _drawn(per_prompt: Tensor) -> Tensor:
    """The entries of the prompts whose masks are learnt, from (4B, ...)."""
    return per_prompt.reshape(-1, PROMPTS_PER_SCENE, *per_prompt.shape[1:])[:, :_DRAWN_PROMPTS].flatten(0, 1)


def _score_loss(answers: Answers, batch: Batch, chosen: Tensor, number: Tensor) -> Tensor:
    """Focal loss on the served score; queries that found an object that shows too little go free."""
    queries = torch.arange(answers.logits.shape[-1], device=chosen.device)
    held = chosen[..., None] == queries
    target = (held & batch.counted[..., None]).any(dim=1)
    free = (held & ~batch.counted[..., None]).any(dim=1) | ~batch.valid[:, None]
    goal = target.float().expand_as(answers.logits)
    entropy = F.binary_cross_entropy_with_logits(answers.logits, goal, reduction="none")
    missed = (goal - answers.logits.sigmoid()).abs()
    return (entropy * missed**_FOCUS * ~free).sum() / number / len(answers.logits)


def _presence_loss(answers: Answers, batch: Batch) -> Tensor:
    goal = batch.counted.any(dim=1).float().expand_as(answers.presence)
    entropy = F.binary_cross_entropy_with_logits(answers.presence, goal, reduction="none")
    return (entropy * batch.valid).sum(dim=1).mean() / batch.valid.sum().clamp(min=1)


def _box_losses(
    answers: Answers, batch: Batch, query: Tensor, learnt: Tensor, number: Tensor
) -> dict[str, Tensor]:
    boxes = batch.boxes.repeat_interleave(PROMPTS_PER_SCENE, dim=0)
    index = query[None, :, :, None].expand(len(answers.boxes), -1, -1, 4)
    guesses = answers.boxes.gather(2, index)
    far = (guesses - boxes).abs().sum(dim=-1)
    apart = 1.0 - generalised_iou(guesses, boxes)
    scale = number * len(answers.boxes)
    return {"box": (far * learnt).sum() / scale, "giou": (apart * learnt).sum() / scale}


def _mask_losses(
    model: Any, answers: Answers, batch: Batch, query: Tensor, learnt: Tensor
) -> dict[str, Tensor]:
    """Cross-entropy and dice at half the picture's resolution, on the masks of learnt objects only."""
    query, learnt = _drawn(query), _drawn(learnt)
    index = query[..., None].expand(-1, -1, answers.queries.shape[-1])
    queries = _drawn(answers.queries).gather(1, index)
    grids = torch.func.vmap(lambda pixels, few: draw_masks(model, pixels, few))(answers.features, queries)
    scenes, objects = len(batch.owner), learnt.shape[1]
    weight, row = learnt.flatten().float().topk(min(_MASKS_PER_SCENE * scenes, learnt.numel()), sorted=False)
    scene = row // (objects * _DRAWN_PROMPTS)
    shown = (batch.owner[scene] == (row % objects + 1)[:, None, None]).float()
    goal = F.avg_pool2d(shown[:, None], 2)[:, 0]
    grid = grids.flatten(0, 1)[row]
    logits = F.interpolate(grid[:, None], goal.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    entropy = F.binary_cross_entropy_with_logits(logits, goal, reduction="none").mean(dim=(1, 2))
    chance = logits.sigmoid()
    common, total = (chance * goal).sum(dim=(1, 2)), (chance + goal).sum(dim=(1, 2))
    dice = 1.0 - (2.0 * common + 1.0) / (total + 1.0)
    number = weight.sum().clamp(min=1.0)
    return {"mask": (entropy * weight).sum() / number, "dice": (dice * weight).sum() / number}
