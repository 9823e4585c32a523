"""Prompts for a scene: "red circle", "circle", "red shape", and words without a meaning in the scenes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer

from sam3_runner.prompts import PromptTokenizer
from sam3_runner.weights.checkpoint import CLIP_TOKENIZER_FILE
from training.scenes import COLOURS, MAX_OBJECTS, SHAPES

if TYPE_CHECKING:
    from torch import Tensor

    from training.scenes import Pictures, Scenes

PROMPTS_PER_SCENE = 4
PRESENT_PER_SCENE = 3
"""The first three prompts of a scene name something in it, the last one something absent."""

BOXES_ALONE_TEXT = "visual"
"""What the model reads when boxes come without a text, as in the official code."""

KINDS = ("colour shape", "shape", "any shape of a colour")
_FIRST_SHAPE = len(COLOURS) * len(SHAPES)
_FIRST_COLOUR = _FIRST_SHAPE + len(SHAPES)
CONCEPT_COUNT = _FIRST_COLOUR + len(COLOURS)

PROMPT_UNIFORMS = PRESENT_PER_SCENE * (MAX_OBJECTS + 1) + CONCEPT_COUNT
PROMPT_SEEDS = 1_000_000_000
"""Added to a scene's seed for its prompts: with one seed the prompts would correlate with the scene."""
_KIND_SHARE = (0.4, 0.3, 0.3)
_NEAR_MISS_WEIGHT = 5.0
_TOKENS = 8
"""Tokens of a training prompt, padded. The 32 of serving give the same result, since padding is masked."""


@dataclass(frozen=True, slots=True)
class ScenePrompts:
    """Four prompts for each of B scenes.

    Attributes:
        concept: (B, 4) int64.
        matching: (B, 4, 7) bool, visible objects that match the prompt.
        valid: (B, 4) bool, False for a scene in which no object counts.
    """

    concept: Tensor
    matching: Tensor
    valid: Tensor


def kind_of(concept: int) -> str:
    """Which of `KINDS` a concept is."""
    return KINDS[(concept >= _FIRST_SHAPE) + (concept >= _FIRST_COLOUR)]


def name_of(concept: int, *, plural: bool) -> str:
    """The plain name of a concept: "red circle", "crosses", "blue shapes"."""
    if concept < _FIRST_SHAPE:
        colour, shape = divmod(concept, len(SHAPES))
        words = [list(COLOURS)[colour], SHAPES[shape]]
    elif concept < _FIRST_COLOUR:
        words = [SHAPES[concept - _FIRST_SHAPE]]
    else:
        words = [list(COLOURS)[concept - _FIRST_COLOUR], "shape"]
    if plural:
        words[-1] += "es" if words[-1].endswith("s") else "s"
    return " ".join(words)


def phrases(concept: int) -> list[str]:
    """Prompts for a concept, the plain ones twice; training draws them with equal probability."""
    one, many = name_of(concept, plural=False), name_of(concept, plural=True)
    article = "an" if one[0] == "o" else "a"
    return [one, one, many, many, f"{article} {one}", f"the {one}", f"the {many}", f"all {many}"]


def sample_prompts(scenes: Scenes, pictures: Pictures, uniforms: Tensor) -> ScenePrompts:
    """Choose prompts by (B, `PROMPT_UNIFORMS`) uniform numbers."""
    matches = _concept_table(uniforms.device)[:, scenes.colour, scenes.shape].transpose(0, 1)
    matches &= pictures.visible[:, None]
    picks, absent = uniforms[:, :-CONCEPT_COUNT], uniforms[:, -CONCEPT_COUNT:]
    picks = picks.reshape(-1, PRESENT_PER_SCENE, MAX_OBJECTS + 1)
    target = (picks[..., :-1] + pictures.counted[:, None]).argmax(dim=-1)
    colour, shape = scenes.colour.gather(1, target), scenes.shape.gather(1, target)
    concept = choose_concept(colour, shape, picks[..., -1], _KIND_SHARE[0], _KIND_SHARE[0] + _KIND_SHARE[1])
    absent_concept = _choose_absent(matches, absent)
    concept = torch.cat([concept, absent_concept[:, None]], dim=1)
    matching = matches.gather(1, concept[..., None].expand(-1, -1, MAX_OBJECTS))
    valid = pictures.counted.any(dim=1, keepdim=True).expand(-1, PROMPTS_PER_SCENE)
    return ScenePrompts(concept=concept, matching=matching, valid=valid)


def choose_concept(
    colour: Tensor, shape: Tensor, uniforms: Tensor, both: Tensor | float, bare_shape: Tensor | float
) -> Tensor:
    """Concepts of objects: below `both` colour and shape, below `bare_shape` the shape, else the colour."""
    concept = torch.where(uniforms < bare_shape, _FIRST_SHAPE + shape, _FIRST_COLOUR + colour)
    return torch.where(uniforms < both, colour * len(SHAPES) + shape, concept)


