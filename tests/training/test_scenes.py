"""Drawn scenes and their prompts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from training.concepts import (
    CONCEPT_COUNT,
    PRESENT_PER_SCENE,
    PROMPT_UNIFORMS,
    PromptTokens,
    name_of,
    phrases,
    sample_prompts,
)
from training.scenes import COLOUR_SPREAD, COLOURS, MAX_OBJECTS, Pictures, Scenes, draw_scenes


@pytest.fixture(scope="module")
def drawn() -> tuple[Scenes, Pictures]:
    return draw_scenes(12, 42, width=200, height=160)


def test_a_scene_is_reproducible_from_its_seed(drawn: tuple[Scenes, Pictures]) -> None:
    _, again = draw_scenes(12, 42, width=200, height=160)
    _, other = draw_scenes(12, 43, width=200, height=160)

    assert torch.equal(drawn[1].pixels, again.pixels)
    assert not torch.equal(drawn[1].pixels, other.pixels)


def test_pixels_show_the_object_that_owns_them(drawn: tuple[Scenes, Pictures]) -> None:
    scenes, pictures = drawn
    levels = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    for scene, item in pictures.visible.nonzero().tolist():
        mask = (pictures.owner[scene] == item + 1).float()
        # Without the edge, where it is mixed with what is behind it.
        inner = F.avg_pool2d(mask[None, None], 3, 1, 1)[0, 0] > 0.99
        pixels = pictures.pixels[scene][:, inner]
        named_levels = levels[scenes.colour[scene, item]][:, None]
        assert torch.allclose(pixels, scenes.rgb[scene, item][:, None], atol=0.01)
        assert bool(((pixels - named_levels).abs() <= COLOUR_SPREAD + 0.01).all())


def test_boxes_enclose_the_visible_part(drawn: tuple[Scenes, Pictures]) -> None:
    pictures = drawn[1]
    for scene, item in pictures.visible.nonzero().tolist():
        rows, columns = (pictures.owner[scene] == item + 1).nonzero(as_tuple=True)
        box = torch.stack(
            [columns.min() / 200, rows.min() / 160, (columns.max() + 1) / 200, (rows.max() + 1) / 160]
        )
        assert torch.allclose(pictures.boxes[scene, item], box)


def test_counted_objects_do_not_depend_on_the_resolution() -> None:
    _, small = draw_scenes(6, 7, width=168, height=168)
    _, large = draw_scenes(6, 7, width=336, height=336)

    assert float((small.counted == large.counted).float().mean()) > 0.95


def test_three_prompts_name_a_counted_object_and_one_an_absent_one(
    drawn: tuple[Scenes, Pictures],
) -> None:
    scenes, pictures = drawn
    sampled = sample_prompts(
        scenes, pictures, torch.rand(12, PROMPT_UNIFORMS, generator=torch.Generator().manual_seed(1))
    )
    present = (sampled.matching & pictures.counted[:, None]).any(dim=2)

    assert bool(present[:, :PRESENT_PER_SCENE][sampled.valid[:, :PRESENT_PER_SCENE]].all())
    assert not bool(sampled.matching[:, PRESENT_PER_SCENE:].any())
    assert sampled.matching.shape == (12, 4, MAX_OBJECTS)


def test_every_concept_has_its_own_words() -> None:
    names = [name_of(concept, plural=False) for concept in range(CONCEPT_COUNT)]

    assert len(set(names)) == CONCEPT_COUNT == 62
    assert {"red circle", "cross", "black shape"} <= set(names)
    assert "the crosses" in phrases(names.index("cross"))
    assert "an orange star" in phrases(names.index("orange star"))


def test_tokens_decode_to_the_words() -> None:
    tokens = PromptTokens("cpu")
    ids, valid = tokens.encode(torch.tensor([0, 61]), torch.zeros(2, 1))

    assert tokens.decode(ids) == ["red circle", "black shape"]
    assert valid.sum(dim=1).tolist() == [4, 4]


def test_boxes_alone_read_the_word_visual() -> None:
    tokens = PromptTokens("cpu")
    texts = tokens.encode(torch.tensor([0, 61]), torch.zeros(2, 1))
    ids, valid = tokens.replace_visual(*texts, torch.tensor([True, False]))

    assert tokens.decode(ids) == ["visual", "black shape"]
    assert valid.sum(dim=1).tolist() == [3, 4]


def test_unknown_words_are_no_concept() -> None:
    tokens = PromptTokens("cpu")
    uniforms = torch.rand(64, 7, generator=torch.Generator().manual_seed(3))
    ids, valid = tokens.encode_unknown(uniforms)
    known = {name_of(concept, plural=False) for concept in range(CONCEPT_COUNT)}

    assert not known & set(tokens.decode(ids))
    assert set(valid.sum(dim=1).tolist()) == {3, 4, 5}
