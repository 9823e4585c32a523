"""Our forward pass compared with that of transformers, over the same weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from sam3_runner.model import decode_prompts, encode_image, encode_text, pixel_features, predict_masks
from sam3_runner.weights.load import load_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sam3_runner.model import Detections, ImageFeatures, TextFeatures
    from sam3_runner.weights.checkpoint import Checkpoint

IMAGE_INDEX, TEXT_INDEX = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2])
ATOL = 2e-5


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Checkpoint) -> Any:
    return load_model(tiny_checkpoint, torch.device("cpu"))[0]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (2, 3, 112, 112), dtype=torch.uint8, generator=generator)


@pytest.fixture
def image(model: Any, pixels: torch.Tensor) -> ImageFeatures:
    return encode_image(model, pixels)


@pytest.fixture
def text(model: Any) -> TextFeatures:
    ids = torch.randint(0, 49407, (3, 32), generator=torch.Generator().manual_seed(2))
    return encode_text(model, ids, torch.arange(32)[None] < torch.tensor([4, 6, 32])[:, None])


@pytest.fixture
def detections(model: Any, image: ImageFeatures, text: TextFeatures) -> Detections:
    return decode_prompts(model, image, text, IMAGE_INDEX, TEXT_INDEX)


def reference(model: Any, pixels: torch.Tensor, tokens: torch.Tensor, valid: torch.Tensor) -> Any:
    """Transformers' forward pass on one image, with given prompt tokens."""
    return model(
        vision_embeds=model.get_vision_features(pixels.float() / 127.5 - 1.0),
        text_embeds=BaseModelOutputWithPooling(pooler_output=tokens),
        attention_mask=valid.long(),
    )


@pytest.mark.parametrize("pair", range(3))
def test_equals_transformers(
    model: Any, pixels: torch.Tensor, image: ImageFeatures, detections: Detections, pair: int
) -> None:
    """With the same prompt tokens, logits, presence, boxes and masks equal those of transformers."""
    row = int(IMAGE_INDEX[pair])
    expected = reference(
        model,
        pixels[row : row + 1],
        detections.prompt[pair : pair + 1],
        detections.prompt_valid[pair : pair + 1],
    )
    features = pixel_features(model, image, detections, IMAGE_INDEX, torch.tensor([pair]))
    masks = predict_masks(model, features[0], detections.queries[-1, pair])
    torch.testing.assert_close(detections.logits[pair], expected.pred_logits[0], atol=ATOL, rtol=1e-4)
    torch.testing.assert_close(detections.boxes[pair], expected.pred_boxes[0], atol=ATOL, rtol=1e-4)
    torch.testing.assert_close(
        detections.presence_logits[pair], expected.presence_logits[0, 0], atol=ATOL, rtol=1e-4
    )
    torch.testing.assert_close(masks, expected.pred_masks[0], atol=1e-3, rtol=1e-3)


def test_geometry_token_is_the_last_of_the_prompt(
    image: ImageFeatures, text: TextFeatures, detections: Detections
) -> None:
    """The prompt is the text's tokens, then the geometry token of its image, which is always valid."""
    torch.testing.assert_close(detections.prompt[:, :-1], text.tokens)
    torch.testing.assert_close(detections.prompt[:, -1], image.geometry_token[IMAGE_INDEX, 0])
    assert detections.prompt_valid[:, -1].all()
    assert not torch.equal(image.geometry_token[0], image.geometry_token[1])


def test_pairs_together_equal_pairs_alone(
    model: Any, pixels: torch.Tensor, text: TextFeatures, detections: Detections
) -> None:
    """The outputs of a pair do not depend on the other pairs of its pass."""
    for pair in range(3):
        row = int(IMAGE_INDEX[pair])
        alone = decode_prompts(
            model,
            encode_image(model, pixels[row : row + 1]),
            text,
            torch.tensor([0]),
            TEXT_INDEX[pair : pair + 1],
        )
        torch.testing.assert_close(alone.logits[0], detections.logits[pair], atol=ATOL, rtol=1e-4)
        torch.testing.assert_close(alone.boxes[0], detections.boxes[pair], atol=ATOL, rtol=1e-4)
        torch.testing.assert_close(
            alone.presence_logits[0], detections.presence_logits[pair], atol=ATOL, rtol=1e-4
        )


def test_padding_has_no_effect(model: Any, image: ImageFeatures) -> None:
    """Token ids after a text's last token do not change the outputs."""
    ids = torch.randint(0, 49407, (1, 32), generator=torch.Generator().manual_seed(3))
    valid = torch.arange(32)[None] < 5
    first = encode_text(model, ids, valid)
    second = encode_text(model, torch.where(valid, ids, 7), valid)
    short = encode_text(model, ids[:, :8], valid[:, :8])
    index = torch.tensor([0])
    logits = [decode_prompts(model, image, each, index, index).logits for each in (first, second, short)]
    torch.testing.assert_close(logits[0], logits[1], atol=ATOL, rtol=1e-4)
    torch.testing.assert_close(logits[0], logits[2], atol=ATOL, rtol=1e-4)


def test_first_self_attention_runs_once_per_image(
    model: Any, pixels: torch.Tensor, image: ImageFeatures
) -> None:
    """The first self-attention of the fusion encoder, computed per image, equals that of transformers."""
    layer = model.detr_encoder.layers[0]
    inputs: list[torch.Tensor] = []
    hook = layer.layer_norm2.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    tokens = torch.zeros(1, 3, 64)
    try:
        reference(model, pixels[:1], tokens, torch.ones(1, 3, dtype=torch.bool))
    finally:
        hook.remove()
    torch.testing.assert_close(inputs[0][0], image.attended[0], atol=ATOL, rtol=1e-4)


def test_forward_is_differentiable(model: Any, pixels: torch.Tensor) -> None:
    """Gradients reach the text features: training uses the serving code."""
    with torch.inference_mode(mode=False), torch.enable_grad():
        ids = torch.randint(0, 49407, (1, 32), generator=torch.Generator().manual_seed(4))
        text = encode_text(model, ids, torch.arange(32)[None] < 6)
        tokens = text.tokens.detach().requires_grad_()
        detections = decode_prompts(
            model,
            encode_image(model, pixels[:1].clone()),
            type(text)(tokens=tokens, valid=text.valid),
            torch.tensor([0]),
            torch.tensor([0]),
        )
        (detections.logits.sum() + detections.presence_logits.sum() + detections.boxes.sum()).backward()  # type: ignore[no-untyped-call]
    assert tokens.grad is not None
    assert tokens.grad.abs().sum() > 0