def objects_of(concept: Tensor, scenes: Scenes) -> Tensor:
    """(B, N, 7) bool: whether the objects of B scenes match the concepts (B, N)."""
    table = _concept_table(concept.device)
    return table[concept[..., None], scenes.colour[:, None], scenes.shape[:, None]]


class PromptTokens:
    """Token ids of every phrase of every concept, and of words without a meaning in the scenes."""

    def __init__(self, device: str) -> None:
        tokenizer = PromptTokenizer(CLIP_TOKENIZER_FILE)
        encoded = tokenizer.encode(
            [phrase for concept in range(CONCEPT_COUNT) for phrase in phrases(concept)]
        )
        ids = torch.from_numpy(encoded.ids)[:, :_TOKENS]
        self._ids = ids.reshape(CONCEPT_COUNT, -1, _TOKENS).to(device)
        self._lengths = torch.from_numpy(encoded.valid).sum(dim=1).reshape(CONCEPT_COUNT, -1).to(device)
        self._end_id = int(ids[0, -1])
        self._visual_ids = torch.from_numpy(tokenizer.encode([BOXES_ALONE_TEXT]).ids)[:, :_TOKENS].to(device)
        self._tokenizer = Tokenizer.from_file(str(CLIP_TOKENIZER_FILE))

    def encode(self, concept: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """(P, 8) ids and validity of concepts (P,), phrased by uniform numbers (P, 1)."""
        phrase = (uniforms[:, 0] * self._ids.shape[1]).long()
        return self._with_validity(self._ids[concept, phrase], self._lengths[concept, phrase])

    def encode_unknown(self, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """(P, 8) ids and validity of up to two random tokens, half of them after a colour; needs (P, 6)."""
        word = (uniforms[:, 2:5] * self._end_id).long().clamp(max=self._end_id - 2)
        colour = _FIRST_COLOUR + (uniforms[:, 5] * len(COLOURS)).long()
        coloured = uniforms[:, 0] < 0.5
        ids = torch.full((len(uniforms), _TOKENS), self._end_id, device=uniforms.device)
        ids[:, 0] = self._ids[0, 0, 0]
        ids[:, 1:4] = word
        ids[:, 1] = torch.where(coloured, self._ids[colour, 0, 1], ids[:, 1])
        words = torch.where(coloured, 2, 1) + (uniforms[:, 1] * 2.0).long()
        ids = torch.where(torch.arange(_TOKENS, device=ids.device) > words[:, None], self._end_id, ids)
        return self._with_validity(ids, words + 2)

    def replace_visual(self, ids: Tensor, valid: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
        """`ids` and `valid` (P, 8), with the text of boxes alone where `visual` (P,) is true."""
        replaced = self._with_validity(self._visual_ids, torch.full_like(self._visual_ids[:, 0], 3))
        visual = visual[:, None]
        return torch.where(visual, replaced[0], ids), torch.where(visual, replaced[1], valid)

    def decode(self, ids: Tensor) -> list[str]:
        """The texts of (P, 8) ids."""
        return [text.replace("</w>", " ").strip() for text in self._tokenizer.decode_batch(ids.tolist())]

    def _with_validity(self, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        return ids, torch.arange(_TOKENS, device=ids.device) < lengths[:, None]


@cache
def _concept_table(device: torch.device) -> Tensor:
    """(concepts, colours, shapes) bool: whether an object of this colour and shape matches the concept."""
    table = torch.zeros(CONCEPT_COUNT, len(COLOURS), len(SHAPES), dtype=torch.bool)
    for concept in range(CONCEPT_COUNT):
        if concept < _FIRST_SHAPE:
            table[(concept, *divmod(concept, len(SHAPES)))] = True
        elif concept < _FIRST_COLOUR:
            table[concept, :, concept - _FIRST_SHAPE] = True
        else:
            table[concept, concept - _FIRST_COLOUR] = True
    return table.to(device)


def _choose_absent(matches: Tensor, uniforms: Tensor) -> Tensor:
    """(B,) concepts that no visible object matches; most share a colour or a shape with a visible one."""
    present = matches.any(dim=2)
    near = present[:, _FIRST_COLOUR:, None] | present[:, None, _FIRST_SHAPE:_FIRST_COLOUR]
    weight = _concept_shares(uniforms.device).repeat(len(matches), 1)
    weight[:, :_FIRST_SHAPE] *= torch.where(near.flatten(1), _NEAR_MISS_WEIGHT, 1.0)
    # The largest log(u) / w is a sample with probabilities in proportion to w.
    keys = uniforms.clamp(min=1e-9).log() / weight
    return keys.masked_fill(present, -torch.inf).argmax(dim=1)


@cache
def _concept_shares(device: torch.device) -> Tensor:
    """(concepts,) probability of each concept, before the scene is considered."""
    counts = (_FIRST_SHAPE, len(SHAPES), len(COLOURS))
    shares = [torch.full((n,), share / n) for n, share in zip(counts, _KIND_SHARE, strict=True)]
    return torch.cat(shares).to(device)
