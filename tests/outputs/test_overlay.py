"""The preview with outlines, tints, boxes and labels, read back with Pillow."""

from __future__ import annotations

import io
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from outputs.label_places import HIDDEN_DIVISOR, LabelPlaces
from outputs.overlay import MAX_PROMPT_CHARS, TINT, overlay_jpeg, written_prompt
from outputs.palette import PALETTE
from sam3_runner.instances import Instance, Mask, MaskCrop, PredictResult
from tests.outputs.masks import crop_of, result_of

WIDTH, HEIGHT = 640, 400
GREY = (128, 128, 128)
JPEG_LEVELS = 24
"""How far JPEG moves a px in a plain area: less than this."""

Box = tuple[int, int, int, int]


def disc(x: float, y: float, radius: float, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Mask:
    rows, columns = np.ogrid[: size[1], : size[0]]
    return np.hypot(columns - x, rows - y) < radius


def found(mask: Mask, score: float = 0.9, box: tuple[float, float, float, float] | None = None) -> Instance:
    """An instance whose box is that of its mask."""
    crop = crop_of(mask)
    tight = float(crop.left), float(crop.top), float(crop.left + crop.width), float(crop.top + crop.height)
    return Instance(score, box or tight, int(mask.sum()), 0, crop)


def result(
    *instances: Instance, prompt: str = "cat", size: tuple[int, int] = (WIDTH, HEIGHT)
) -> PredictResult:
    return PredictResult(prompt, 0.9, *size, list(instances))


def drawn(*results: PredictResult, image: Image.Image | None = None) -> np.ndarray:
    """The px of the overlay on a grey picture, or on `image`."""
    picture = image or Image.new("RGB", (WIDTH, HEIGHT), GREY)
    with Image.open(io.BytesIO(overlay_jpeg(picture, results))) as overlay:
        assert (overlay.format, overlay.mode, overlay.size) == ("JPEG", "RGB", picture.size)
        return np.asarray(overlay).astype(int)


def near(pixels: np.ndarray, colour: tuple[int, ...], levels: int = JPEG_LEVELS) -> np.ndarray:
    """Where px are a colour."""
    where: np.ndarray = np.abs(pixels - colour).max(axis=-1) < levels
    return where


def tinted(colour: tuple[int, ...], index: int) -> tuple[int, ...]:
    """A px of a picture below the tint of a palette's colour."""
    return tuple(
        (256 - TINT) * level // 256 + TINT * tint // 256
        for level, tint in zip(colour, PALETTE[index], strict=True)
    )


def test_object_is_still_seen() -> None:
    """Inside a mask the picture shows through: two colours keep three quarters of their difference."""
    red, green = (200, 30, 30), (30, 160, 60)
    left, right = disc(160, 200, 80), disc(480, 200, 80)
    pixels = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)
    pixels[left], pixels[right] = red, green
    overlay = drawn(result(found(left)), result(found(right)), image=Image.fromarray(pixels))
    on_red, on_green = overlay[200, 160], overlay[200, 480]
    assert near(on_red, tinted(red, 0))
    assert near(on_green, tinted(green, 1))
    same = drawn(result(found(left), found(right)), result(), image=Image.fromarray(pixels))
    kept = np.abs(same[200, 160] - same[200, 480]) / np.abs(np.subtract(red, green))
    assert kept.min() > 0.7


@pytest.mark.parametrize("background", [(0, 0, 0), (255, 255, 255), PALETTE[0]])
def test_outline_is_seen_on_any_background(background: tuple[int, int, int]) -> None:
    """A coloured line and a dark one follow the mask outside; no px of the object is hidden."""
    mask = disc(320, 200, 100)
    overlay = drawn(result(found(mask)), image=Image.new("RGB", (WIDTH, HEIGHT), background))
    ring = disc(320, 200, 101) & ~mask
    assert near(overlay[ring], PALETTE[0], 60).mean() > 0.9
    assert near(overlay[disc(320, 200, 97)], tinted(background, 0), 40).mean() > 0.99
    if background == PALETTE[0]:
        beside = disc(320, 200, 103) & ~disc(320, 200, 101)
        assert (overlay[beside].sum(axis=1) < 0.7 * sum(background)).mean() > 0.5


