"""Exemplar tasks: what the boxes mean."""

from __future__ import annotations

import pytest
import torch

from training.concepts import objects_of
from training.exemplars import (
    EXEMPLAR_KINDS,
    EXEMPLAR_UNIFORMS,
    MAX_BOXES,
    MAX_POSITIVE,
    Exemplars,
    sample_exemplars,
)
from training.scenes import MAX_OBJECTS, Pictures, Scenes, draw_scenes

SCENES = 60


@pytest.fixture(scope="module")
def drawn() -> tuple[Scenes, Pictures, Exemplars]:
    scenes, pictures = draw_scenes(SCENES, 42, width=112, height=112, alike_share=1.0)
    kind = torch.arange(len(EXEMPLAR_KINDS)).expand(SCENES, -1)
    generator = torch.Generator().manual_seed(1)
    uniforms = torch.rand(*kind.shape, EXEMPLAR_UNIFORMS, generator=generator)
    return scenes, pictures, sample_exemplars(scenes, pictures, kind, uniforms)


def boxed_objects(pictures: Pictures, exemplars: Exemplars, scene: int, kind: int) -> dict[int, int]:
    """Each boxed object, the one whose own box overlaps most, and the label of its box."""
    boxed = {}
    for row in exemplars.boxes_valid[scene, kind].nonzero().flatten().tolist():
        center, size = exemplars.boxes[scene, kind, row].chunk(2)
        low, high = center - size / 2, center + size / 2
        own = pictures.boxes[scene]
        overlap = (torch.minimum(own[:, 2:], high) - torch.maximum(own[:, :2], low)).clamp(min=0).prod(dim=1)
        union = size.prod() + (own[:, 2:] - own[:, :2]).prod(dim=1) - overlap
        iou = overlap / union
        assert float(iou.max()) > 0.5
        boxed[int(iou.argmax())] = int(exemplars.labels[scene, kind, row])
    return boxed


def test_positive_boxes_add_their_like_and_negative_boxes_take_theirs_away(
    drawn: tuple[Scenes, Pictures, Exemplars],
) -> None:
    scenes, pictures, exemplars = drawn
    named = objects_of(exemplars.concept, scenes)
    for scene in range(SCENES):
        looks = list(zip(scenes.colour[scene].tolist(), scenes.shape[scene].tolist(), strict=True))
        for kind in range(len(EXEMPLAR_KINDS)):
            boxed = boxed_objects(pictures, exemplars, scene, kind)
            likes = {label: {looks[item] for item, own in boxed.items() if own == label} for label in (0, 1)}
            wanted = [
                bool(pictures.visible[scene, item])
                and looks[item] not in likes[0]
                and (
                    looks[item] in likes[1]
                    or bool(exemplars.has_text[scene, kind] & named[scene, kind, item])
                )
                for item in range(MAX_OBJECTS)
            ]
            assert wanted == exemplars.matching[scene, kind].tolist(), (scene, EXEMPLAR_KINDS[kind])


def test_each_kind_has_its_boxes_and_its_text(drawn: tuple[Scenes, Pictures, Exemplars]) -> None:
    _, _, exemplars = drawn
    has_positive = exemplars.boxes_valid[..., :MAX_POSITIVE].any(dim=-1)[exemplars.valid[:, 0]]
    has_negative = exemplars.boxes_valid[..., MAX_POSITIVE:].any(dim=-1)[exemplars.valid[:, 0]]
    kinds = [EXEMPLAR_KINDS.index(name) for name in ("box alone", "text and box", "text and negative box")]

    assert exemplars.boxes.shape == (SCENES, 4, MAX_BOXES, 4)
    assert exemplars.has_text.any(dim=0).tolist() == [False, True, True, True]
    assert has_positive.all(dim=0)[kinds].tolist() == [True, True, False]
    assert has_negative.all(dim=0)[kinds].tolist() == [False, False, True]


def test_scenes_with_palettes_have_alike_objects() -> None:
    scenes, _ = draw_scenes(32, 7, width=64, height=64, alike_share=1.0)
    for scene in range(32):
        exists = scenes.exists[scene]
        assert len(set(scenes.colour[scene][exists].tolist())) <= 2
        assert len(set(scenes.shape[scene][exists].tolist())) <= 2
    plain, _ = draw_scenes(32, 7, width=64, height=64)
    assert not torch.equal(scenes.colour, plain.colour)
