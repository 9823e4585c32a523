"""Prompts with boxes and thresholds, from the value to the engine's outcome."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from sam3_runner import SAM3Predictor
from sam3_runner.errors import BoxOutsideImage
from sam3_runner.images.decoded import DecodedImage
from sam3_runner.images.square import to_square
from sam3_runner.instances import PredictResult, UnionResult, packed_union
from sam3_runner.prompts import MAX_BOXES, ConceptPrompt
from sam3_runner.serving.engine import Engine, EngineConfig, SegmentRequest
from tests.edge import wait_for

if TYPE_CHECKING:
    from sam3_runner.weights.checkpoint import Checkpoint

WIDTH, HEIGHT = 90, 60
KEPT_SCORE = 0.01
"""So low that the untrained model keeps many queries."""
BOX = (10.0, 5.0, 40.0, 30.0)
OTHER = (50.0, 20.0, 80.0, 59.5)
PROMPTS = [
    ConceptPrompt("cat"),
    ConceptPrompt(None, (BOX,), (True,)),
    ConceptPrompt("cat", (BOX, OTHER), (True, False)),
    ConceptPrompt("dog"),
    ConceptPrompt("cat", (OTHER,), (True,)),
]


def picture(seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse.repeat(10, axis=0).repeat(10, axis=1))


def loaded(checkpoint: Checkpoint, **options: Any) -> SAM3Predictor:
    folder = str(checkpoint.weights_file.parent)
    predictor = SAM3Predictor(folder, "cpu", **({"score_threshold": KEPT_SCORE} | options))
    predictor.load()
    return predictor


@pytest.fixture(scope="module")
def predictor(tiny_checkpoint: Checkpoint) -> SAM3Predictor:
    return loaded(tiny_checkpoint)


def check_same(one: PredictResult, other: PredictResult) -> None:
    assert (one.prompt, len(one.instances)) == (other.prompt, len(other.instances))
    assert one.presence == pytest.approx(other.presence, abs=1e-5)
    for mine, theirs in zip(one.instances, other.instances, strict=True):
        assert mine.score == pytest.approx(theirs.score, abs=1e-5)
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
    prompt = ConceptPrompt(None, ((-5.0, -1.0, 30.0, 99.0), (89.5, 10.0, 400.0, 20.0)), (True, True))
    assert prompt.boxes_inside(WIDTH, HEIGHT) == ((0.0, 0.0, 30.0, 60.0), (89.5, 10.0, 90.0, 20.0))
    for outside in ((90.0, 0.0, 95.0, 9.0), (-9.0, 0.0, 0.0, 9.0), (0.0, 60.0, 9.0, 70.0)):
        with pytest.raises(BoxOutsideImage, match=r"boxes\[1\] .* no px of an image of 90 x 60"):
            replace(prompt, boxes=(BOX, outside)).boxes_inside(WIDTH, HEIGHT)


def test_prompts_together_equal_prompts_alone(predictor: SAM3Predictor) -> None:
    """Prompts with boxes and without, in one call and in their order, each as if alone; each box counts."""
    together = predictor.predict_batch(picture(0), PROMPTS)
    assert [result.prompt for result in together] == ["cat", "visual", "cat", "dog", "cat"]
    for prompt, result in zip(PROMPTS, together, strict=True):
        assert result.instances
        check_same(result, predictor.predict_batch(picture(0), [prompt])[0])
    assert len({round(result.presence, 6) for result in together}) == len(PROMPTS)


def test_boxes_outside_do_not_count(predictor: SAM3Predictor) -> None:
    """The part of a box outside the image changes nothing; labels default to positive."""
    inside = predictor.predict(picture(0), boxes=[(0.0, 5.0, 40.0, 60.0)])
    outside = predictor.predict(picture(0), boxes=[(-7.5, 5.0, 40.0, 88.0)], labels=[True])
    assert inside.presence == outside.presence
    negative = predictor.predict(picture(0), boxes=[(0.0, 5.0, 40.0, 60.0)], labels=[False])
    assert negative.presence != inside.presence


def test_threshold_of_a_prompt(predictor: SAM3Predictor) -> None:
    """A prompt's threshold replaces the predictor's; 0.0 keeps every query."""
    thresholds = (None, 0.0, 1.0)
    results = predictor.predict_batch(
        picture(0), [ConceptPrompt("cat", score_threshold=each) for each in thresholds]
    )
    scores = [instance.score for instance in results[1].instances]
    assert len(scores) == 12  # queries of the checkpoint
    assert [instance.score for instance in results[0].instances] == [
        score for score in scores if score > KEPT_SCORE
    ]
    assert not results[2].instances
    [strict] = [predictor.predict(picture(0), "cat", score_threshold=scores[3]).instances]
    assert len(strict) == 3


def test_held_features_serve_boxes(tiny_checkpoint: Checkpoint, predictor: SAM3Predictor) -> None:
    """A picture known by its key alone is searched with boxes as its pixels are."""
    keeping = loaded(tiny_checkpoint, max_feature_bytes=2**30)
    square = replace(to_square(picture(0), 112), key="a")
    keeping.segment([(square, [PROMPTS[0]])])
    [found] = keeping.segment([(DecodedImage(None, WIDTH, HEIGHT, key="a"), PROMPTS[1:3])])
    for result, expected in zip(found, predictor.predict_batch(picture(0), PROMPTS[1:3]), strict=True):
        check_same(result, expected)


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Checkpoint) -> Engine:
    engine = Engine(EngineConfig(str(tiny_checkpoint.weights_file.parent), "cpu", cpu_threads=1, max_batch=4))
    engine.start()
    wait_for(engine.status, lambda status: status.state != "loading")
    return engine


def request(*prompts: ConceptPrompt, seed: int, with_masks: bool) -> SegmentRequest:
    low = [replace(prompt, score_threshold=KEPT_SCORE) for prompt in prompts]
    return SegmentRequest(to_square(picture(seed), 112), low, time.monotonic() + 60, with_masks=with_masks)


def test_masks_go_to_those_who_ask(engine: Engine) -> None:
    """Of one batch, a request with masks gets each, another one their union, and both the same masks."""
    kinds = (True, False, True, False)
    outcomes = engine.segment(
        [request(*PROMPTS[:2], seed=row // 2, with_masks=kind) for row, kind in enumerate(kinds)]
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
    outside = ConceptPrompt(None, ((100.0, 0.0, 120.0, 20.0),), (True,))
    good, bad, other = engine.segment(
        [request(prompt, seed=0, with_masks=False) for prompt in (PROMPTS[1], outside, PROMPTS[0])]
    )
    assert isinstance(bad.error, BoxOutsideImage)
    assert good.results
    assert other.results