def test_box_is_drawn() -> None:
    """The border of an instance's box has the instance's colour, also where the mask is far away."""
    overlay = drawn(result(found(disc(320, 200, 20), box=(100.4, 100.6, 539.5, 300.0))))
    for row, column in ((200, 100), (200, 539), (100, 320), (299, 320)):
        assert near(overlay[row, column], PALETTE[0], 80), (row, column)


def test_rest_of_picture_is_unchanged() -> None:
    """Without instances the picture is only compressed; with one, nothing changes away from it."""
    assert near(drawn(result(), result()), GREY, 3).all()
    overlay = drawn(result(found(disc(320, 200, 50))))
    assert near(overlay[:, 500:], GREY, 3).all()
    assert near(overlay[300:], GREY, 3).all()


def test_tints_do_not_add_up() -> None:
    """Ten prompts that find one object tint it once, in the colour of the best score."""
    mask = disc(320, 200, 100)
    results = [result(found(mask, 0.5 + 0.01 * (number == 3)), prompt=f"p{number}") for number in range(10)]
    assert near(drawn(*results)[200, 320], tinted(GREY, 3))


def test_colours() -> None:
    """Instances of one prompt have colours of their own; with several prompts, each prompt has one."""
    masks = [disc(x, 200, 50) for x in (100, 320, 540)]
    single = drawn(result(*map(found, masks)))
    assert all(near(single[200, x], tinted(GREY, index)) for index, x in enumerate((100, 320, 540)))
    both = drawn(result(found(masks[0]), found(masks[1])), result(found(masks[2])))
    assert all(near(both[200, x], tinted(GREY, index)) for index, x in ((0, 100), (0, 320), (1, 540)))


@pytest.mark.parametrize("size", [(320, 200), (213, 133), (160, 100)])
def test_smaller_preview(size: tuple[int, int]) -> None:
    """On a smaller preview the mask is where the object is, to a px, and as large."""
    mask = disc(200, 150, 90)
    preview = Image.new("RGB", size, GREY)
    overlay = drawn(result(found(mask, box=(400.0, 300.0, 639.0, 399.0))), image=preview)
    scale = size[0] / WIDTH
    expected = disc(200 * scale - 0.5, 150 * scale - 0.5, 90 * scale, size)
    inner = disc(200 * scale - 0.5, 150 * scale - 0.5, 90 * scale - 3, size)
    outer = disc(200 * scale - 0.5, 150 * scale - 0.5, 90 * scale + 6, size)
    assert near(overlay[inner], tinted(GREY, 0)).mean() > 0.98
    assert near(overlay[: size[1] // 2][~outer[: size[1] // 2]], GREY).mean() > 0.9
    seen = np.abs(overlay - tinted(GREY, 0)).max(axis=-1) < JPEG_LEVELS
    assert abs(int((seen & outer).sum()) - int(expected.sum())) < 0.15 * expected.sum() + 12


def test_instance_between_centres_is_seen() -> None:
    """A mask of one px of a large original keeps a px on a small preview."""
    crop = MaskCrop(4001, 3001, 1, 1, b"\x40")
    tiny = Instance(0.9, (0.0, 0.0, 8191.0, 8191.0), 1, 0, crop)
    overlay = drawn(result(tiny, size=(8192, 8192)), image=Image.new("RGB", (200, 200), GREY))
    assert not near(overlay[70:77, 94:101], GREY).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 2), (5, 9)])
@pytest.mark.parametrize("original", [(1, 1), (8192, 8192), (3, 5000)])
def test_any_size(size: tuple[int, int], original: tuple[int, int]) -> None:
    """Pictures of any size, with masks that fill them, are drawn."""
    full = np.ones(original[::-1], np.bool_)
    overlay = drawn(result(found(full), size=original), image=Image.new("RGB", size, GREY))
    assert overlay.shape == (*size[::-1], 3)


@pytest.mark.parametrize(
    ("prompt", "written"),
    [
        ("red circle", "red circle"),
        ("piñata  café\n", "pinata cafe"),
        ("赤い丸", "prompt 2"),
        ("красный круг", "prompt 2"),
        ("red \u202e circle", "prompt 2"),
        ("red \x1b[31m", "prompt 2"),
        ("", "prompt 2"),
        ("a large white delivery van with a ladder", "a large white deliver..."),
    ],
)
def test_written_prompt(prompt: str, written: str) -> None:
    """Prompts are written in ASCII, on one line and not too long, or by their number."""
    assert written_prompt(prompt, 2) == written
    assert len(written) <= MAX_PROMPT_CHARS


