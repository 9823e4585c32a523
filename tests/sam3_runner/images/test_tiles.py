"""Tiles: which windows an image gets, and what a decoder makes of them."""

from __future__ import annotations

import io
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sam3_runner.images.decode import decode, decode_preview, decode_windows
from sam3_runner.images.decoders import ImageDecoders
from sam3_runner.images.read import read_image_file
from sam3_runner.images.square import resize_to
from sam3_runner.images.tiles import MAX_TILES_A_SIDE, Tiles, max_tiles, tile_windows
from sam3_runner.instances import Window

SIDE_PX = 56
WIDTH, HEIGHT = 203, 131
grids = st.one_of(st.just("auto"), st.integers(1, MAX_TILES_A_SIDE))


def photo(orientation: int = 1) -> bytes:
    """A JPEG without symmetry."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    pixels = np.stack([x * 255 // WIDTH, y * 255 // HEIGHT, (x // 16 + y // 16) % 2 * 200], axis=-1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG", quality=95, subsampling=0, exif=exif)
    return buffer.getvalue()


@given(width=st.integers(1, 9000), height=st.integers(1, 9000), tiles=grids, side_px=st.integers(100, 1008))
def test_tiles_cover_the_image(width: int, height: int, tiles: Tiles, side_px: int) -> None:
    """Each px is in a tile, neighbours overlap by a part of their side, and each begins at a whole byte."""
    windows = tile_windows(width, height, tiles, side_px)
    assert len(windows) <= max_tiles(tiles)
    assert len(windows) != 1
    if not windows:
        return
    for low, high, length in (("left", "right", width), ("top", "bottom", height)):
        spans = sorted({(getattr(window, low), getattr(window, high)) for window in windows})
        assert spans[0][0] == 0
        assert spans[-1][1] == length
        for (_, end), (following, _) in pairwise(spans):
            assert end - following >= spans[0][1] / 8 - 8
            assert following % 8 == 0


@pytest.mark.parametrize(
    ("size", "tiles", "side_px", "grid"),
    [
        ((4000, 3000), "auto", 1008, (4, 3)),
        ((1920, 1080), "auto", 1008, (2, 1)),
        ((1280, 720), "auto", 1008, (1, 1)),
        ((8000, 6000), "auto", 1008, (4, 4)),
        ((1280, 720), 2, 1008, (2, 2)),
        ((1280, 720), 1, 1008, (1, 1)),
        ((100, 300), 4, 1008, (1, 4)),
    ],
)
def test_grid(size: tuple[int, int], tiles: Tiles, side_px: int, grid: tuple[int, int]) -> None:
    """`auto` follows the model's square; a tile has 64 px a side at least."""
    windows = tile_windows(*size, tiles, side_px)
    columns, rows = len({window.left for window in windows}), len({window.top for window in windows})
    assert (columns or 1, rows or 1) == grid


@pytest.mark.parametrize("orientation", range(1, 9))
def test_window_is_that_part_of_the_picture(orientation: int) -> None:
    """Under each EXIF orientation a window's square is that of the picture that a viewer shows, cut there."""
    file = read_image_file(photo(orientation), max_pixels=10**6)
    shown = Image.fromarray(decode_preview(file, 1000).pixels)
    window = Window(16, 24, 72, 60)
    (tile,) = decode_windows(file, SIDE_PX, [window])
    assert (tile.width, tile.height) == (72, 60)
    expected = resize_to(shown.crop((16, 24, 88, 84)), (SIDE_PX, SIDE_PX), b"")
    assert np.abs(tile.pixels.astype(int) - expected).max() <= 1


def test_window_of_all_is_the_square() -> None:
    """The window of the whole image is what the model sees without tiles."""
    file = read_image_file(photo(), max_pixels=10**6)
    (tile,) = decode_windows(file, SIDE_PX, [Window(0, 0, WIDTH, HEIGHT)])
    assert np.array_equal(tile.pixels, resize_to(decode(file), (SIDE_PX, SIDE_PX), b""))


@pytest.mark.anyio
async def test_process_decodes_windows() -> None:
    """A decoder process makes one image a window, of which each is closed for itself."""
    decoders = ImageDecoders(side_px=SIDE_PX, count=1)
    file = read_image_file(photo(6), max_pixels=10**6)
    windows = tile_windows(HEIGHT, WIDTH, 2, SIDE_PX)
    try:
        images = await decoders.decode_windows(file, windows)
        for image, expected in zip(images, decode_windows(file, SIDE_PX, windows), strict=True):
            assert (image.width, image.height) == (expected.width, expected.height)
            assert np.array_equal(image.array(), expected.pixels)
            image.close(is_read=True)
    finally:
        await decoders.close()
