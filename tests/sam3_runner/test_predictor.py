"""SAM3Predictor with an untrained model of the same class."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's usual alias
from PIL import Image
from prometheus_client import REGISTRY
from safetensors.torch import load_file

from sam3_runner import ModelNotLoaded, PromptTooLong, SAM3Predictor, WeightsError
from sam3_runner.images.decoded import LocalImage
from sam3_runner.images.square import to_square
from sam3_runner.inference.pass_clock import PassClock
from sam3_runner.inference.passes import Decoded, Passes
from sam3_runner.inference.texts import CACHED_TEXTS
from sam3_runner.instances import union_mask
from sam3_runner.network.masks import mask_logits
from sam3_runner.prompts import PromptTokenizer
from tests.breaking import TOO_MANY_FLOATS
from tests.concepts import concepts

if TYPE_CHECKING:
    from pathlib import Path

    from sam3_runner.instances import PredictResult
    from sam3_runner.weights.checkpoint import Checkpoint

KEPT_SCORE = 0.01
"""So low that the untrained model keeps many queries."""


@pytest.fixture(scope="module")
def predictor(tiny_checkpoint: Checkpoint) -> SAM3Predictor:
    loaded = SAM3Predictor(str(tiny_checkpoint.weights_file.parent), "cpu", score_threshold=KEPT_SCORE)
    loaded.load()
    return loaded


def picture(seed: int, width: int, height: int) -> Image.Image:
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def check_same(one: PredictResult, other: PredictResult) -> None:
    assert (one.prompt, one.image_width, one.image_height) == (
        other.prompt,
        other.image_width,
        other.image_height,
    )
    assert one.presence == pytest.approx(other.presence, abs=1e-5)
    assert len(one.instances) == len(other.instances)
    # Nearly equal scores may change their order: the untrained model's queries are similar.
    for first, second in zip(sorted_by_box(one), sorted_by_box(other), strict=True):
        assert first.score == pytest.approx(second.score, abs=1e-4)
        assert first.box == pytest.approx(second.box, abs=0.05)
        assert first.area_px == pytest.approx(second.area_px, rel=0.01, abs=20)


def sorted_by_box(result: PredictResult) -> list[Any]:
    return sorted(result.instances, key=lambda instance: [round(side, 1) for side in instance.box])


def test_predict_is_a_batch_of_one(predictor: SAM3Predictor) -> None:
    """`predict` gives the result of `predict_batch` for the same prompt, at the image's size."""
    image = picture(0, 200, 90)
    alone = predictor.predict(image, "red circle")
    [first, second] = predictor.predict_batch(image, ["red circle", "cat"])
    assert alone.instances
    check_same(alone, first)
    assert second.prompt == "cat"
    assert (alone.image_width, alone.image_height) == (200, 90)
    assert alone.mask_array().shape == (90, 200)
    assert alone.confidence == alone.instances[0].score
    assert [found.score for found in alone.instances] == sorted(
        (found.score for found in alone.instances), reverse=True
    )


def test_images_together_equal_images_alone(predictor: SAM3Predictor) -> None:
    """Images of different sizes, each with its own prompts, give the same results in one pass as alone."""
    images = [picture(1, 112, 112), picture(2, 60, 300), picture(3, 333, 47)]
    prompts = [["cat"], ["red circle", "cat", "dog"], ["dog"]]
    squares = [to_square(image, 112) for image in images]
    together = predictor.segment(
        [(square, concepts(*texts)) for square, texts in zip(squares, prompts, strict=True)]
    )
    for image, texts, results in zip(images, prompts, together, strict=True):
        for text, result in zip(texts, results, strict=True):
            check_same(result, predictor.predict(image, text))


def test_more_pairs_than_one_pass_decodes(predictor: SAM3Predictor) -> None:
    """More prompts than one pass decodes are decoded in several passes, in their order."""
    image = picture(4, 50, 50)
    prompts = [f"thing {number}" for number in range(19)]
    results = predictor.predict_batch(image, prompts)
    assert [result.prompt for result in results] == prompts
    check_same(results[18], predictor.predict(image, "thing 18"))