def test_prompts_that_the_font_lacks_are_drawn_by_number() -> None:
    """A label of such a prompt is that of the prompt "prompt 1"."""
    mask = disc(320, 200, 50)
    assert np.array_equal(
        drawn(result(found(mask), prompt="赤い丸")), drawn(result(found(mask), prompt="prompt 1"))
    )


boxes_in_picture = st.lists(
    st.tuples(st.integers(0, 299), st.integers(0, 199), st.integers(1, 150), st.integers(1, 100)).map(
        lambda box: (box[0], box[1], min(300, box[0] + box[2]), min(200, box[1] + box[3]))
    ),
    min_size=1,
    max_size=30,
)


@given(boxes=boxes_in_picture, width=st.integers(1, 120), height=st.integers(1, 25))
@settings(max_examples=200, deadline=None)
def test_labels_hide_nothing(boxes: list[Box], width: int, height: int) -> None:
    """Labels lie in the picture, beside or in their boxes, apart, and leave two thirds of each box free."""
    objects = np.zeros((200, 300), np.bool_)
    for x0, y0, x1, y1 in boxes:
        objects[y0:y1, x0:x1] = True
    places = LabelPlaces(300, 200, boxes, objects)
    taken = [
        (*corner, corner[0] + width, corner[1] + height)
        for corner in (places.place(box, width, height) for box in boxes)
        if corner is not None
    ]
    assert all(min(x0, y0) >= 0 and x1 <= 300 and y1 <= 200 for x0, y0, x1, y1 in taken)
    assert not any(shared_px(*pair) for pair in combinations(taken, 2))
    for label in taken:
        for box in boxes:
            assert HIDDEN_DIVISOR * shared_px(label, box) <= (box[2] - box[0]) * (box[3] - box[1])


def shared_px(one: Box, other: Box) -> int:
    """The area that two rectangles share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0, width) * max(0, height)


def test_label_prefers_free_ground() -> None:
    """A label stands above its box; where another object is there, below it."""
    box, above = (100, 80, 160, 120), (80, 40, 200, 78)
    objects = np.zeros((200, 300), np.bool_)
    objects[80:120, 100:160] = True
    assert LabelPlaces(300, 200, [box], objects).place(box, 60, 14) == (100, 64)
    objects[40:78, 80:200] = True
    assert LabelPlaces(300, 200, [box, above], objects).place(box, 60, 14) == (100, 122)


def test_crowded_labels_leave_objects_visible() -> None:
    """Labels of 256 objects side by side leave most of the objects' px visible."""
    masks = [disc(20 + 40 * (n % 16), 12 + 24 * (n // 16), 9) for n in range(256)]
    overlay = drawn(result_of(*masks, scores=[0.9] * 256))
    assert overlay.shape == (HEIGHT, WIDTH, 3)
    inside = np.logical_or.reduce(masks)
    assert (overlay[inside].min(axis=1) > 60).mean() > 0.5, "labels do not hide the objects"


# Machado, Oliveira and Fernandes, 2009, severity 1, on linear RGB.
VISIONS = {
    "normal": np.eye(3),
    "without red cones": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "without green cones": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "without blue cones": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
# Ottosson, 2020: https://bottosson.github.io/posts/oklab/
LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def linear(colours: tuple[tuple[int, int, int], ...]) -> np.ndarray:
    """Levels of sRGB as linear light, 0..1."""
    levels = np.array(colours) / 255
    return np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("vision", VISIONS)
def test_palette_is_distinguishable(vision: str) -> None:
    """Any two colours differ by 0.11 in OKLab, also without one kind of cones."""
    lab = np.cbrt((linear(PALETTE) @ VISIONS[vision].T).clip(0, 1) @ LMS.T) @ LAB.T
    distances = [np.linalg.norm(one - other) for one, other in combinations(lab, 2)]
    assert min(distances) >= 0.11


def test_text_on_palette_is_readable() -> None:
    """Black text has a contrast of 4.5 : 1 or more on each colour (WCAG 2.2, 1.4.3)."""
    luminance = linear(PALETTE) @ np.array([0.2126, 0.7152, 0.0722])
    assert ((luminance + 0.05) / 0.05).min() >= 4.5
