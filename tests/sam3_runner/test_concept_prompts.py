"""Prompts with boxes and thresholds, from the value to the engine's outcome."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from sam3_runner import SAM3Predictor
from sam3_runner.errors import BoxOutsideImage, MasksTooLarge
from sam3_runner.images.decoded import DecodedImage
from sam3_runner.images.square import to_square
from sam3_runner.instances import PredictResult, UnionResult, packed_union
from sam3_runner.prompts import MAX_BOXES, ConceptPrompt
from sam3_runner.serving.engine import Engine, EngineConfig, SegmentRequest
from tests.edge import wait_for

SAMPLE = Path(__file__).parents[2] / "examples/sample.jpg"
WIDTH, HEIGHT = 320, 180
SIDE_PX = 336
"""Of the demo checkpoint's square."""
BOX = (230.5, 91.0, 269.0, 126.5)
OTHER = (20.0, 30.0, 90.0, 99.5)
PROMPTS = [
    ConceptPrompt("purple circle"),
    ConceptPrompt(None, (BOX,), (True,)),
    ConceptPrompt("triangles", (BOX, OTHER), (True, False)),
    ConceptPrompt("triangles"),
    ConceptPrompt("triangles", (BOX, OTHER), (True, True)),
]


def picture(*, flipped: bool = False) -> Image.Image:
    small = Image.open(SAMPLE).resize((WIDTH, HEIGHT))
    return ImageOps.mirror(small) if flipped else small


def loaded(**options: Any) -> SAM3Predictor:
    """The demo checkpoint, which keeps every query unless a prompt says otherwise."""
    predictor = SAM3Predictor("demo", "cpu", **({"score_threshold": 0.0} | options))
    predictor.load()
    return predictor


@pytest.fixture(scope="module")
def predictor() -> SAM3Predictor:
    return loaded()


def check_same(one: PredictResult, other: PredictResult) -> None:
    assert (one.prompt, len(one.instances)) == (other.prompt, len(other.instances))
    assert one.presence == pytest.approx(other.presence, abs=1e-4)
    for mine, theirs in zip(one.instances, other.instances, strict=True):
        assert mine.score == pytest.approx(theirs.score, abs=1e-4)
    different = np.unpackbits(packed_union([one]) ^ packed_union([other]))
    assert different.mean() <= 1e-3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": None}, "text is None and boxes is empty"),
        ({"boxes": (BOX,) * (MAX_BOXES + 1)}, "boxes has 33 boxes: at most 32"),
        ({"boxes": (BOX, OTHER), "labels": (True,)}, "labels has 1 values for 2 boxes"),
        ({"labels": (True,)}, "labels has 1 values for 0 boxes"),
        ({"boxes": ((1.0, 2.0, math.nan, 4.0),)}, r"boxes\[0\] .* must be finite"),
        ({"boxes": (BOX, (1.0, 2.0, math.inf, 4.0))}, r"boxes\[1\] .* must be finite"),
        ({"boxes": ((5.0, 2.0, 5.0, 4.0),)}, r"boxes\[0\] .* x0 must be less than x1"),
        ({"boxes": ((1.0, 5.0, 5.0, 4.0),)}, "y0 less than y1"),
        ({"score_threshold": 1.5}, "score_threshold is 1.5: it must be in 0..1"),
        ({"score_threshold": math.nan}, "score_threshold is nan"),
    ],
)
def test_bad_prompt_is_refused(fields: dict[str, Any], message: str) -> None:
    """A value out of its range is a ValueError that names it."""
    boxes = fields.get("boxes", ())
    with pytest.raises(ValueError, match=message):
        ConceptPrompt(**({"text": "cat", "labels": (True,) * len(boxes)} | fields))


def test_boxes_are_clipped_to_the_image() -> None:
    """Boxes that stick out are clipped; one without a px of the image is refused by its index."""
    prompt = ConceptPrompt(None, ((-5.0, -1.0, 30.0, 199.0), (319.5, 10.0, 400.0, 20.0)), (True, True))
    assert prompt.boxes_inside(WIDTH, HEIGHT) == ((0.0, 0.0, 30.0, 180.0), (319.5, 10.0, 320.0, 20.0))
    for outside in ((320.0, 0.0, 325.0, 9.0), (-9.0, 0.0, 0.0, 9.0), (0.0, 180.0, 9.0, 190.0)):
        with pytest.raises(BoxOutsideImage, match=r"boxes\[1\] .* no px of an image of 320 x 180"):
            replace(prompt, boxes=(BOX, outside)).boxes_inside(WIDTH, HEIGHT)


def test_prompts_together_equal_prompts_alone(predictor: SAM3Predictor) -> None:
    """Prompts with boxes and without, in one call and in their order, each as if alone; each box counts."""
    together = predictor.predict_batch(picture(), PROMPTS)
    assert [result.prompt for result in together] == [prompt.model_text for prompt in PROMPTS]
    for prompt, result in zip(PROMPTS, together, strict=True):
        assert result.instances
        check_same(result, predictor.predict_batch(picture(), [prompt])[0])
    answers = [tuple(round(each.score, 6) for each in result.instances) for result in together]
    assert len(set(answers)) == len(PROMPTS)


