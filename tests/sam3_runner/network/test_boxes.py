"""Prompts with exemplar boxes, compared with transformers' model over the same weights."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's usual alias
from transformers import AutoTokenizer, Sam3Config, Sam3Model, Sam3Processor
from transformers.models.sam3 import modeling_sam3

from sam3_runner.inference.loaded_model import Keeping, LoadedModel, ModelRequest
from sam3_runner.inference.pass_clock import PassClock
from sam3_runner.inference.staging import StagedImage
from sam3_runner.instances import Instance
from sam3_runner.network.masks import mask_logits
from sam3_runner.network.model import SAM3Network
from sam3_runner.network.roi import pool_boxes
from sam3_runner.prompts import ConceptPrompt, PromptTokenizer
from sam3_runner.weights.checkpoint import CLIP_TOKENIZER_FILE
from sam3_runner.weights.load import to_transformers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from sam3_runner.weights.checkpoint import Checkpoint

ATOL = 5e-5
ROI_CELLS = 7
"""Of the official model."""
BOXES = {
    "one": [[0.3, 0.4, 0.2, 0.3]],
    "several": [[0.3, 0.4, 0.2, 0.3], [0.7, 0.6, 0.5, 0.7], [0.55, 0.2, 0.01, 0.02]],
    "borders": [[0.05, 0.05, 0.1, 0.1], [0.995, 0.5, 0.01, 1.0], [0.5, 0.5, 1.0, 1.0]],
}
SIZES = [(90, 60), (50, 70)]
"""Width and height of two images, px."""
PROMPTS = [
    [
        ConceptPrompt("cat", ((5, 6, 40, 50), (30.5, 1, 80, 59), (70, 40, 90, 60)), (True, False, True)),
        ConceptPrompt(None, ((5, 6, 40, 50),), (True,)),
    ],
    [
        ConceptPrompt(None, ((1, 2, 30, 69.5), (20, 20, 49, 33)), (True, False)),
        ConceptPrompt("a red bus", ((20, 20, 49, 33),), (False,)),
    ],
]
"""Of each image: text and boxes, and boxes alone; 3, 1, 2 and 1 boxes."""
IDS = torch.randint(0, 49407, (2, 32), generator=torch.Generator().manual_seed(2))


def roi_align(features: Tensor, boxes: tuple[Tensor, ...], cells: int) -> Tensor:
    """`torchvision.ops.roi_align` with its defaults, sample by sample as in its C++ code."""
    pooled = [
        _align(image.double().numpy(), box.tolist(), cells)
        for image, of_image in zip(features, boxes, strict=True)
        for box in of_image
    ]
    return torch.from_numpy(np.stack(pooled)).to(features.dtype)


def _align(image: np.ndarray, box: list[float], cells: int) -> np.ndarray:
    x0, y0, x1, y1 = box
    step_y, step_x = max(y1 - y0, 1.0) / cells, max(x1 - x0, 1.0) / cells
    rows, columns = math.ceil(step_y), math.ceil(step_x)
    pooled = np.zeros((len(image), cells, cells))
    for row, column, y, x in np.ndindex(cells, cells, rows, columns):
        at_y = y0 + row * step_y + (y + 0.5) * step_y / rows
        at_x = x0 + column * step_x + (x + 0.5) * step_x / columns
        pooled[:, row, column] += _bilinear(image, at_y, at_x)
    return pooled / (rows * columns)


def _bilinear(image: np.ndarray, y: float, x: float) -> np.ndarray:
    height, width = image.shape[1:]
    if not (-1 <= y <= height and -1 <= x <= width):
        return np.zeros(len(image))
    y, x = max(y, 0.0), max(x, 0.0)
    above, left = min(int(y), height - 1), min(int(x), width - 1)
    down, right = (y - above if above < height - 1 else 0.0), (x - left if left < width - 1 else 0.0)
    below, after = min(above + 1, height - 1), min(left + 1, width - 1)
    upper = (1 - right) * image[:, above, left] + right * image[:, above, after]
    lower = (1 - right) * image[:, below, left] + right * image[:, below, after]
    return np.asarray((1 - down) * upper + down * lower)


@pytest.fixture(autouse=True)
def _no_gradients(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    vision = SimpleNamespace(ops=SimpleNamespace(roi_align=roi_align))
    monkeypatch.setattr(modeling_sam3, "torchvision", vision, raising=False)
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def models(tiny_checkpoint: Checkpoint) -> tuple[Any, SAM3Network]:
    """Transformers' model, with pooled boxes as large as the official ones, and ours with its weights."""
    geometry = tiny_checkpoint.config["geometry_encoder_config"] | {"roi_size": ROI_CELLS, "num_layers": 2}
    config = Sam3Config.from_dict(tiny_checkpoint.config | {"geometry_encoder_config": geometry})
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = SAM3Network(config)
        network.train(mode=False)
        for parameter in network.geometry_encoder.parameters():
            # Transformers initialises biases with 0 and norms with 1, which would hide an exchange.
            parameter.data += 0.1 * torch.randn_like(parameter)
    model: Any = Sam3Model(config)
    model.eval()
    model.load_state_dict(to_transformers(network.state_dict()), strict=True)
    return model, network


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (2, 3, 112, 112), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("side", [8, 72])
def test_pooled_features_equal_torchvision(side: int) -> None:
    """Pooled features equal roi_align's, for boxes of any size, at each border too."""
    features = torch.randn(1, 5, side, side, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([box for each in BOXES.values() for box in each])
    corners = torch.cat((boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2), dim=1)
    pooled = pool_boxes(features.permute(0, 2, 3, 1), corners[None], ROI_CELLS)
    expected = roi_align(features, ((corners * side),), ROI_CELLS)
    torch.testing.assert_close(pooled[0].permute(0, 3, 1, 2), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", BOXES)
@pytest.mark.parametrize("tokens", [3, 9])
def test_equals_transformers(models: tuple[Any, SAM3Network], pixels: Tensor, name: str, tokens: int) -> None:
    """Scores, boxes and masks of two images with different boxes and labels, some negative, some padding."""
    model, network = models
    boxes = torch.tensor(BOXES[name]).expand(2, -1, -1).clone()
    boxes[1] = boxes[1].flip(0) * torch.tensor([1.0, 0.9, 0.9, 0.8])
    count = boxes.shape[1]
    labels = (torch.arange(2 * count) % 2 == 0).view(2, count)
    used = torch.ones(2, count, dtype=torch.bool)
    used[1, 1:] = False
    valid = (torch.arange(32) < torch.tensor([tokens, tokens + 2])[:, None]).clone()
    expected = model(
        pixel_values=pixels.float() / 127.5 - 1.0,
        input_ids=IDS,
        attention_mask=valid.long(),
        input_boxes=boxes,
        # The processor pads labels with -10, which marks a box as not there.
        input_boxes_labels=torch.where(used, labels.long(), -10),
    )
    image, text = network.encode_image(pixels), network.encode_text(IDS, valid)
    padded = (F.pad(each, pad) for each, pad in ((boxes, (0, 0, 0, 2)), (labels, (0, 2)), (used, (0, 2))))
    geometry, geometry_valid = network.encode_boxes(image.coarse, *padded)
    found = network.decode(image.attended, geometry, text.tokens, text.valid, geometry_valid=geometry_valid)
    features = network.pixel_features(found.fused, found.prompt, found.prompt_valid, image.finer)
    factors, offsets = network.mask_decoder.embed(found.queries[-1])
    torch.testing.assert_close(found.logits, expected.pred_logits, atol=ATOL, rtol=1e-4)
    torch.testing.assert_close(found.boxes, expected.pred_boxes, atol=ATOL, rtol=1e-4)
    torch.testing.assert_close(found.presence_logits, expected.presence_logits[:, 0], atol=ATOL, rtol=1e-4)
    for row in range(2):
        masks = mask_logits(factors[row], offsets[row], features[row])
        torch.testing.assert_close(masks, expected.pred_masks[row], atol=1e-3, rtol=1e-3)


def processed(prompts: list[ConceptPrompt], sizes: list[tuple[int, int]]) -> Any:
    """What transformers' processor makes of one prompt an image: texts, and padded boxes in shares of it."""
    processor: Any = Sam3Processor.__new__(Sam3Processor)  # its image processor needs torchvision
    processor.tokenizer, processor.point_pad_value = (
        AutoTokenizer.from_pretrained(CLIP_TOKENIZER_FILE.parent),
        -10,
    )
    return processor(
        original_sizes=[[height, width] for width, height in sizes],
        text=[prompt.text for prompt in prompts],
        input_boxes=[[[float(side) for side in box] for box in prompt.boxes] for prompt in prompts],
        input_boxes_labels=[[int(label) for label in prompt.labels] for prompt in prompts],
        return_tensors="pt",
    )


def test_requests_equal_transformers(models: tuple[Any, SAM3Network], pixels: Tensor) -> None:
    """Boxes alone, and pairs of unlike numbers of boxes in one pass: all that serving makes of them."""
    model, network = models
    pairs = [(prompt, image) for image, prompts in enumerate(PROMPTS) for prompt in prompts]
    inputs = processed([prompt for prompt, _ in pairs], [SIZES[image] for _, image in pairs])
    del inputs["original_sizes"]
    expected = model(pixel_values=pixels[[image for _, image in pairs]].float() / 127.5 - 1.0, **inputs)
    presences = expected.presence_logits[:, 0].sigmoid()
    requests = [
        ModelRequest(StagedImage(square.permute(1, 2, 0).contiguous(), *size), prompts, with_masks=True)
        for square, size, prompts in zip(pixels, SIZES, PROMPTS, strict=True)
    ]
    loaded = LoadedModel(network, PromptTokenizer(CLIP_TOKENIZER_FILE), 2)
    results = loaded.segment(requests, Keeping(0.0), PassClock(torch.device("cpu")))
    found = [pair for of_image in results for pair in of_image or []]
    for row, ((_, image), pair) in enumerate(zip(pairs, found, strict=True)):
        assert pair.presence == pytest.approx(float(presences[row]), abs=1e-5)
        assert len(pair.found.instances) == expected.pred_logits.shape[1]
        width, height = SIZES[image]
        for instance in pair.found.instances:
            assert isinstance(instance, Instance)
            score = expected.pred_logits[row, instance.query].sigmoid() * presences[row]
            assert instance.score == pytest.approx(float(score), abs=1e-5)
            box = expected.pred_boxes[row, instance.query].clamp(0, 1) * torch.tensor([width, height] * 2)
            assert instance.box == pytest.approx(box.tolist(), abs=0.01)
            logits = expected.pred_masks[row, instance.query][None, None]
            drawn = F.interpolate(logits, (height, width), mode="bilinear", align_corners=False)[0, 0] > 0
            assert abs(instance.area_px - int(drawn.sum())) <= 0.001 * width * height


def test_no_valid_box_equals_the_text_alone(models: tuple[Any, SAM3Network], pixels: Tensor) -> None:
    """Padding alone gives the class token of a prompt without boxes."""
    network = models[1]
    image = network.encode_image(pixels)
    none = torch.zeros(2, 4, dtype=torch.bool)
    tokens, valid = network.encode_boxes(image.coarse, torch.rand(2, 4, 4), none, none)
    torch.testing.assert_close(tokens[:, -1:], image.geometry_token, atol=1e-5, rtol=1e-5)
    assert valid.tolist() == [[False] * 4 + [True]] * 2
