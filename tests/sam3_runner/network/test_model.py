"""Our network compared with transformers' model, over the same weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import Sam3Config, Sam3Model
from transformers.modeling_outputs import BaseModelOutputWithPooling

from sam3_runner.network.masks import mask_logits
from sam3_runner.weights.load import load_network, to_transformers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from sam3_runner.network.model import Detections, ImageFeatures, SAM3Network, TextFeatures
    from sam3_runner.weights.checkpoint import Checkpoint

IMAGE_INDEX, TEXT_INDEX = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2])
ATOL = 2e-5


@pytest.fixture(scope="module")
def network(tiny_checkpoint: Checkpoint) -> SAM3Network:
    return load_network(tiny_checkpoint, torch.device("cpu"))[0]


@pytest.fixture(scope="module")
def transformers_model(tiny_checkpoint: Checkpoint, network: SAM3Network) -> Any:
    """Transformers' model with the network's weights."""
    model: Any = Sam3Model(Sam3Config.from_dict(tiny_checkpoint.config))
    model.load_state_dict(to_transformers(network.state_dict()), strict=True)
    return model.eval()


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (2, 3, 112, 112), dtype=torch.uint8, generator=generator)


@pytest.fixture
def image(network: SAM3Network, pixels: Tensor) -> ImageFeatures:
    return network.encode_image(pixels)


@pytest.fixture
def text(network: SAM3Network) -> TextFeatures:
    ids = torch.randint(0, 49407, (3, 32), generator=torch.Generator().manual_seed(2))
    return network.encode_text(ids, torch.arange(32)[None] < torch.tensor([4, 6, 32])[:, None])


@pytest.fixture
def detections(network: SAM3Network, image: ImageFeatures, text: TextFeatures) -> Detections:
    return decode(network, image, text, IMAGE_INDEX, TEXT_INDEX)


def decode(
    network: SAM3Network, image: ImageFeatures, text: TextFeatures, image_index: Tensor, text_index: Tensor
) -> Detections:
    return network.decode(
        image.attended[image_index],
        image.geometry_token[image_index],
        text.tokens[text_index],
        text.valid[text_index],
    )


def reference(model: Any, pixels: Tensor, tokens: Tensor, valid: Tensor) -> Any:
    """Transformers' forward pass on one image, with given prompt tokens."""
    return model(
        vision_embeds=model.get_vision_features(pixels.float() / 127.5 - 1.0),
        text_embeds=BaseModelOutputWithPooling(pooler_output=tokens),
        attention_mask=valid.long(),
    )


@pytest.mark.parametrize("pair", range(3))
def test_equals_transformers(
    transformers_model: Any, network: SAM3Network, pixels: Tensor, detections: Detections, pair: int
) -> None:
    """With the same prompt tokens, logits, presence, boxes and masks equal those of transformers."""
    row = int(IMAGE_INDEX[pair])
    one = slice(pair, pair + 1)
    image = network.encode_image(pixels[row : row + 1])
    expected = reference(
        transformers_model, pixels[row : row + 1], detections.prompt[one], detections.prompt_valid[one]
    )
    features = network.pixel_features(
        detections.fused[one],
        detections.prompt[one],
        detections.prompt_valid[one],
        image.finer,
    )
    masks = mask_logits(*network.mask_decoder.embed(detections.queries[-1][one]), features)
    torch.testing.assert_close(detections.logits[pair], expected.pred_logits[0], atol=ATOL, rtol=1e-4)
    torch.testing.assert_close(detections.boxes[pair], expected.pred_boxes[0], atol=ATOL, rtol=1e-4)
    torch.testing.assert_close(
        detections.presence_logits[pair], expected.presence_logits[0, 0], atol=ATOL, rtol=1e-4
    )
    torch.testing.assert_close(masks[0], expected.pred_masks[0], atol=1e-3, rtol=1e-3)


def test_text_equals_transformers(transformers_model: Any, text: TextFeatures) -> None:
    """Text tokens equal those of transformers at every valid position."""
    ids = torch.randint(0, 49407, (3, 32), generator=torch.Generator().manual_seed(2))
    expected = transformers_model.get_text_features(
        input_ids=ids, attention_mask=text.valid.long(), return_dict=True
    ).pooler_output
    torch.testing.assert_close(text.tokens[text.valid], expected[text.valid], atol=ATOL, rtol=1e-4)