class LittleMemory(Passes):
    """Its memory has room for `room` pairs; the error is torch's own."""

    room = 3
    failed = 0

    def decode(
        self,
        attended: torch.Tensor,
        geometry_token: torch.Tensor,
        text_tokens: torch.Tensor,
        text_valid: torch.Tensor,
    ) -> Decoded:
        if len(attended) > self.room:
            self.failed += 1
            torch.empty(TOO_MANY_FLOATS)
        return super().decode(attended, geometry_token, text_tokens, text_valid)


def with_little_memory(checkpoint: Checkpoint) -> tuple[SAM3Predictor, LittleMemory]:
    narrow = SAM3Predictor(str(checkpoint.weights_file.parent), "cpu", score_threshold=KEPT_SCORE)
    narrow.load()
    passes = LittleMemory(narrow._network)
    narrow._model_in("float32")._passes = passes
    return narrow, passes


def test_pairs_that_do_not_fit(tiny_checkpoint: Checkpoint, predictor: SAM3Predictor) -> None:
    """More pairs than fit are decoded in smaller passes, with the same results; the size is remembered."""
    narrow, passes = with_little_memory(tiny_checkpoint)
    image = picture(4, 50, 50)
    prompts = [f"thing {number}" for number in range(10)]
    for result, expected in zip(
        narrow.predict_batch(image, prompts), predictor.predict_batch(image, prompts), strict=True
    ):
        check_same(result, expected)
    assert passes.failed == 2  # of 10 and of 5 pairs; then 2 at once
    narrow.predict_batch(image, prompts)
    assert passes.failed == 2


def test_pair_that_does_not_fit(tiny_checkpoint: Checkpoint) -> None:
    """An error of torch is raised when one pair alone does not fit; later passes decode as many as before."""
    narrow, passes = with_little_memory(tiny_checkpoint)
    passes.room = 0
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        narrow.predict_batch(picture(4, 50, 50), ["cat", "dog"])
    passes.room, before = 3, passes.failed
    assert len(narrow.predict_batch(picture(4, 50, 50), ["cat", "dog", "ring"])) == 3
    assert passes.failed == before


def test_duplicate_prompts(predictor: SAM3Predictor) -> None:
    """A duplicate prompt gives the same result twice."""
    [first, _, again] = predictor.predict_batch(picture(5, 64, 64), ["cat", "dog", "cat"])
    check_same(first, again)


def test_no_prompts_no_results(predictor: SAM3Predictor) -> None:
    """No prompts give no results."""
    assert predictor.predict_batch(picture(5, 64, 64), []) == []


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16", "I", "F"])
def test_any_mode_is_accepted(predictor: SAM3Predictor, mode: str) -> None:
    """An image of any Pillow mode is segmented."""
    image = Image.fromarray(np.zeros((20, 30), dtype=np.uint16)) if mode == "I;16" else None
    image = image or picture(6, 30, 20).convert("L" if mode in "IF" else "RGB").convert(mode)
    result = predictor.predict(image, "cat")
    assert (result.image_width, result.image_height) == (30, 20)


def encoded_texts() -> float:
    """How many texts have been encoded so far."""
    return REGISTRY.get_sample_value("sam3_texts_total", {"cache": "miss"}) or 0.0


def test_texts_are_encoded_once(predictor: SAM3Predictor) -> None:
    """A cached prompt is not encoded again."""
    before = encoded_texts()
    first = predictor.predict_batch(picture(7, 40, 40), ["never seen", "neither this", "never seen"])
    again = predictor.predict_batch(picture(7, 40, 40), ["neither this", "never seen"])
    assert encoded_texts() - before == 2
    check_same(first[0], again[1])


def test_texts_that_the_model_reads_alike_share_an_entry(predictor: SAM3Predictor) -> None:
    """Case, spaces and marks at the ends make no second encoding; results keep the prompt as sent."""
    before = encoded_texts()
    prompts = ["A  Lone Tree", "a lone tree\u200b", "another &amp;amp;amp;lt; tree"]
    results = predictor.predict_batch(picture(7, 40, 40), prompts)
    assert [result.prompt for result in results] == prompts
    check_same(replace(results[1], prompt=prompts[0]), results[0])
    predictor.predict(picture(7, 40, 40), " a lone tree ")
    assert encoded_texts() - before == 2


