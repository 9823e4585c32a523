"""Conversions to the formats of annotation tools, read by the tools themselves where they are installed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from PIL import Image

from outputs.converters.cvat import cvat_mask_points
from outputs.converters.geojson import geojson
from outputs.converters.label_studio import label_studio_brush_rle, label_studio_prediction
from outputs.converters.yolo_seg import class_names, yolo_seg
from tests.outputs.masks import crop_of, drawn_masks, mask_of, result_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from sam3_runner.instances import Mask

RING = np.pad(mask_of("####. #..#. ####. ..... #...."), ((2, 1), (3, 4)))
NOTHING = np.zeros_like(RING)


def even_odd(points: Sequence[tuple[float, float]], shape: tuple[int, int]) -> Mask:
    """The px of which a ray from the centre to the right crosses the closed path an odd number of times."""
    y, x = np.indices(shape) + 0.5
    inside = np.zeros(shape, np.bool_)
    for (x0, y0), (x1, y1) in zip(points, [*points[1:], points[0]], strict=True):
        if y0 != y1:
            spans = (y0 > y) != (y1 > y)
            inside ^= spans & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    return inside


def pairs(numbers: Sequence[float]) -> list[tuple[float, float]]:
    return list(zip(numbers[::2], numbers[1::2], strict=True))


@given(mask=drawn_masks())
@settings(max_examples=200, deadline=None)
def test_yolo_seg_keeps_every_px(mask: Mask) -> None:
    """A line's path, filled, is the mask with its parts and holes; an empty mask has no line."""
    height, width = mask.shape
    lines = yolo_seg([result_of(mask)]).splitlines()
    assert len(lines) == mask.any()
    for line in lines:
        number, *fractions = line.split(" ")
        assert number == "0"
        points = [(round(x * width, 3), round(y * height, 3)) for x, y in pairs([*map(float, fractions)])]
        assert np.array_equal(even_odd(points, mask.shape), mask)


def test_yolo_seg_is_exact_in_large_images() -> None:
    """On the longest side that is read, 65,535 px, a corner stays where it is."""
    mask = np.zeros((1, 65_535), np.bool_)
    mask[:, 65_001:65_022] = True
    [line] = yolo_seg([result_of(mask)]).splitlines()
    xs = [float(text) * 65_535 for text in line.split(" ")[1::2]]
    assert sorted(xs) == pytest.approx([65_001, 65_001, 65_022, 65_022], abs=0.05)


def test_yolo_seg_classes() -> None:
    """Classes are numbered by distinct prompts."""
    results = [result_of(RING, prompt="cat"), result_of(RING, prompt="dog"), result_of(RING, prompt="cat")]
    assert class_names(results) == ["cat", "dog"]
    assert [line[0] for line in yolo_seg(results).splitlines()] == ["0", "1", "0"]


def test_supervision_loads_yolo_seg(tmp_path: Path) -> None:
    """It finds the objects, their classes, and the hole (its own fill adds the px on the outline)."""
    supervision = pytest.importorskip("supervision")
    y, x = np.ogrid[:200, :300]
    ring = (np.hypot(x - 150, y - 100) < 80) & (np.hypot(x - 150, y - 100) > 40)
    Image.new("RGB", (300, 200)).save(tmp_path / "photo.png")
    (tmp_path / "photo.txt").write_text(
        yolo_seg([result_of(~ring, prompt="cat"), result_of(ring, prompt="dog")])
    )
    (tmp_path / "data.yaml").write_text("names: [cat, dog]\n")
    dataset = supervision.DetectionDataset.from_yolo(
        str(tmp_path), str(tmp_path), str(tmp_path / "data.yaml"), force_masks=True
    )
    (detections,) = dataset.annotations.values()
    assert detections.class_id.tolist() == [0, 1]
    for found, mask in zip(detections.mask, [~ring, ring], strict=True):
        assert (found & mask).sum() / (found | mask).sum() > 0.95
    assert not detections.mask[1][100, 150]


@given(mask=drawn_masks())
@settings(max_examples=200, deadline=None)
def test_cvat_mask(mask: Mask) -> None:
    """The runs, row by row in the rectangle, add up to the mask."""
    *runs, left, top, right, bottom = cvat_mask_points(crop_of(mask))
    decoded = np.zeros_like(mask)
    values = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    decoded[top : bottom + 1, left : right + 1] = values.reshape(bottom + 1 - top, right + 1 - left)
    assert np.array_equal(decoded, mask)