def test_boxes_outside_do_not_count(predictor: SAM3Predictor) -> None:
    """The part of a box outside the image changes nothing; labels default to positive."""
    inside = predictor.predict(picture(), "star", boxes=[(200.0, 50.0, 320.0, 180.0)])
    outside = predictor.predict(picture(), "star", boxes=[(200.0, 50.0, 327.5, 288.0)], labels=[True])
    assert [each.score for each in inside.instances] == [each.score for each in outside.instances]
    negative = predictor.predict(picture(), "star", boxes=[(200.0, 50.0, 320.0, 180.0)], labels=[False])
    assert [each.score for each in negative.instances] != [each.score for each in inside.instances]


def test_threshold_of_a_prompt(predictor: SAM3Predictor) -> None:
    """A prompt's threshold replaces the predictor's; 0.0 keeps every query."""
    keeping = loaded(score_threshold=0.5)
    prompts = [ConceptPrompt("triangles", score_threshold=each) for each in (None, 0.0, 1.0)]
    usual, every, none = keeping.predict_batch(picture(), prompts)
    scores = [instance.score for instance in every.instances]
    assert len(scores) == predictor._network.config.detr_decoder_config.num_queries
    assert [instance.score for instance in usual.instances] == [score for score in scores if score > 0.5]
    assert usual.instances
    assert not none.instances
    middle = (scores[2] + scores[3]) / 2
    assert len(keeping.predict(picture(), "triangles", score_threshold=middle).instances) == 3
    assert len(keeping.predict(picture(), "triangles", score_threshold=0.0).instances) == len(scores)


def test_held_features_serve_boxes(predictor: SAM3Predictor) -> None:
    """A picture known by its key alone is searched with boxes as its pixels are; here one of a batch."""
    keeping = loaded(max_feature_bytes=2**30)
    squares = [replace(to_square(picture(flipped=key == "b"), SIDE_PX), key=key) for key in "ba"]
    keeping.segment([(square, [PROMPTS[0]]) for square in squares])
    [found] = keeping.segment([(DecodedImage(None, WIDTH, HEIGHT, key="a"), PROMPTS[1:3])])
    for result, expected in zip(found, predictor.predict_batch(picture(), PROMPTS[1:3]), strict=True):
        check_same(result, expected)


@pytest.fixture(scope="module")
def engine() -> Engine:
    engine = Engine(EngineConfig("demo", "cpu", cpu_threads=1, max_batch=4))
    engine.start()
    wait_for(engine.status, lambda status: status.state != "loading")
    return engine


def request(*prompts: ConceptPrompt, flipped: bool = False, with_masks: bool = False) -> SegmentRequest:
    every = [replace(prompt, score_threshold=0.0) for prompt in prompts]
    square = to_square(picture(flipped=flipped), SIDE_PX)
    return SegmentRequest(square, every, time.monotonic() + 600, with_masks=with_masks)


def test_masks_go_to_those_who_ask(engine: Engine) -> None:
    """Of one batch, a request with masks gets each, another one their union, and both the same masks."""
    kinds = (True, False, True, False)
    outcomes = engine.segment(
        [request(*PROMPTS[:2], flipped=row > 1, with_masks=kind) for row, kind in enumerate(kinds)]
    )
    for row, (kind, outcome) in enumerate(zip(kinds, outcomes, strict=True)):
        assert outcome.results is not None, outcome.error
        for result in outcome.results:
            assert isinstance(result, PredictResult if kind else UnionResult)
            assert result.instances
        other = outcomes[row ^ 1].results
        assert other is not None
        for mine, theirs in zip(outcome.results, other, strict=True):
            assert np.array_equal(packed_union([mine]), packed_union([theirs]))
            assert [each.area_px for each in mine.instances] == [each.area_px for each in theirs.instances]


def test_box_outside_fails_its_request_alone(engine: Engine) -> None:
    """A box without a px of its image is that request's error; the others of the batch are answered."""
    outside = ConceptPrompt(None, ((320.0, 0.0, 340.0, 20.0),), (True,))
    good, bad, other = engine.segment([request(prompt) for prompt in (PROMPTS[1], outside, PROMPTS[0])])
    assert isinstance(bad.error, BoxOutsideImage)
    assert good.results
    assert other.results


def test_masks_of_too_many_bytes_fail_their_request_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is that of one prompt's masks; those who ask for the union are not limited."""
    keeping = loaded(max_mask_bytes=2_000)
    monkeypatch.setattr(engine, "_predictor", keeping)
    few = replace(request(with_masks=True), prompts=[ConceptPrompt("triangles", score_threshold=0.5)])
    bad, good, united = engine.segment([request(PROMPTS[3], with_masks=True), few, request(PROMPTS[3])])
    assert isinstance(bad.error, MasksTooLarge)
    assert "MiB" in str(bad.error)
    assert good.results
    assert united.results
