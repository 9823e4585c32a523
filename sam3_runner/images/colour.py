"""Converts images of any Pillow mode to 8-bit channels on a white background, and to sRGB."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

NEAR_SRGB_LEVELS = 4
"""A profile that changes no colour by more is ignored: cameras and scanners have variants of sRGB."""
CACHED_PROFILES = 8
GRID = 9


def grey_scale_of(image: Image.Image) -> float:
    """Factor from the levels of a grey image of more than 8 bits to 0..255; 1 for other images.

    16-bit images use their full range. Modes I and F have no defined range; the brightest pixel decides: 1
    (F only), 255, 65535, or that pixel's level.
    """
    if image.mode.startswith("I;16"):
        return 255 / 65535
    if image.mode not in {"I", "F"}:
        return 1.0
    brightest = float(np.asarray(image).max())
    ranges = (1, 255, 65535) if image.mode == "F" else (255, 65535)
    return 255 / next((limit for limit in ranges if brightest <= limit), brightest)


def on_white(image: Image.Image, grey_scale: float) -> Image.Image:
    """`image` as 8-bit L, RGB or CMYK; transparent pixels are composited on white, as viewers show them."""
    if image.mode[0] in "IF":
        return _grey(image, grey_scale)
    if image.mode in {"L", "RGB", "CMYK"} and not image.has_transparency_data:
        return image
    if image.has_transparency_data:
        # Pillow converts La to RGBA only via LA.
        colours = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(colours, mask=colours.getchannel("A"))
        return white
    return image.convert("L" if image.mode == "1" else "RGB")


def is_srgb(image: Image.Image, icc_profile: bytes) -> bool:
    """Whether `image` is opaque 8-bit grey or RGB that `to_srgb` would not change."""
    if image.mode not in {"L", "RGB"} or image.has_transparency_data:
        return False
    return not icc_profile or _conversion(icc_profile, image.mode) is None


def to_srgb(pixels: npt.NDArray[np.uint8], icc_profile: bytes) -> npt.NDArray[np.uint8]:
    """(H, W, 3) sRGB of (H, W, 1, 3 or 4) grey, RGB or CMYK.

    The profile is applied where its colour space matches and it is not near sRGB. An unreadable profile is
    ignored.
    """
    mode = {1: "L", 3: "RGB", 4: "CMYK"}[pixels.shape[2]]
    image = Image.fromarray(pixels.squeeze(2) if mode == "L" else pixels, mode)
    conversion = _conversion(icc_profile, mode) if icc_profile else None
    if conversion is not None:
        image = ImageCms.applyTransform(image, conversion) or image
    return np.asarray(image.convert("RGB"))


@lru_cache(CACHED_PROFILES)
def _conversion(icc_profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform from the profile to sRGB; None where it would change nothing, or cannot be built."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
        if profile.profile.xcolor_space.strip() != {"L": "GRAY"}.get(mode, mode):
            return None
        conversion = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    colours = _grid(mode)
    before = np.asarray(colours.convert("RGB")).astype(int)
    after = np.asarray(ImageCms.applyTransform(colours, conversion)).astype(int)
    return conversion if np.abs(after - before).max() > NEAR_SRGB_LEVELS else None


def _grid(mode: str) -> Image.Image:
    """An image of evenly spaced colours of the whole range of `mode`."""
    steps = np.linspace(0, 255, GRID).astype(np.uint8)
    channels = len(Image.new(mode, (1, 1)).getbands())
    colours = np.stack(np.meshgrid(*[steps] * channels), axis=-1).reshape(1, -1, channels)
    return Image.fromarray(colours.squeeze(2) if mode == "L" else colours, mode)


def _grey(image: Image.Image, grey_scale: float) -> Image.Image:
    """8-bit grey of an image of mode I or F; its transparent level becomes white."""
    stored = np.asarray(image)
    grey = np.rint((stored.astype(np.float32) * np.float32(grey_scale)).clip(0, 255)).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[stored == transparent] = 255
    return Image.fromarray(grey)