def test_cache_holds_no_more_than_its_entries(predictor: SAM3Predictor) -> None:
    """Each cached text has memory of its own, not a view of the batch in which it was encoded."""
    prompts = [f"memory {number}" for number in range(10)]
    predictor.predict_batch(picture(7, 40, 40), prompts)
    texts = predictor._model_in("float32").texts
    for prompt in prompts:
        entry = texts._features[prompt]
        for tensor in (entry.tokens, entry.valid):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_cache_of_texts_is_bounded(predictor: SAM3Predictor) -> None:
    """The cache holds a bounded number of prompts; the least recent are removed."""
    texts, clock = predictor._model_in("float32").texts, PassClock(torch.device("cpu"))
    for start in range(0, CACHED_TEXTS + 64, 64):
        words = [f"word {number}" for number in range(start, start + 64)]
        with torch.inference_mode():
            texts.features(dict(zip(words, words, strict=True)), clock)
    assert len(texts) == CACHED_TEXTS
    assert f"word {CACHED_TEXTS + 63}" in texts
    assert "word 0" not in texts


def test_prompt_of_too_many_tokens(predictor: SAM3Predictor) -> None:
    """More than 32 tokens are refused, not truncated."""
    with pytest.raises(PromptTooLong, match="33 tokens"):
        predictor.predict(picture(0, 20, 20), "cat " * 31)
    assert predictor.predict(picture(0, 20, 20), "cat " * 30).prompt == "cat " * 30


def test_load_is_required(tiny_checkpoint: Checkpoint) -> None:
    """A predictor that was not loaded raises ModelNotLoaded."""
    unloaded = SAM3Predictor(str(tiny_checkpoint.weights_file.parent), "cpu")
    with pytest.raises(ModelNotLoaded, match="load"):
        unloaded.predict(picture(0, 20, 20), "cat")
    with pytest.raises(ModelNotLoaded, match="load"):
        unloaded.segment([])


def test_parameters_and_dtype(predictor: SAM3Predictor, tiny_checkpoint: Checkpoint) -> None:
    """The predictor reports its number of parameters and dtype, and converts the file's fp16 to fp32."""
    stored = load_file(tiny_checkpoint.weights_file)
    assert predictor.parameters == sum(tensor.numel() for tensor in stored.values())
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert predictor.dtype == "float32"
    assert {parameter.dtype for parameter in predictor._network.parameters()} == {torch.float32}
    assert not predictor._network.training


def raw(predictor: SAM3Predictor, image: Image.Image, prompt: str) -> tuple[Any, torch.Tensor]:
    """The model's detections and mask logits of one pair, without the predictor's own steps."""
    assert predictor.checkpoint is not None
    network = predictor._network
    tokens = PromptTokenizer(predictor.checkpoint.tokenizer_file).encode([prompt])
    pixels = torch.from_numpy(to_square(image, 112).pixels.copy()).permute(2, 0, 1)[None]
    with torch.inference_mode():
        encoded = network.encode_image(pixels)
        text = network.encode_text(torch.from_numpy(tokens.ids), torch.from_numpy(tokens.valid))
        found = network.decode(encoded.attended, encoded.geometry_token, text.tokens, text.valid)
        features = network.pixel_features(found.fused, found.prompt, found.prompt_valid, encoded.finer)
        return found, mask_logits(*network.mask_decoder.embed(found.queries[-1]), features)[0]


def test_presence_multiplies_the_score(predictor: SAM3Predictor) -> None:
    """A score is the query's probability times the probability that the concept is present."""
    image = picture(8, 112, 112)
    found, _ = raw(predictor, image, "cat")
    result = predictor.predict(image, "cat")
    expected = found.logits[0].sigmoid() * found.presence_logits[0].sigmoid()
    kept = expected[expected > KEPT_SCORE].sort(descending=True).values
    assert [instance.score for instance in result.instances] == pytest.approx(kept.tolist(), abs=1e-5)
    assert result.presence == pytest.approx(float(found.presence_logits[0].sigmoid()), abs=1e-5)