def test_cvat_mask_of_no_px() -> None:
    """One px that is not set, as of CVAT's SDK; of one px that is set, a run of none before it."""
    assert cvat_mask_points(crop_of(NOTHING)) == [1, 0, 0, 0, 0]
    assert cvat_mask_points(crop_of(mask_of("... ..# ..."))) == [0, 1, 2, 1, 2, 1]


@given(mask=drawn_masks())
@settings(max_examples=200, deadline=None)
def test_cvat_mask_equals_its_sdk(mask: Mask) -> None:
    """cvat-sdk's encoder gives the same numbers and its decoder the mask."""
    masks = pytest.importorskip("cvat_sdk.masks")
    points = cvat_mask_points(crop_of(mask))
    assert points == masks.encode_mask(mask)
    height, width = mask.shape
    assert np.array_equal(masks.decode_mask(points, image_width=width, image_height=height), mask)


@given(mask=drawn_masks())
@settings(max_examples=100, deadline=None)
def test_label_studio_polygons(mask: Mask) -> None:
    """The filled polygons, in per cent of the image's size, are the mask."""
    height, width = mask.shape
    prediction = label_studio_prediction(
        [result_of(mask)], "polygon", from_name="label", to_name="image", model_version="sam3"
    )
    filled = np.zeros_like(mask)
    for region in prediction["result"]:
        assert region["value"]["polygonlabels"] == ["cat"]
        points = [
            (round(x * width / 100, 6), round(y * height / 100, 6)) for x, y in region["value"]["points"]
        ]
        filled |= even_odd(points, mask.shape)
    assert np.array_equal(filled, mask)


def test_label_studio_regions() -> None:
    """A region has the names of its tags, the image's size, its instance's label and score."""
    results = [
        result_of(RING, NOTHING, prompt="cat", scores=[0.75, 0.5]),
        result_of(RING[::-1], prompt="dog"),
    ]
    height, width = RING.shape
    for form in ("polygon", "brush"):
        prediction = label_studio_prediction(
            results, form, from_name="label", to_name="image", model_version="sam3"
        )
        assert (prediction["model_version"], prediction["score"]) == ("sam3", 0.9)
        regions = prediction["result"]
        shared = {"from_name": "label", "to_name": "image", "type": f"{form}labels", "image_rotation": 0}
        shared |= {"original_width": width, "original_height": height}
        assert all(region | shared == region for region in regions)
        labels = [region["value"][f"{form}labels"] for region in regions]
        scores = [region["score"] for region in regions]
        if form == "brush":
            assert (labels, scores) == ([["cat"], ["dog"]], [0.75, 0.9])
            assert all(region["value"]["format"] == "rle" for region in regions)
        else:
            assert (labels, scores) == ([["cat"]] * 2 + [["dog"]] * 2, [0.75] * 2 + [0.9] * 2)
            assert all(region["value"]["closed"] for region in regions)
    nothing = label_studio_prediction(
        [result_of(NOTHING)], "brush", from_name="a", to_name="b", model_version=""
    )
    assert nothing["result"] == []


def brush_values(rle: list[int]) -> list[int]:
    """The values of a brush's bit stream, read as its description says; checks that no byte is left."""
    bits, place = "".join(f"{byte:08b}" for byte in rle), 0

    def number(size: int) -> int:
        nonlocal place
        place += size
        return int(bits[place - size : place], 2)

    total, value_bits = number(32), number(5) + 1
    sizes, values = [number(4) + 1 for _ in range(4)], list[int]()
    while len(values) < total:
        assert number(1) == 1
        length = number(sizes[number(2)]) + 1
        values += [number(value_bits)] * length
    assert len(values) == total
    assert len(bits) - place < 8
    return values


@given(mask=drawn_masks())
@settings(max_examples=100, deadline=None)
def test_label_studio_brush(mask: Mask) -> None:
    """The stream has each px four times, 0 or 255, row by row over the whole image."""
    height, width = mask.shape
    values = brush_values(label_studio_brush_rle(crop_of(mask), width, height))
    assert values == np.where(mask, 255, 0).repeat(4).tolist()


@pytest.mark.parametrize("set_px", [0, 16_384, 16_385, 40_000])
def test_label_studio_brush_of_long_runs(set_px: int) -> None:
    """Runs of more than 2^16 values are several; one of just as many is one."""
    mask = (np.arange(80_000) < set_px).reshape(200, 400)
    values = brush_values(label_studio_brush_rle(crop_of(mask), 400, 200))
    assert values == np.where(mask, 255, 0).repeat(4).tolist()


