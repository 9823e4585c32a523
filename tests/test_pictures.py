"""Realistic image files, through HTTP and through SAM3Predictor: each shows the same as `plain.png`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from PIL import Image

from sam3_runner import SAM3Predictor
from tests.drawn import iou
from tests.image_files import PICTURES

if TYPE_CHECKING:
    from sam3_runner.instances import Mask
    from sam3_runner.predictor import ImageSource
    from tests.edge import Edge

    Masks = list[Mask]

pytestmark = pytest.mark.server

PROMPTS = ["black circle", "red square"]
FOUND: dict[str, list[bool | None]] = {
    "png-grey-and-alpha.png": [True, None],
    "png-circle-erased-by-alpha.png": [False, True],
}
"""Which prompts are found; None: not checked. In the other files all are found."""
UNKNOWN_TO_PILLOW = {
    "png-colour-profile-of-1500-kB-unpacked.png",
    "png-text-of-1500-kB-unpacked.png",
    "png-wrong-crc-in-phys.png",
}
NAMES = [path.name for path in sorted(PICTURES.iterdir())]


@pytest.fixture(scope="module")
def predictor() -> SAM3Predictor:
    loaded = SAM3Predictor("demo", "cpu")
    loaded.load()
    return loaded


def by_http(edge: Edge, name: str) -> Masks:
    answer = edge.answer((PICTURES / name).read_bytes(), PROMPTS)
    return [edge.mask(result["mask_url"]) for result in answer["results"]]


def by_predictor(predictor: SAM3Predictor, source: ImageSource) -> Masks:
    return [result.mask_array() for result in predictor.predict_batch(source, PROMPTS)]


def check(name: str, masks: Masks, plain: Masks) -> None:
    for mask, expected, found in zip(masks, plain, FOUND.get(name, [True, True]), strict=True):
        assert mask.shape == expected.shape == (480, 640)
        if found:
            assert iou(mask, expected) > 0.97
        elif found is not None:
            assert not mask.any()


@pytest.mark.parametrize("name", NAMES)
def test_masks_by_http_equal_those_of_the_plain_file(edge: Edge, name: str) -> None:
    """Files that look the same in a viewer have the same masks."""
    check(name, by_http(edge, name), by_http(edge, "plain.png"))


@pytest.mark.parametrize("name", NAMES)
def test_masks_by_predictor_equal_those_of_the_plain_file(predictor: SAM3Predictor, name: str) -> None:
    """The same holds for a path, for bytes, and for an opened image if Pillow can open it."""
    plain = by_predictor(predictor, PICTURES / "plain.png")
    check(name, by_predictor(predictor, str(PICTURES / name)), plain)
    check(name, by_predictor(predictor, (PICTURES / name).read_bytes()), plain)
    if name not in UNKNOWN_TO_PILLOW:
        with Image.open(PICTURES / name) as image:
            check(name, by_predictor(predictor, image), plain)


@pytest.mark.parametrize("name", sorted(UNKNOWN_TO_PILLOW))
def test_pillow_refuses_these_files(name: str) -> None:
    """Pillow refuses these files because of their metadata."""
    with pytest.raises((ValueError, OSError)), Image.open(PICTURES / name):
        pass
