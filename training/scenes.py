"""Scenes of coloured shapes, drawn as signed distance functions on any device.

All randomness comes in as tensors of uniform numbers, so drawing is a pure function of its arguments: it can
be compiled, and a seed always gives the same scene.

There are two coordinate systems. The *frame* is the picture as a user would send it. Its short side is
`SHORT_SIDE_PX` long at any resolution, so that radii and areas mean the same at every size. The *raster* is
the grid of pixels that is drawn. A frame that is not square may be drawn directly on a square raster,
resized as the server resizes an upload.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 - torch's usual alias

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Painter = Callable[..., tuple[Tensor, Tensor]]

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 50),
    "purple": (140, 60, 180),
    "orange": (245, 140, 30),
    "white": (240, 240, 240),
    "black": (25, 25, 25),
}
COLOUR_SPREAD = 18
"""Each channel of an object is within this many levels of its colour's."""

SHORT_SIDE_PX = 336.0
MAX_OBJECTS = 7
RADIUS_PX = (14.0, 60.0)
MIN_VISIBLE_SHARE = 0.5
MIN_VISIBLE_PX = 150.0
"""An object counts when at least this share of it, and this area in the frame, is visible."""

_SCENE_UNIFORMS = 1 + 9 * MAX_OBJECTS + 12
_PALETTE_UNIFORMS = 5
_BLOB_SIDE = 12
_CIRCLE, _RING, _CROSS = SHAPES.index("circle"), SHAPES.index("ring"), SHAPES.index("cross")

# Per shape: corners, inner / outer radius, area / radius^2. The "inner radius" of a polygon is its apothem.
_CORNERS = (1.0, 4.0, 3.0, 5.0, 1.0, 1.0)
_STAR_INNER, _RING_INNER, _CROSS_HALF_WIDTH = 0.45, 0.55, 0.33
_INNER = (1.0, math.cos(math.pi / 4), math.cos(math.pi / 3), _STAR_INNER, 1.0, 1.0)
_AREA = (
    math.pi,
    2.0,
    0.75 * math.sqrt(3.0),
    5.0 * _STAR_INNER * math.sin(math.pi / 5),
    math.pi * (1.0 - _RING_INNER**2),
    8.0 * _CROSS_HALF_WIDTH - 4.0 * _CROSS_HALF_WIDTH**2,
)


@dataclass(frozen=True, slots=True)
class Scenes:
    """Content of B scenes, before they are drawn; lengths in frame px, objects from back to front.

    Attributes:
        frame: (B, 2), width and height.
        exists: (B, 7) bool.
        shape, colour: (B, 7) int64, indices into `SHAPES` and `COLOURS`.
        rgb: (B, 7, 3), levels 0..255.
        center: (B, 7, 2).
        radius, angle: (B, 7).
        background: (B, 2, 3), levels at the two ends of the gradient.
        direction: (B,), angle of the gradient.
        blob_level, noise_level: (B,), amplitude of the smooth and of the pixel noise.
    """

    frame: Tensor
    exists: Tensor
    shape: Tensor
    colour: Tensor
    rgb: Tensor
    center: Tensor
    radius: Tensor
    angle: Tensor
    background: Tensor
    direction: Tensor
    blob_level: Tensor
    noise_level: Tensor


@dataclass(frozen=True, slots=True)
class Pictures:
    """B drawn scenes.

    Attributes:
        pixels: (B, 3, H, W) float, levels 0..255, not yet rounded.
        owner: (B, H, W) uint8, the visible object at each pixel: i + 1 for object i, 0 for the background.
        boxes: (B, 7, 4), x0 y0 x1 y1 of the visible part in 0..1 of the raster; 0 for hidden objects.
        visible: (B, 7) bool, at least one pixel is visible.
        counted: (B, 7) bool, enough is visible to count.
    """

    pixels: Tensor
    owner: Tensor
    boxes: Tensor
    visible: Tensor
    counted: Tensor


