"""What a caller sees of exemplar boxes, with the demo checkpoint and drawn pictures."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sam3_runner.predictor import SAM3Predictor
from sam3_runner.weights.checkpoint import DEMO

RED, BLUE, GREEN, GREY = (220, 40, 40), (50, 80, 220), (40, 170, 70), (120, 115, 110)
RED_CIRCLES = ((30, 30, 100, 100), (220, 40, 300, 120), (60, 220, 130, 290))
BLUE_CIRCLES = ((130, 110, 200, 180), (240, 230, 310, 300))
GREEN_SQUARE = (150, 220, 210, 280)

Box = tuple[float, float, float, float]


@pytest.fixture(scope="module")
def predictor() -> SAM3Predictor:
    loaded = SAM3Predictor(DEMO, "cpu")
    loaded.load()
    return loaded


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """Three red circles, two blue ones, and a green square, on grey."""
    picture = Image.new("RGB", (336, 336), GREY)
    drawing = ImageDraw.Draw(picture)
    for boxes, colour in ((RED_CIRCLES, RED), (BLUE_CIRCLES, BLUE)):
        for box in boxes:
            drawing.ellipse(box, fill=colour)
    drawing.rectangle(GREEN_SQUARE, fill=GREEN)
    return picture


def found(
    predictor: SAM3Predictor,
    picture: Image.Image,
    text: str | None = None,
    *,
    positive: tuple[Box, ...] = (),
    negative: tuple[Box, ...] = (),
) -> list[Box]:
    """The drawn objects that were found, each by an instance of IoU above 0.7 with its own box."""
    labels = [True] * len(positive) + [False] * len(negative)
    result = predictor.predict(picture, text, boxes=[*positive, *negative], labels=labels)
    drawn = [*RED_CIRCLES, *BLUE_CIRCLES, GREEN_SQUARE]
    objects = []
    for instance in result.instances:
        overlaps = [box_iou(instance.box, each) for each in drawn]
        assert max(overlaps) > 0.7, f"{instance.box} is none of the drawn objects"
        objects.append(drawn[int(np.argmax(overlaps))])
    assert len(set(objects)) == len(objects), "an object was found twice"
    return sorted(objects)


def box_iou(one: Box, other: Box) -> float:
    """Intersection over union of two boxes x0 y0 x1 y1."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    both = max(width, 0.0) * max(height, 0.0)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return both / (areas - both)


@pytest.mark.parametrize("exemplar", RED_CIRCLES)
def test_a_box_round_one_red_circle_finds_the_others(
    predictor: SAM3Predictor, picture: Image.Image, exemplar: Box
) -> None:
    assert found(predictor, picture, positive=(exemplar,)) == sorted(RED_CIRCLES)


@pytest.mark.parametrize("exemplar", RED_CIRCLES)
def test_a_negative_box_takes_its_like_away(
    predictor: SAM3Predictor, picture: Image.Image, exemplar: Box
) -> None:
    assert found(predictor, picture, "circle") == sorted(RED_CIRCLES + BLUE_CIRCLES)
    assert found(predictor, picture, "circle", negative=(exemplar,)) == sorted(BLUE_CIRCLES)


def test_a_positive_box_adds_its_like_to_what_the_text_names(
    predictor: SAM3Predictor, picture: Image.Image
) -> None:
    assert found(predictor, picture, "green square") == [GREEN_SQUARE]
    both = found(predictor, picture, "green square", positive=(BLUE_CIRCLES[0],))
    assert both == sorted([*BLUE_CIRCLES, GREEN_SQUARE])


def test_a_box_of_what_the_text_names_changes_nothing(predictor: SAM3Predictor, picture: Image.Image) -> None:
    circles = sorted(RED_CIRCLES + BLUE_CIRCLES)
    assert found(predictor, picture, "circle", positive=(RED_CIRCLES[1],)) == circles


def test_boxes_of_both_labels_together(predictor: SAM3Predictor, picture: Image.Image) -> None:
    taken = found(
        predictor, picture, "circle", positive=(GREEN_SQUARE,), negative=(RED_CIRCLES[0], RED_CIRCLES[2])
    )
    assert taken == sorted([*BLUE_CIRCLES, GREEN_SQUARE])


def test_the_word_visual_without_a_box_finds_nothing(predictor: SAM3Predictor, picture: Image.Image) -> None:
    assert found(predictor, picture, "visual") == []