def test_label_studio_brush_bytes() -> None:
    """The bits of a mask of three px: header, 8 zeros by a length of 3 bits, 4 times 255."""
    bits = "".join(f"{byte:08b}" for byte in label_studio_brush_rle(crop_of(mask_of("..#")), 3, 1))
    header = f"{12:032b}" + "00111" + "0010" + "0011" + "0111" + "1111"
    assert bits == (header + "1" + "00" + "111" + "00000000" + "1" + "00" + "011" + "11111111").ljust(88, "0")


@given(mask=drawn_masks())
@settings(max_examples=50, deadline=None)
def test_label_studio_decodes_brushes(mask: Mask) -> None:
    """label_studio_sdk gets the mask in each of the four channels."""
    brush = pytest.importorskip("label_studio_sdk.converter.brush")
    height, width = mask.shape
    decoded = brush.decode_rle(label_studio_brush_rle(crop_of(mask), width, height))
    assert np.array_equal(decoded.reshape(height, width, 4), np.where(mask, 255, 0)[..., None].repeat(4, -1))


def test_label_studio_accepts_a_prediction() -> None:
    """Its SDK reads the regions of a brush prediction of a large mask, with runs over 2^16 values."""
    brush = pytest.importorskip("label_studio_sdk.converter.brush")
    mask = np.zeros((300, 400), np.bool_)
    mask[100:280] = True
    prediction = label_studio_prediction(
        [result_of(mask, NOTHING)], "brush", from_name="label", to_name="image", model_version="sam3"
    )
    json.dumps(prediction)
    (region,) = prediction["result"]
    (layer,) = brush.decode_from_annotation(
        "label",
        [region["value"] | {key: region[key] for key in ("type", "original_width", "original_height")}],
    ).values()
    assert np.array_equal(layer > 0, mask)


@given(mask=drawn_masks())
@settings(max_examples=100, deadline=None)
def test_geojson(mask: Mask) -> None:
    """Shapely reads valid polygons of exactly the mask; rings are closed and turn as the RFC asks."""
    (feature,) = json.loads(json.dumps(geojson([result_of(mask)])))["features"]
    if not mask.any():
        assert feature["geometry"] is None
        return
    geometry = shapely.geometry.shape(feature["geometry"])
    assert geometry.is_valid
    y, x = np.indices(mask.shape)
    assert np.array_equal(shapely.contains_xy(geometry, x + 0.5, y + 0.5), mask)
    for part in feature["geometry"]["coordinates"]:
        for index, ring in enumerate(part):
            assert ring[0] == ring[-1]
            assert shapely.is_ccw(shapely.LinearRing(ring)) == (index == 0)


def test_geojson_features() -> None:
    """Ids are the numbers of instances over all prompts; the facts of each are its properties."""
    document = geojson([result_of(RING, NOTHING, scores=[0.75, 0.5]), result_of(RING, prompt="dog")])
    assert document["type"] == "FeatureCollection"
    facts = [(each["type"], each["id"], *each["properties"].values()) for each in document["features"]]
    box, area_px = [0.25, 0.5, 3.75, 4.5], int(RING.sum())
    assert facts == [
        ("Feature", 1, "cat", 0.75, box, area_px),
        ("Feature", 2, "cat", 0.5, box, 0),
        ("Feature", 3, "dog", 0.9, box, area_px),
    ]


def test_tolerance_leaves_points_out() -> None:
    """Each converter of polygons simplifies by the given tolerance."""
    y, x = np.ogrid[:100, :100]
    results = [result_of(np.hypot(x - 50, y - 50) < 40)]

    def points(tolerance_px: float) -> list[int]:
        [region] = label_studio_prediction(
            *(results, "polygon"), from_name="a", to_name="b", model_version="1", tolerance_px=tolerance_px
        )["result"]
        [feature] = geojson(results, tolerance_px)["features"]
        [[ring]] = feature["geometry"]["coordinates"]
        return [len(region["value"]["points"]), len(ring), len(yolo_seg(results, tolerance_px).split())]

    assert all(simple < exact / 4 for simple, exact in zip(points(2.0), points(0.0), strict=True))


def test_geojson_is_accepted_by_its_library() -> None:
    """The library geojson finds no fault."""
    library = pytest.importorskip("geojson")
    document = geojson([result_of(RING, RING), result_of(RING, prompt="dog")])
    collection = library.loads(json.dumps(document))
    assert collection.is_valid, collection.errors()
