"""Draws a scene, and what each control of a request changes in its answer; examples/outputs.py writes it."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING, Final, NamedTuple

from PIL import Image, ImageDraw

from outputs.overlay import overlay_jpeg
from outputs.polygons import polygons
from outputs.refinement import Refinement, refine
from sam3_runner.prompts import ConceptPrompt

if TYPE_CHECKING:
    from sam3_runner import SAM3Predictor
    from sam3_runner.instances import Instance, PredictResult

WIDTH_PX, HEIGHT_PX, OVERSAMPLING = 640, 360, 4
GAP_PX: Final = 8
BACKGROUND = (168, 176, 170)
RED, GREEN, BLUE, YELLOW = (220, 40, 40), (40, 170, 70), (50, 80, 220), (240, 210, 50)
CIRCLES = (
    *((120, 110, 62, RED), (330, 90, 34, RED), (560, 95, 26, RED), (470, 110, 15, RED)),
    *((240, 250, 48, BLUE), (420, 260, 40, BLUE), (118, 108, 12, GREEN)),
)
"""x, y, radius in px, colour. The green one is a hole in the mask of the largest red one."""
SQUARE, TRIANGLE = (520, 220, 600, 300), ((60, 320), (160, 320), (110, 225))
BAR = (262, 190, 267, 310)
"""Of the background's colour: it divides a blue circle."""

TOLERANCES_PX: Final = (0, 2)
ZOOM, MARGIN_PX, POINT_PX = 6, 3, 3

NONE = Refinement()
TEXT, EITHER = ConceptPrompt("red circle"), ConceptPrompt("circles")
LOW = ConceptPrompt("red circle", score_threshold=0.1)
BOX = (296.0, 56.0, 364.0, 124.0)


class Pair(NamedTuple):
    """Two requests about the scene, without and with a control."""

    before: tuple[list[ConceptPrompt], Refinement]
    after: tuple[list[ConceptPrompt], Refinement]


PAIRS: Final[dict[str, Pair]] = {
    "boxes": Pair(([EITHER], NONE), ([ConceptPrompt(None, (BOX,), (True,))], NONE)),
    "labels": Pair(([EITHER], NONE), ([ConceptPrompt("circles", (BOX,), (False,))], NONE)),
    "score-threshold": Pair(([TEXT], NONE), ([LOW], NONE)),
    "nms-iou": Pair(([TEXT, EITHER], NONE), ([TEXT, EITHER], Refinement(nms_iou=0.7))),
    "max-instances": Pair(([TEXT], NONE), ([TEXT], Refinement(max_instances=2))),
    "min-area": Pair(([TEXT], NONE), ([TEXT], Refinement(min_area_px=1000))),
    "fill-holes": Pair(([TEXT], NONE), ([TEXT], Refinement(fill_holes_px=1000))),
    "remove-islands": Pair(([EITHER], NONE), ([EITHER], Refinement(remove_islands_px=1500))),
}


def drawn_scene() -> Image.Image:
    """Circles of two colours, a square, a triangle, and what hides parts of two circles."""
    scale = OVERSAMPLING
    image = Image.new("RGB", (WIDTH_PX * scale, HEIGHT_PX * scale), BACKGROUND)
    draw = ImageDraw.Draw(image)
    for x, y, radius, colour in CIRCLES:
        draw.circle((x * scale, y * scale), radius * scale, fill=colour)
    draw.rectangle([side * scale for side in SQUARE], fill=RED)
    draw.polygon([(x * scale, y * scale) for x, y in TRIANGLE], fill=YELLOW)
    draw.rectangle([side * scale for side in BAR], fill=BACKGROUND)
    return image.resize((WIDTH_PX, HEIGHT_PX), Image.Resampling.LANCZOS)


def pair_results(predictor: SAM3Predictor, scene: Image.Image, pair: Pair) -> list[list[PredictResult]]:
    """The results of both requests of a pair."""
    return [refine(predictor.predict_batch(scene, prompts), refinement) for prompts, refinement in pair]


def pair_picture(scene: Image.Image, before_and_after: list[list[PredictResult]]) -> Image.Image:
    """The overlays of both requests, one beside the other."""
    both = Image.new("RGB", (2 * WIDTH_PX + GAP_PX, HEIGHT_PX), (255, 255, 255))
    for place, results in enumerate(before_and_after):
        with Image.open(BytesIO(overlay_jpeg(scene, results))) as overlay:
            both.paste(overlay, (place * (WIDTH_PX + GAP_PX), 0))
    return both


def polygon_pictures(scene: Image.Image, instance: Instance) -> Image.Image:
    """An instance, enlarged, with the points of its polygons: exact, and with a tolerance beside it."""
    mask = instance.mask
    height, width = mask.array().shape
    left, top = mask.left - MARGIN_PX, mask.top - MARGIN_PX
    cut = scene.crop((left, top, mask.left + width + MARGIN_PX, mask.top + height + MARGIN_PX))
    large = cut.resize((cut.width * ZOOM, cut.height * ZOOM), Image.Resampling.NEAREST)
    both = Image.new("RGB", (2 * large.width + GAP_PX, large.height), (255, 255, 255))
    for place, tolerance_px in enumerate(TOLERANCES_PX):
        picture = large.copy()
        draw = ImageDraw.Draw(picture)
        for ring in (ring for part in polygons(mask, tolerance_px) for ring in part):
            points = [((x - left) * ZOOM, (y - top) * ZOOM) for x, y in ring]
            draw.polygon(points, outline=(0, 0, 0), width=2)
            for point in points:
                draw.circle(point, POINT_PX, fill=(255, 255, 255), outline=(0, 0, 0))
        both.paste(picture, (place * (large.width + GAP_PX), 0))
    return both