def sample_scenes(
    count: int, generator: torch.Generator, *, frame: tuple[float, float] | None, alike_share: float = 0.0
) -> Scenes:
    """Sample `count` scenes.

    Args:
        count: of scenes.
        generator: its device is the scenes' device.
        frame: width and height; None mixes square frames with resized ones, for training.
        alike_share: share of the scenes whose objects have two colours and two shapes between them, so that
            many are alike. Objects are rarely alike in other scenes.
    """
    device = generator.device
    uniforms = torch.rand(count, _SCENE_UNIFORMS, generator=generator, device=device)
    if alike_share > 0.0:
        palettes = torch.rand(count, _PALETTE_UNIFORMS, generator=generator, device=device)
        uniforms = _with_palettes(uniforms, palettes, alike_share)
    return scenes_from_uniforms(uniforms, frame)


def sample_noise(count: int, height: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Uniform numbers for the backgrounds: (B, 3, 12, 12) smooth and (B, 3, H, W) per pixel."""
    device = generator.device
    smooth = torch.rand(count, 3, _BLOB_SIDE, _BLOB_SIDE, generator=generator, device=device)
    return smooth, torch.rand(count, 3, height, width, generator=generator, device=device)


def scenes_from_uniforms(uniforms: Tensor, frame: tuple[float, float] | None) -> Scenes:
    """Scenes from uniform numbers (B, `_SCENE_UNIFORMS`)."""
    per_object = uniforms[:, 1 : 1 + 9 * MAX_OBJECTS].reshape(-1, 9, MAX_OBJECTS)
    per_scene = uniforms[:, 1 + 9 * MAX_OBJECTS :]
    sides = _training_frames(per_scene[:, :2]) if frame is None else _same_frame(uniforms, frame)
    colour = (per_object[:, 0] * len(COLOURS)).long()
    spread = (2.0 * per_object[:, 1:4].transpose(1, 2) - 1.0) * COLOUR_SPREAD
    base = _colour_levels(uniforms.device)
    scale = sides.amin(dim=1) / SHORT_SIDE_PX
    small, large = RADIUS_PX
    exists = torch.arange(MAX_OBJECTS, device=uniforms.device) <= (uniforms[:, :1] * MAX_OBJECTS).floor()
    return Scenes(
        frame=sides,
        exists=exists,
        shape=(per_object[:, 4] * len(SHAPES)).long(),
        colour=colour,
        rgb=(base[colour] + spread).clamp(0.0, 255.0),
        center=per_object[:, 5:7].transpose(1, 2) * sides[:, None],
        radius=(small + (large - small) * per_object[:, 7]) * scale[:, None],
        angle=2.0 * math.pi * per_object[:, 8],
        background=_background_levels(per_scene[:, 2:9]),
        direction=2.0 * math.pi * per_scene[:, 9],
        blob_level=40.0 * per_scene[:, 10],
        noise_level=30.0 * per_scene[:, 11] ** 2,
    )


def paint(  # noqa: PLR0917 - only tensors, so that it is compiled once for all objects
    pixels: Tensor,
    owner: Tensor,
    number: Tensor,
    x: Tensor,
    y: Tensor,
    edge_px: Tensor,
    exists: Tensor,
    shape: Tensor,
    corners: Tensor,
    inner: Tensor,
    radius: Tensor,
    angle: Tensor,
    center: Tensor,
    rgb: Tensor,
) -> tuple[Tensor, Tensor]:
    """Draw object `number` (0-d) over `pixels` and `owner`; its other values have shapes ending in (1, 1)."""
    cos, sin = angle.cos(), angle.sin()
    dx, dy = x - center[:, 0], y - center[:, 1]
    x, y = (dx * cos + dy * sin) / radius, (dy * cos - dx * sin) / radius
    distance = _distance(x, y, shape, corners, inner)
    distance = torch.where(exists, distance * radius, 1e6)
    cover = (0.5 - distance / edge_px).clamp(0.0, 1.0)
    return torch.lerp(pixels, rgb, cover[:, None]), torch.where(distance < 0.0, number, owner)


def render(scenes: Scenes, smooth: Tensor, noise: Tensor, *, paint: Painter = paint) -> Pictures:
    """Draw `scenes` onto the raster of `noise`; see `sample_noise` for both kinds of noise."""
    height, width = noise.shape[-2:]
    pixel_px = torch.stack([scenes.frame[:, 0] / width, scenes.frame[:, 1] / height], dim=1)
    x = (torch.arange(width, device=noise.device) + 0.5) * pixel_px[:, 0, None]
    y = (torch.arange(height, device=noise.device) + 0.5) * pixel_px[:, 1, None]
    x, y = x[:, None, :], y[:, :, None]
    edge_px = pixel_px.prod(dim=1).sqrt()[:, None, None]
    pixels = _draw_background(scenes, x, y, smooth, noise)
    owner = torch.zeros(len(noise), height, width, dtype=torch.uint8, device=noise.device)
    numbers = torch.arange(1, MAX_OBJECTS + 1, dtype=torch.uint8, device=noise.device)
    corners = _by_shape(_CORNERS, noise.device)[scenes.shape]
    inner = _by_shape(_INNER, noise.device)[scenes.shape]
    geometry = (scenes.exists, scenes.shape, corners, inner)
    per_object = (*geometry, scenes.radius, scenes.angle, scenes.center, scenes.rgb)
    for index in range(MAX_OBJECTS):
        object_values = [values[:, index, ..., None, None] for values in per_object]
        pixels, owner = paint(pixels, owner, numbers[index], x, y, edge_px, *object_values)
    return _measure(scenes, pixels, owner, pixel_px)


def draw_scenes(
    count: int, seed: int, *, width: int, height: int, device: str = "cpu", alike_share: float = 0.0
) -> tuple[Scenes, Pictures]:
    """`count` scenes of one seed at `width` x `height` px, as a user would send them; see `sample_scenes`."""
    generator = torch.Generator(device).manual_seed(seed)
    scale = SHORT_SIDE_PX / min(width, height)
    scenes = sample_scenes(count, generator, frame=(width * scale, height * scale), alike_share=alike_share)
    return scenes, render(scenes, *sample_noise(count, height, width, generator))


def _with_palettes(uniforms: Tensor, palettes: Tensor, share: float) -> Tensor:
    """Replace the numbers that choose the objects' colours and shapes, in `share` of the scenes."""
    per_object = uniforms[:, 1 : 1 + 9 * MAX_OBJECTS].reshape(-1, 9, MAX_OBJECTS).clone()
    alike = palettes[:, :1] < share
    for row, first in ((0, 1), (4, 3)):
        own = per_object[:, row]
        of_palette = torch.where(own < 0.5, palettes[:, first, None], palettes[:, first + 1, None])
        per_object[:, row] = torch.where(alike, of_palette, own)
    return torch.cat([uniforms[:, :1], per_object.flatten(1), uniforms[:, 1 + 9 * MAX_OBJECTS :]], dim=1)


@cache
def _colour_levels(device: torch.device) -> Tensor:
    return torch.tensor(list(COLOURS.values()), dtype=torch.float32, device=device)


@cache
def _by_shape(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)


def _training_frames(uniforms: Tensor) -> Tensor:
    """(B, 2) sides: for two in five scenes, one side is up to 2.6 times as long as the other."""
    stretch = (math.log(2.6) * (2.0 * uniforms[:, 1] - 1.0)).exp()
    stretch = torch.where(uniforms[:, 0] < 0.4, stretch, 1.0)
    return SHORT_SIDE_PX * torch.stack([stretch.clamp(min=1.0), (1.0 / stretch).clamp(min=1.0)], dim=1)


def _same_frame(uniforms: Tensor, frame: tuple[float, float]) -> Tensor:
    return torch.tensor(frame, device=uniforms.device).expand(len(uniforms), 2)


def _background_levels(uniforms: Tensor) -> Tensor:
    """(B, 2, 3) levels of desaturated colours, between a colour and its grey."""
    levels = 40.0 + 175.0 * uniforms[:, :6].reshape(-1, 2, 3)
    return torch.lerp(levels, levels.mean(dim=2, keepdim=True), 0.4 + 0.6 * uniforms[:, 6:7, None])


def _draw_background(scenes: Scenes, x: Tensor, y: Tensor, smooth: Tensor, noise: Tensor) -> Tensor:
    height, width = noise.shape[-2:]
    cos, sin = scenes.direction.cos()[:, None, None], scenes.direction.sin()[:, None, None]
    across = (x / scenes.frame[:, 0, None, None] - 0.5) * cos + (
        y / scenes.frame[:, 1, None, None] - 0.5
    ) * sin
    ends = scenes.background[..., None, None]
    level = torch.lerp(ends[:, 0], ends[:, 1], (across / math.sqrt(2.0) + 0.5)[:, None])
    blobs = F.interpolate(smooth, (height, width), mode="bilinear", align_corners=False) - 0.5
    grain = noise - 0.5
    level = level + 2.0 * (
        blobs * scenes.blob_level[:, None, None, None] + grain * scenes.noise_level[:, None, None, None]
    )
    return level.clamp(0.0, 255.0)


def _distance(x: Tensor, y: Tensor, shape: Tensor, corners: Tensor, inner: Tensor) -> Tensor:
    """Signed distance (B, H, W) to the edge of an upright shape of radius 1 at the origin."""
    radius = (x * x + y * y).sqrt()
    ring_middle, ring_half = (1.0 + _RING_INNER) / 2.0, (1.0 - _RING_INNER) / 2.0
    long, short = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    distance = _corner_distance(x, y, radius, corners, inner)
    distance = torch.where(shape == _CIRCLE, radius - 1.0, distance)
    distance = torch.where(shape == _RING, (radius - ring_middle).abs() - ring_half, distance)
    return torch.where(shape == _CROSS, torch.maximum(long - 1.0, short - _CROSS_HALF_WIDTH), distance)


def _corner_distance(x: Tensor, y: Tensor, radius: Tensor, corners: Tensor, inner: Tensor) -> Tensor:
    """Distance to a polygon or star of radius 1: fold the plane into half a corner, measure to one edge."""
    half = math.pi / corners
    folded = torch.remainder(torch.atan2(y, x) + half, 2.0 * half) - half
    along, aside = radius * folded.cos(), radius * folded.sin().abs()
    edge_x, edge_y = inner * half.cos() - 1.0, inner * half.sin()
    return ((along - 1.0) * edge_y - aside * edge_x) / (edge_x * edge_x + edge_y * edge_y).sqrt()


def _measure(scenes: Scenes, pixels: Tensor, owner: Tensor, pixel_px: Tensor) -> Pictures:
    height, width = owner.shape[-2:]
    visible_masks = torch.stack([owner == index + 1 for index in range(MAX_OBJECTS)], dim=1)
    columns, rows = visible_masks.any(dim=2), visible_masks.any(dim=3)
    x0, x1 = _extent(columns)
    y0, y1 = _extent(rows)
    area_px = visible_masks.sum(dim=(2, 3)) * pixel_px.prod(dim=1)[:, None]
    total_px = _by_shape(_AREA, owner.device)[scenes.shape] * scenes.radius**2
    visible = columns.any(dim=2)
    # The limit of 150 px is for a short side of 336 px; this scales it to the frame's short side.
    least_px = MIN_VISIBLE_PX * (scenes.frame.amin(dim=1, keepdim=True) / SHORT_SIDE_PX) ** 2
    return Pictures(
        pixels=pixels,
        owner=owner,
        boxes=torch.stack([x0 / width, y0 / height, x1 / width, y1 / height], dim=-1) * visible[..., None],
        visible=visible,
        counted=(area_px >= MIN_VISIBLE_SHARE * total_px) & (area_px >= least_px),
    )


def _extent(mask: Tensor) -> tuple[Tensor, Tensor]:
    """First index and last index + 1 of the true entries of (..., N)."""
    index = torch.arange(mask.shape[-1], device=mask.device, dtype=torch.float32)
    first = torch.where(mask, index, float(mask.shape[-1])).amin(dim=-1)
    last = torch.where(mask, index + 1.0, 0.0).amax(dim=-1)
    return first, last
