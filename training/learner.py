"""One training step: the forward pass that serving uses, the matching of queries with objects, the losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 - torch's usual alias

from sam3_runner.network.masks import mask_logits
from training.concepts import PROMPTS_PER_SCENE
from training.exemplars import TASKS_PER_SCENE

if TYPE_CHECKING:
    from torch import Tensor

    from sam3_runner.network.model import SAM3Network
    from training.batches import Batch

_AUCTION_ROUNDS = 16
_AUCTION_INCREMENT = 0.02
_MASKS_PER_SCENE = 2
"""Mean number of masks per scene in the loss; a batch with more objects leaves some out.

They are of one task a scene, since the mask head is expensive, and converges early.
"""

_FOCAL_GAMMA = 2.0
_WEIGHTS = {"score": 2.0, "presence": 1.0, "box": 5.0, "giou": 2.0, "mask": 10.0, "dice": 5.0}


@dataclass(frozen=True, slots=True)
class Predictions:
    """The model's output for P tasks, of each of its N decoder layers.

    Attributes:
        logits: (N, P, Q), of the served score = sigmoid(logit) x sigmoid(presence logit).
        presence: (N, P) logits.
        boxes: (N, P, Q, 4), x0 y0 x1 y1 in 0..1.
        queries: (P, Q, D), of the last layer.
        features: (B, D, 4g, 4g), pixel features of one task of each scene.
    """

    logits: Tensor
    presence: Tensor
    boxes: Tensor
    queries: Tensor
    features: Tensor


def compile_layers(network: SAM3Network) -> None:
    """Compile the vision layers. Layers of one kind share one compilation, which is fast."""
    for layer in network.vision_encoder.backbone.layers:
        layer.compile(dynamic=False)


def predict(network: SAM3Network, batch: Batch) -> Predictions:
    """Run the serving forward pass on the pictures of a batch, with six tasks each."""
    scene = torch.arange(len(batch.ids), device=batch.ids.device) // TASKS_PER_SCENE
    image = network.encode_image(batch.pixels)
    text = network.encode_text(batch.ids, batch.ids_valid)
    tokens, valid = network.encode_boxes(
        image.coarse[scene], batch.exemplars, batch.labels, batch.exemplars_valid
    )
    detections = network.decode(image.attended[scene], tokens, text.tokens, text.valid, geometry_valid=valid)
    queries, presence = torch.stack(detections.queries), torch.stack(detections.layer_presence_logits)
    logits = network.dot_product_scoring(queries, detections.prompt, detections.prompt_valid)
    drawn = _mask_tasks(batch.pixels)
    return Predictions(
        logits=_served_logits(logits, presence[..., None]),
        presence=presence,
        boxes=network.boxes(queries, torch.stack(detections.reference_boxes)),
        queries=queries[-1],
        features=network.pixel_features(
            detections.fused[drawn],
            detections.prompt[drawn],
            detections.prompt_valid[drawn],
            tuple(level[scene[drawn]] for level in image.finer),
        ),
    )


@torch.no_grad()
def match(predictions: Predictions, batch: Batch) -> Tensor:
    """(P, 7) the query assigned to each matching object, -1 elsewhere; by the last layer's predictions."""
    boxes = batch.boxes.repeat_interleave(TASKS_PER_SCENE, dim=0)
    predicted = predictions.boxes[-1]
    l1_distance = (boxes[:, :, None] - predicted[:, None]).abs().sum(dim=-1)
    giou_distance = 1.0 - generalised_iou(boxes[:, :, None], predicted[:, None])
    cost = 5.0 * l1_distance + 2.0 * giou_distance - 2.0 * predictions.logits[-1].sigmoid()[:, None]
    return assign(cost, batch.matching)


def assign(cost: Tensor, matching: Tensor) -> Tensor:
    """Assign to each matching object (P, T) its own query at the least total cost (P, T, Q); -1 where none.

    Bertsekas' auction: every unassigned object raises the price of its best query until its second best is
    as good. The result is within T x `_AUCTION_INCREMENT` of the optimum, and the device is not
    synchronised.
    """
    price = torch.zeros_like(cost[:, 0])
    holder = torch.full_like(price, -1, dtype=torch.int64)
    objects = torch.arange(cost.shape[1], device=cost.device)[None, :, None]
    for _ in range(_AUCTION_ROUNDS):
        unassigned = matching & ~(holder[:, None] == objects).any(dim=2)
        value, query = (-cost - price[:, None]).topk(2, dim=2)
        bid = torch.where(unassigned, value[..., 0] - value[..., 1] + _AUCTION_INCREMENT, 0.0)
        bids = torch.zeros_like(cost).scatter(2, query[..., :1], bid[..., None])
        highest, bidder = bids.max(dim=1)
        holder = torch.where(highest > 0.0, bidder, holder)
        price = price + highest
    held = holder[:, None] == objects
    return torch.where(held.any(dim=2), held.int().argmax(dim=2), -1)


