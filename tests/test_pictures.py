"""Realistic image files, through HTTP and through SAM3Predictor: each shows the same as `plain.png`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from sam3_runner import SAM3Predictor
from tests.drawn import iou
from tests.edge import error_of
from tests.image_files import PICTURES, encoded, exif_of, png_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

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


def of_16_bits(image: Image.Image) -> bytes:
    """A PNG of RGB with 16 bits a channel."""
    rows = (np.asarray(image).astype(np.uint16) * 257).astype(">u2")
    return png_of(*image.size, b"".join(b"\0" + row.tobytes() for row in rows), depth=16)


def turned(image: Image.Image, how: Image.Transpose, orientation: int) -> bytes:
    """A JPEG whose EXIF data turn it back."""
    return encoded(image.transpose(how), "JPEG", quality=95, exif=exif_of(orientation))


FORMS: dict[str, Callable[[Image.Image], bytes]] = {
    "JPEG, EXIF 5": lambda image: turned(image, Image.Transpose.TRANSPOSE, 5),
    "JPEG, EXIF 8": lambda image: turned(image, Image.Transpose.ROTATE_270, 8),
    "JPEG, CMYK": lambda image: encoded(image.convert("CMYK"), "JPEG", quality=95),
    "PNG, palette": lambda image: encoded(image.quantize(256), "PNG"),
    "PNG, 16 bits": of_16_bits,
    "WEBP": lambda image: encoded(image, "WEBP", quality=95),
}
"""Further files of the picture."""
MAX_DIFFERENCE = 6.0
"""Mean of levels between the overlays of two files: JPEG, CMYK and a palette change some."""


@cache
def file_of(name: str) -> bytes:
    """The file of `PICTURES` or `FORMS` with this name."""
    if name not in FORMS:
        return (PICTURES / name).read_bytes()
    with Image.open(PICTURES / "plain.png") as image:
        return FORMS[name](image.convert("RGB"))


@dataclass(frozen=True)
class Answer:
    """The masks of `PROMPTS`, and the overlay (rows, columns, 3)."""

    masks: Masks
    overlay: npt.NDArray[np.uint8]


@pytest.fixture(scope="module")
def predictor() -> SAM3Predictor:
    loaded = SAM3Predictor("demo", "cpu")
    loaded.load()
    return loaded


def by_http(edge: Edge, name: str) -> Answer:
    answer = edge.answer(file_of(name), PROMPTS, outputs=["overlay"])
    with Image.open(edge.path(answer["outputs"]["overlay"])) as overlay:
        levels = np.asarray(overlay)
    return Answer([edge.mask(result["mask_url"]) for result in answer["results"]], levels)


@pytest.fixture(scope="module")
def plain_by_http(edge: Edge) -> Answer:
    return by_http(edge, "plain.png")


def by_predictor(predictor: SAM3Predictor, source: ImageSource) -> Masks:
    return [result.mask_array() for result in predictor.predict_batch(source, PROMPTS)]


def check(name: str, masks: Masks, plain: Masks) -> None:
    for mask, expected, found in zip(masks, plain, FOUND.get(name, [True, True]), strict=True):
        assert mask.shape == expected.shape == (480, 640)
        if found:
            assert iou(mask, expected) > 0.97
        elif found is not None:
            assert not mask.any()


@pytest.mark.parametrize("name", [*NAMES, *FORMS])
def test_files_that_look_the_same_have_the_same_answer(edge: Edge, plain_by_http: Answer, name: str) -> None:
    """Masks, and the overlay's size, orientation and colours, are those of the plain file."""
    found = by_http(edge, name)
    check(name, found.masks, plain_by_http.masks)
    assert found.overlay.shape == (480, 640, 3)
    if name not in FOUND:
        assert np.abs(found.overlay.astype(float) - plain_by_http.overlay).mean() < MAX_DIFFERENCE


def test_overlay_of_held_features(edge: Edge) -> None:
    """A picture whose features are held is decoded for its overlay alone."""
    before = by_http(edge, "JPEG, EXIF 8")
    again = by_http(edge, "JPEG, EXIF 8")
    assert np.array_equal(before.overlay, again.overlay)


@pytest.mark.parametrize("name", ["JPEG, CMYK", "plain.png", "WEBP"])
def test_damage_is_refused_where_an_overlay_is_asked_for(edge: Edge, name: str) -> None:
    """Pixels that end early are the same 415, though a preview might show a part of them."""
    whole = file_of(name)
    response = edge.ask(whole[: len(whole) * 2 // 3], PROMPTS, outputs=["overlay"])
    assert error_of(response)[:2] == (415, "UNSUPPORTED_IMAGE")


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
