"""One PNG of all instances, read back with Pillow."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from outputs.label_map import TooManyInstances, label_map_png
from outputs.png import BAND_PX
from sam3_runner.instances import Instance, MaskCrop, PredictResult
from tests.outputs.masks import drawn_masks, instance_of, mask_of, result_of


def read(png: bytes) -> tuple[str, np.ndarray]:
    """The mode and the px of a PNG."""
    with Image.open(io.BytesIO(png)) as image:
        return image.mode, np.asarray(image).astype(int)


def points(count: int, width: int, height: int) -> PredictResult:
    """`count` instances of one px each, in the order of the px, equal scores."""
    found = [
        Instance(0.9, (0.0, 0.0, 1.0, 1.0), 1, 0, MaskCrop(x, y, 1, 1, bytes([0x80 >> x % 8])))
        for y, x in (divmod(index, width) for index in range(count))
    ]
    return PredictResult("cat", 0.9, width, height, found)


def test_numbers_go_through_all_results() -> None:
    """Instances are numbered from 1 through the results in their order; the rest is 0."""
    first = result_of(mask_of("##.. .... ...."), mask_of("...# .... ...."))
    second = result_of(mask_of(".... .... ..##"), prompt="dog")
    mode, numbers = read(label_map_png([first, second]))
    assert mode == "L"
    assert numbers.tolist() == [[1, 1, 0, 2], [0, 0, 0, 0], [0, 0, 3, 3]]


def test_higher_score_is_on_top() -> None:
    """Where instances overlap the higher score wins, also across results; if equal, the lower number."""
    low, high = result_of(mask_of("###."), scores=[0.6]), result_of(mask_of(".###"), scores=[0.7])
    assert read(label_map_png([low, high]))[1].tolist() == [[1, 2, 2, 2]]
    assert read(label_map_png([high, low]))[1].tolist() == [[2, 1, 1, 1]]
    equal = result_of(mask_of("###."), mask_of(".###"), scores=[0.6, 0.6])
    assert read(label_map_png([equal]))[1].tolist() == [[1, 1, 1, 2]]


@pytest.mark.parametrize(("count", "mode"), [(255, "L"), (256, "I;16"), (2000, "I;16")])
def test_bit_depths(count: int, mode: str) -> None:
    """Up to 255 instances a px has 8 bits, beyond that 16."""
    found_mode, numbers = read(label_map_png([points(count, 61, 50)]))
    assert found_mode == mode
    assert np.array_equal(numbers.ravel(), np.where(np.arange(61 * 50) < count, np.arange(61 * 50) + 1, 0))


def test_most_instances() -> None:
    """65,535 instances fit; one more is refused with their number."""
    full = points(65_535, 256, 257)
    assert read(label_map_png([full]))[1].max() == 65_535
    with pytest.raises(TooManyInstances, match=r"65535 instances, and there are 65536") as refusal:
        label_map_png([points(65_536, 256, 257)])
    assert isinstance(refusal.value, ValueError)
    assert refusal.value.count == 65_536


def test_nothing_found() -> None:
    """Without instances the map has the image's size and is 0; an instance without px changes nothing."""
    nothing = PredictResult("cat", 0.1, 7, 5, [])
    assert read(label_map_png([nothing, nothing]))[1].tolist() == [[0] * 7] * 5
    assert not read(label_map_png([result_of(np.zeros((5, 7), np.bool_))]))[1].any()


@given(masks=st.lists(drawn_masks(), min_size=1, max_size=5), data=st.data(), wide=st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_masks(masks: list[np.ndarray], data: st.DataObject, wide: bool) -> None:  # noqa: FBT001
    """The px are those of the masks painted one by one, at both bit depths."""
    height, width = (max(mask.shape[axis] for mask in masks) for axis in (0, 1))
    whole = [np.pad(mask, ((0, height - len(mask)), (0, width - mask.shape[1]))) for mask in masks]
    scores = data.draw(st.lists(st.sampled_from([0.5, 0.6, 0.7]), min_size=len(masks), max_size=len(masks)))
    empty = [instance_of(np.zeros((height, width), np.bool_))] * (300 if wide else 0)
    results = [PredictResult("cat", 0.9, width, height, empty), result_of(*whole, scores=scores)]
    expected = np.zeros((height, width), int)
    for index in sorted(range(len(masks)), key=lambda index: (scores[index], -index)):
        expected[whole[index]] = len(empty) + index + 1
    assert np.array_equal(read(label_map_png(results))[1], expected)


@pytest.mark.parametrize("width", [1, 7, 1919, BAND_PX + 1])
def test_sizes(width: int) -> None:
    """Maps of odd sizes, narrow ones and ones that are filtered in several bands are restored."""
    height = max(3, 3 * BAND_PX // width) if width < BAND_PX else 3
    random = np.random.default_rng(0)
    masks = [random.random((height, width)) < 0.3 for _ in range(2)]
    expected = np.where(masks[0], 1, np.where(masks[1], 2, 0))
    assert np.array_equal(read(label_map_png([result_of(*masks)]))[1], expected)