def test_score_threshold(tiny_checkpoint: Checkpoint, predictor: SAM3Predictor) -> None:
    """Only instances above the threshold are kept; the default is 0.5."""
    assert SAM3Predictor("demo", "cpu").score_threshold == 0.5
    image = picture(8, 112, 112)
    scores = [instance.score for instance in predictor.predict(image, "cat").instances]
    middle = scores[len(scores) // 2]
    strict = SAM3Predictor(str(tiny_checkpoint.weights_file.parent), "cpu", score_threshold=middle)
    strict.load()
    kept = [instance.score for instance in strict.predict(image, "cat").instances]
    assert kept
    assert min(kept) > middle - 1e-5
    assert len(kept) < len(scores)


@pytest.mark.parametrize(("width", "height"), [(112, 112), (301, 57), (13, 400), (1, 1)])
def test_masks_are_upsampled_as_logits(predictor: SAM3Predictor, width: int, height: int) -> None:
    """Masks are logits upsampled bilinearly to the image's size and thresholded at zero; boxes are scaled."""
    image = picture(9, width, height)
    found, logits = raw(predictor, image, "cat")
    whole = F.interpolate(logits[:, None], (height, width), mode="bilinear", align_corners=False)[:, 0]
    result = predictor.predict(image, "cat")
    scores = found.logits[0].sigmoid() * found.presence_logits[0].sigmoid()
    kept = scores > KEPT_SCORE
    union = (whole[kept] > 0).any(dim=0).numpy()
    assert np.mean(union != result.mask_array()) < 0.01
    scale = torch.tensor([width, height, width, height])
    boxes = (found.boxes[0][kept] * scale).tolist()
    assert sorted(instance.box for instance in result.instances) == [
        pytest.approx(tuple(box), abs=1e-2) for box in sorted(boxes)
    ]


def test_union_of_several_prompts(predictor: SAM3Predictor) -> None:
    """The union of several results is the union of their masks."""
    results = predictor.predict_batch(picture(10, 70, 40), ["cat", "dog"])
    union = results[0].mask_array() | results[1].mask_array()
    assert np.array_equal(union_mask(results), union)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_missing_file(broken_checkpoint: Path, name: str) -> None:
    """For a folder that lacks a file the error has the file's name."""
    (broken_checkpoint / name).unlink()
    check_refused(broken_checkpoint, f"holds no {name}")


@pytest.mark.parametrize("text", ["", "{", "\xff"])
def test_broken_config(broken_checkpoint: Path, text: str) -> None:
    """For a config.json that is no JSON the error has its path."""
    (broken_checkpoint / "config.json").write_bytes(text.encode("latin-1"))
    check_refused(broken_checkpoint, "config.json", "cannot be read")


def test_other_model(broken_checkpoint: Path) -> None:
    """For the folder of another model the error has that model's name."""
    (broken_checkpoint / "config.json").write_text(json.dumps({"model_type": "clip"}))
    check_refused(broken_checkpoint, "'clip'")


def test_broken_tokenizer(broken_checkpoint: Path) -> None:
    """For an invalid tokenizer.json the error has its path."""
    (broken_checkpoint / "tokenizer.json").write_text("{}")
    check_refused(broken_checkpoint, "tokenizer.json", "is not a tokenizer")


def test_missing_weights(tmp_path: Path) -> None:
    """For a path where nothing exists the error says what to do."""
    check_refused(tmp_path / "sam3.pt", "HF_TOKEN", "SAM3_WEIGHTS_PATH=demo")


def test_stored_pixels(predictor: SAM3Predictor) -> None:
    """Pixels as stored, of any size, give what the square of the same picture gives."""
    image = picture(0, 150, 90)
    stored = LocalImage(np.asarray(image), *image.size)
    [[expected]] = predictor.segment([(to_square(image, 112), concepts("cat"))])
    [[found]] = predictor.segment([(stored, concepts("cat"))])
    assert found.confidence == pytest.approx(expected.confidence, abs=0.01)
    assert (found.image_width, found.image_height) == (150, 90)


def check_refused(folder: Path, *parts: str) -> None:
    """Loading fails with an error that contains `parts`, and the predictor is not loaded."""
    predictor = SAM3Predictor(str(folder), "cpu")
    with pytest.raises(WeightsError) as refused:
        predictor.load()
    for part in parts:
        assert part in str(refused.value)
    with pytest.raises(ModelNotLoaded):
        predictor.predict(Image.new("RGB", (9, 9)), "cat")
