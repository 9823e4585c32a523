"""On a GPU: prompts with boxes find in float16 what they find in float32, as prompts of text alone do.

python -m pytest -c /dev/null --rootdir . --noconftest tests/gpu
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import pytest
import torch

from sam3_runner import SAM3Predictor
from sam3_runner.prompts import ConceptPrompt
from tests.concepts import concepts
from tests.gpu.test_steps import MIN_IOU, SAMPLE, SCORE_ERROR

if TYPE_CHECKING:
    from sam3_runner.instances import Instance, Mask, PredictResult
    from sam3_runner.prompts import Box

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU that torch can use")

DEVICE = "cuda"
MAX_BOX_ERROR = 0.002
"""Of the image's longer side."""
TEXTS = ["purple circle", "triangles", "red shape"]


def instances_of(predictor: SAM3Predictor, text: str) -> list[Instance]:
    return predictor.predict(SAMPLE, text).instances


def prompts_for(predictor: SAM3Predictor) -> list[ConceptPrompt]:
    """Texts alone, and 1, 2, 3 and 8 boxes round objects of the sample, in one pass of each kind."""
    triangles: list[Box] = [each.box for each in instances_of(predictor, "triangles")]
    [circle, *_] = [each.box for each in instances_of(predictor, "purple circle")]
    assert len(triangles) >= 2
    return [
        *concepts(*TEXTS),
        ConceptPrompt(None, (circle,), (True,)),
        ConceptPrompt(None, (triangles[0], circle), (True, False)),
        ConceptPrompt("shape", (circle, *triangles[:2]), (False, True, True)),
        ConceptPrompt("triangles", (*triangles[:2],) * 4, (True,) * 8),
    ]


def loaded(dtype: Literal["float16", "float32"]) -> SAM3Predictor:
    predictor = SAM3Predictor("demo", DEVICE, dtype=dtype)
    predictor.load()
    return predictor


def mask_of(instance: Instance, result: PredictResult) -> Mask:
    whole = np.zeros((result.image_height, result.image_width), np.bool_)
    whole[instance.mask.window] = instance.mask.array()
    return whole


def test_float16_finds_what_float32_finds() -> None:
    """The same queries are kept, with the scores, boxes and masks that rounding allows for texts."""
    torch.set_float32_matmul_precision("highest")
    exact = loaded("float32")
    prompts = prompts_for(exact)
    expected, found = (each.predict_batch(SAMPLE, prompts) for each in (exact, loaded("float16")))
    for prompt, reference, result in zip(prompts, expected, found, strict=True):
        assert reference.instances, prompt
        ours, theirs = ({each.query: each for each in kept.instances} for kept in (result, reference))
        assert ours.keys() == theirs.keys(), prompt
        assert abs(result.presence - reference.presence) < SCORE_ERROR[torch.float16], prompt
        ious = []
        for query, instance in ours.items():
            other = theirs[query]
            assert abs(instance.score - other.score) < SCORE_ERROR[torch.float16], prompt
            moved = np.abs(np.subtract(instance.box, other.box)).max()
            assert moved < MAX_BOX_ERROR * max(result.image_width, result.image_height), prompt
            mine, its = mask_of(instance, result), mask_of(other, reference)
            ious.append((mine & its).sum() / (mine | its).sum())
        assert np.mean(ious) > MIN_IOU[torch.float16], prompt
