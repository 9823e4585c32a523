"""Functions of transformers that the training replaces, one test per dependency."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from transformers import Sam3Model

from sam3_runner.model import encode_image
from training.architecture import SIDE_PX, demo_config
from training.learner import cache_position_grids


def new_model() -> Any:
    config: Any = demo_config()
    model: Any = Sam3Model(config)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> Any:
    return new_model()


def test_get_coords(model: Any) -> None:
    """The decoder computes its coordinates in every call, from sizes on the device."""
    side = torch.tensor(24)
    device, dtype = torch.device("cpu"), torch.float32

    def coordinates() -> tuple[torch.Tensor, torch.Tensor]:
        pair: tuple[torch.Tensor, torch.Tensor] = model.detr_decoder._get_coords(
            side.clone(), side.clone(), dtype=dtype, device=device
        )
        return pair

    rows, columns = coordinates()
    expected = torch.arange(24) / 24
    assert torch.equal(rows, expected), "_get_coords computes other values: cache_position_grids replaces it"
    assert torch.equal(columns, expected), (
        "_get_coords computes other values: cache_position_grids replaces it"
    )
    assert coordinates()[0] is not rows, "_get_coords is cached now: cache_position_grids need not replace it"


def test_get_rpb_matrix(model: Any) -> None:
    """The decoder's box bias is a method of its own, which is compiled."""
    parameters = list(inspect.signature(model.detr_decoder._get_rpb_matrix).parameters)
    assert parameters == ["reference_boxes", "spatial_shape"], (
        "_get_rpb_matrix changed: compile_modules compiles it"
    )


def recording(function: Any, calls: list[tuple[Any, ...]]) -> Any:
    """`function`, which appends its arguments to `calls`."""

    def record(*arguments: Any) -> Any:
        calls.append(arguments)
        return function(*arguments)

    return record


def test_cached_grids_are_used_and_equal() -> None:
    """The model calls the replaced grids, and the vision encoder's have the values of transformers."""
    model = new_model()
    pixels = torch.zeros(1, 3, SIDE_PX, SIDE_PX)
    with torch.inference_mode():
        expected = model.vision_encoder(pixels).fpn_position_encoding
        cache_position_grids(model)
        calls: list[tuple[Any, ...]] = []
        encoding = model.vision_encoder.neck.position_encoding
        encoding.forward = recording(encoding.forward, calls)
        actual = model.vision_encoder(pixels).fpn_position_encoding
        encode_image(model, pixels.to(torch.uint8))
    assert len(calls) == len(expected) * 2 + 1, "the neck does not call position_encoding any more"
    for level, other in zip(expected, actual, strict=True):
        assert torch.equal(level, other), "cache_position_grids changes the position encoding"
