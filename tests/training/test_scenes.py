from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from training.concepts import (
    CONCEPT_COUNT,
    PRESENT_PER_SCENE,
    PROMPT_UNIFORMS,
    PromptTokens,
    ask,
    name_of,
    phrases,
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
        mine = (pictures.owner[scene] == item + 1).float()
        # Away from its edge, where it mixes with what lies behind.
        inner = F.avg_pool2d(mine[None, None], 3, 1, 1)[0, 0] > 0.99
        shown = pictures.pixels[scene][:, inner]
        named = levels[scenes.colour[scene, item]][:, None]
        assert torch.allclose(shown, scenes.rgb[scene, item][:, None], atol=0.01)
        assert bool(((shown - named).abs() <= COLOUR_SPREAD + 0.01).all())


def test_boxes_hold_the_visible_part(drawn: tuple[Scenes, Pictures]) -> None:
    pictures = drawn[1]
    for scene, item in pictures.visible.nonzero().tolist():
        rows, columns = (pictures.owner[scene] == item + 1).nonzero(as_tuple=True)
        box = torch.stack(
            [columns.min() / 200, rows.min() / 160, (columns.max() + 1) / 200, (rows.max() + 1) / 160]
        )
        assert torch.allclose(pictures.boxes[scene, item], box)


def test_what_counts_does_not_depend_on_the_resolution() -> None:
    _, small = draw_scenes(6, 7, width=168, height=168)
    _, large = draw_scenes(6, 7, width=336, height=336)

    assert float((small.counted == large.counted).float().mean()) > 0.95


def test_three_prompts_name_something_that_counts_and_one_names_nothing(
    drawn: tuple[Scenes, Pictures],
) -> None:
    scenes, pictures = drawn
    asked = ask(scenes, pictures, torch.rand(12, PROMPT_UNIFORMS, generator=torch.Generator().manual_seed(1)))
    found = (asked.wanted & pictures.counted[:, None]).any(dim=2)

    assert bool(found[:, :PRESENT_PER_SCENE][asked.valid[:, :PRESENT_PER_SCENE]].all())
    assert not bool(asked.wanted[:, PRESENT_PER_SCENE:].any())
    assert asked.wanted.shape == (12, 4, MAX_OBJECTS)


def test_every_concept_has_its_words() -> None:
    names = [name_of(concept, plural=False) for concept in range(CONCEPT_COUNT)]

    assert len(set(names)) == CONCEPT_COUNT == 62
    assert {"red circle", "cross", "black shape"} <= set(names)
    assert "the crosses" in phrases(names.index("cross"))
    assert "an orange star" in phrases(names.index("orange star"))


def test_tokens_read_back_as_the_words() -> None:
    tokens = PromptTokens("cpu")
    ids, valid = tokens.encode(torch.tensor([0, 61]), torch.zeros(2, 1))

    assert tokens.read(ids) == ["red circle", "black shape"]
    assert valid.sum(dim=1).tolist() == [4, 4]


def test_unknown_words_are_not_known_ones() -> None:
    tokens = PromptTokens("cpu")
    uniforms = torch.rand(64, 7, generator=torch.Generator().manual_seed(3))
    ids, valid = tokens.encode_unknown(uniforms)
    known = {name_of(concept, plural=False) for concept in range(CONCEPT_COUNT)}

    assert not known & set(tokens.read(ids))
    assert set(valid.sum(dim=1).tolist()) == {3, 4, 5}