def test_geometry_token_is_the_last_of_the_prompt(
    image: ImageFeatures, text: TextFeatures, detections: Detections
) -> None:
    """The prompt is the text's tokens, then the geometry token of its image, which is always valid."""
    torch.testing.assert_close(detections.prompt[:, :-1], text.tokens)
    torch.testing.assert_close(detections.prompt[:, -1], image.geometry_token[IMAGE_INDEX, 0])
    assert detections.prompt_valid[:, -1].all()
    assert not torch.equal(image.geometry_token[0], image.geometry_token[1])


def test_geometry_token_equals_transformers(
    transformers_model: Any, pixels: Tensor, image: ImageFeatures
) -> None:
    """The geometry token equals what transformers' layers compute of the class token."""
    encoder = transformers_model.geometry_encoder
    vision = transformers_model.vision_encoder(pixels.float() / 127.5 - 1.0)
    coarse = vision.fpn_hidden_states[-2].flatten(2).transpose(1, 2)
    position = vision.fpn_position_encoding[-2].flatten(2).transpose(1, 2)
    token = encoder.prompt_layer_norm(encoder.final_proj(encoder.cls_embed.weight.expand(2, 1, -1)))
    for layer in encoder.layers:
        token = layer(prompt_feats=token, vision_feats=coarse, vision_pos_encoding=position, prompt_mask=None)
    torch.testing.assert_close(image.geometry_token, encoder.output_layer_norm(token), atol=ATOL, rtol=1e-4)


def test_pairs_together_equal_pairs_alone(
    network: SAM3Network, pixels: Tensor, text: TextFeatures, detections: Detections
) -> None:
    """The outputs of a pair do not depend on the other pairs of its pass."""
    for pair in range(3):
        row = int(IMAGE_INDEX[pair])
        alone = decode(
            network,
            network.encode_image(pixels[row : row + 1]),
            text,
            torch.tensor([0]),
            TEXT_INDEX[pair : pair + 1],
        )
        torch.testing.assert_close(alone.logits[0], detections.logits[pair], atol=ATOL, rtol=1e-4)
        torch.testing.assert_close(alone.boxes[0], detections.boxes[pair], atol=ATOL, rtol=1e-4)
        torch.testing.assert_close(
            alone.presence_logits[0], detections.presence_logits[pair], atol=ATOL, rtol=1e-4
        )


def test_padding_has_no_effect(network: SAM3Network, image: ImageFeatures) -> None:
    """Token ids after a text's last token do not change the outputs."""
    ids = torch.randint(0, 49407, (1, 32), generator=torch.Generator().manual_seed(3))
    valid = torch.arange(32)[None] < 5
    first = network.encode_text(ids, valid)
    second = network.encode_text(torch.where(valid, ids, 7), valid)
    short = network.encode_text(ids[:, :8], valid[:, :8])
    index = torch.tensor([0])
    logits = [decode(network, image, each, index, index).logits for each in (first, second, short)]
    torch.testing.assert_close(logits[0], logits[1], atol=ATOL, rtol=1e-4)
    torch.testing.assert_close(logits[0], logits[2], atol=ATOL, rtol=1e-4)


def test_first_self_attention_runs_once_per_image(
    transformers_model: Any, pixels: Tensor, image: ImageFeatures
) -> None:
    """The first self-attention of the fusion encoder, computed per image, equals that of transformers."""
    layer = transformers_model.detr_encoder.layers[0]
    inputs: list[Tensor] = []
    hook = layer.layer_norm2.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    tokens = torch.zeros(1, 3, 64)
    try:
        reference(transformers_model, pixels[:1], tokens, torch.ones(1, 3, dtype=torch.bool))
    finally:
        hook.remove()
    torch.testing.assert_close(inputs[0][0], image.attended[0], atol=ATOL, rtol=1e-4)


def test_forward_is_differentiable(network: SAM3Network, pixels: Tensor) -> None:
    """Gradients reach the text features: training uses the serving code."""
    with torch.inference_mode(mode=False), torch.enable_grad():
        ids = torch.randint(0, 49407, (1, 32), generator=torch.Generator().manual_seed(4))
        text = network.encode_text(ids, torch.arange(32)[None] < 6)
        tokens = text.tokens.detach().requires_grad_()
        image = network.encode_image(pixels[:1].clone())
        found = network.decode(image.attended, image.geometry_token, tokens, text.valid)
        (found.logits.sum() + found.presence_logits.sum() + found.boxes.sum()).backward()  # type: ignore[no-untyped-call]
    assert tokens.grad is not None
    assert tokens.grad.abs().sum() > 0