def losses(
    network: SAM3Network, predictions: Predictions, batch: Batch, assigned: Tensor
) -> dict[str, Tensor]:
    """The weighted losses, each a scalar; `assigned` is the result of `match`."""
    counted = batch.counted & (assigned >= 0)
    count = counted.sum().clamp(min=1).float()
    query = assigned.clamp(min=0)
    terms = {
        "score": _score_loss(predictions, batch, assigned, count),
        "presence": _presence_loss(predictions, batch),
        **_box_losses(predictions, batch, query, counted, count),
        **_mask_losses(network, predictions, batch, query, counted),
    }
    return {name: _WEIGHTS[name] * term for name, term in terms.items()}


def generalised_iou(a: Tensor, b: Tensor) -> Tensor:
    """GIoU of boxes (..., 4), x0 y0 x1 y1, broadcast against each other."""
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0.0)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0.0)
    area_a, area_b = _area(a[..., 2:] - a[..., :2]), _area(b[..., 2:] - b[..., :2])
    intersection, hull_area = _area(overlap), _area(hull)
    union = area_a + area_b - intersection
    return intersection / union.clamp(min=1e-7) - (hull_area - union) / hull_area.clamp(min=1e-7)


def _area(sides: Tensor) -> Tensor:
    # Not prod(): its backward counts zeros on the host, which a CUDA graph cannot capture.
    return sides[..., 0] * sides[..., 1]


def _served_logits(logits: Tensor, presence: Tensor) -> Tensor:
    """The logit of sigmoid(logit) x sigmoid(presence)."""
    return -torch.logaddexp(torch.logaddexp(-logits, -presence), -logits - presence)


def _mask_tasks(pixels: Tensor) -> Tensor:
    """(B,) the tasks whose masks are in the loss: of every second scene a text, of the others exemplars."""
    scene = torch.arange(len(pixels), device=pixels.device)
    return scene * TASKS_PER_SCENE + scene % 2 * PROMPTS_PER_SCENE


def _score_loss(predictions: Predictions, batch: Batch, assigned: Tensor, count: Tensor) -> Tensor:
    """Focal loss on the served score; ignores queries assigned to an object that does not count."""
    queries = torch.arange(predictions.logits.shape[-1], device=assigned.device)
    held = assigned[..., None] == queries
    positive = (held & batch.counted[..., None]).any(dim=1)
    ignored = (held & ~batch.counted[..., None]).any(dim=1) | ~batch.valid[:, None]
    target = positive.float().expand_as(predictions.logits)
    entropy = F.binary_cross_entropy_with_logits(predictions.logits, target, reduction="none")
    error = (target - predictions.logits.sigmoid()).abs()
    return (entropy * error**_FOCAL_GAMMA * ~ignored).sum() / count / len(predictions.logits)


def _presence_loss(predictions: Predictions, batch: Batch) -> Tensor:
    target = batch.counted.any(dim=1).float().expand_as(predictions.presence)
    entropy = F.binary_cross_entropy_with_logits(predictions.presence, target, reduction="none")
    return (entropy * batch.valid).sum(dim=1).mean() / batch.valid.sum().clamp(min=1)


def _box_losses(
    predictions: Predictions, batch: Batch, query: Tensor, counted: Tensor, count: Tensor
) -> dict[str, Tensor]:
    boxes = batch.boxes.repeat_interleave(TASKS_PER_SCENE, dim=0)
    index = query[None, :, :, None].expand(len(predictions.boxes), -1, -1, 4)
    predicted = predictions.boxes.gather(2, index)
    l1_distance = (predicted - boxes).abs().sum(dim=-1)
    giou_distance = 1.0 - generalised_iou(predicted, boxes)
    scale = count * len(predictions.boxes)
    return {"box": (l1_distance * counted).sum() / scale, "giou": (giou_distance * counted).sum() / scale}


def _mask_losses(
    network: SAM3Network, predictions: Predictions, batch: Batch, query: Tensor, counted: Tensor
) -> dict[str, Tensor]:
    """Cross-entropy and dice at half the picture's resolution, on the masks of counted objects."""
    drawn = _mask_tasks(batch.pixels)
    query, counted = query[drawn], counted[drawn]
    index = query[..., None].expand(-1, -1, predictions.queries.shape[-1])
    queries = predictions.queries[drawn].gather(1, index)
    grids = mask_logits(*network.mask_decoder.embed(queries), predictions.features)
    scenes, objects = len(batch.owner), counted.shape[1]
    weight, row = (
        counted.flatten().float().topk(min(_MASKS_PER_SCENE * scenes, counted.numel()), sorted=False)
    )
    scene = row // objects
    visible = (batch.owner[scene] == (row % objects + 1)[:, None, None]).float()
    target = F.avg_pool2d(visible[:, None], 2)[:, 0]
    grid = grids.flatten(0, 1)[row]
    logits = F.interpolate(grid[:, None], target.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(dim=(1, 2))
    probability = logits.sigmoid()
    intersection, total = (probability * target).sum(dim=(1, 2)), (probability + target).sum(dim=(1, 2))
    dice = 1.0 - (2.0 * intersection + 1.0) / (total + 1.0)
    count = weight.sum().clamp(min=1.0)
    return {"mask": (entropy * weight).sum() / count, "dice": (dice * weight).sum() / count}
