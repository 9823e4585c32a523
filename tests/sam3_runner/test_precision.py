"""Precision that watches itself, with weights that overflow in float16 on this CPU as on a GPU."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from shutil import copy
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image
from prometheus_client import REGISTRY

from sam3_runner import InferenceFailed, SAM3Predictor
from sam3_runner.images.square import to_square
from sam3_runner.inference.precision import Precision, precision_of
from sam3_runner.instances import packed_union
from sam3_runner.prompts import ConceptPrompt
from sam3_runner.serving.engine import Engine, EngineConfig, SegmentRequest
from sam3_runner.weights.checkpoint import DEMO_FOLDER
from tests.concepts import concepts
from tests.edge import wait_for
from tests.overflowing import (
    FUSION_VALUES,
    MASK_CONVOLUTION,
    VISION_VALUES,
    damaged_folder,
    overflowing_folder,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from sam3_runner import PredictResult
    from sam3_runner.inference.precision import DTypeSetting
    from sam3_runner.instances import UnionResult

GPU_AUTO = precision_of("auto", "cuda")
SIDE_PX = 336
SAMPLE = to_square(Image.open("examples/sample.jpg"), SIDE_PX)
GREY = to_square(Image.new("RGB", (640, 480), (128, 128, 128)), SIDE_PX)
PROMPTS = concepts("purple circle", "triangles")


def loaded(folder: Path | str, dtype: DTypeSetting | Precision) -> SAM3Predictor:
    predictor = SAM3Predictor(str(folder), "cpu", dtype=dtype)
    predictor.load()
    return predictor


def fallbacks() -> float:
    return REGISTRY.get_sample_value("sam3_precision_fallbacks_total") or 0.0


def check_close(found: Sequence[PredictResult | UnionResult], expected: list[PredictResult]) -> None:
    """The same instances, but for the rounding of bfloat16."""
    for one, other in zip(found, expected, strict=True):
        assert len(one.instances) == len(other.instances) > 0
        assert one.confidence == pytest.approx(other.confidence, abs=0.05)
        mask, expected_mask = (np.unpackbits(packed_union([each])) for each in (one, other))
        assert (mask & expected_mask).sum() / (mask | expected_mask).sum() > 0.97


@pytest.mark.parametrize(
    ("setting", "device_type", "expected"),
    [
        ("auto", "cuda", Precision("float16", "bfloat16")),
        ("auto", "cpu", Precision("float32")),
        ("float16", "cuda", Precision("float16")),
        ("float16", "cpu", Precision("float16")),
        ("bfloat16", "cuda", Precision("bfloat16")),
        ("float32", "cuda", Precision("float32")),
    ],
)
def test_setting(setting: DTypeSetting, device_type: str, expected: Precision) -> None:
    """`auto` is float16 with a fallback on a GPU, float32 on a CPU; other settings are used as they are."""
    assert precision_of(setting, device_type) == expected


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_precision_finds_the_same(dtype: DTypeSetting) -> None:
    """Each precision finds what float32 finds, without a second pass."""
    before = fallbacks()
    [found], [expected] = (loaded("demo", each).segment([(SAMPLE, PROMPTS)]) for each in (dtype, "float32"))
    check_close(found, expected)
    assert fallbacks() == before


@pytest.mark.parametrize(("layer", "exponent"), [(VISION_VALUES, 20), (MASK_CONVOLUTION, 12)])
def test_overflow_runs_again_in_bfloat16(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, layer: str, exponent: int
) -> None:
    """An overflow, in the scores or in the masks alone, gives the answer of float32; counted and logged."""
    folder = overflowing_folder(tmp_path / "weights", layer, exponent)
    before = fallbacks()
    with caplog.at_level(logging.WARNING, "sam3_runner"):
        [found] = loaded(folder, GPU_AUTO).segment(
            [(SAMPLE, PROMPTS)], log_ids=[{"request_id": "request-17"}]
        )
    [expected] = loaded(folder, "float32").segment([(SAMPLE, PROMPTS)])
    check_close(found, expected)
    assert fallbacks() == before + 1
    [record] = caplog.records
    assert record.getMessage() == (
        "the model's output is not finite in float16: running the request again in bfloat16"
    )
    assert vars(record)["request_id"] == "request-17"


def test_boxes_run_again_in_bfloat16(tmp_path: Path) -> None:
    """A prompt with a box whose output overflows gets the answer of float32 too."""
    folder = overflowing_folder(tmp_path / "weights", VISION_VALUES, 20)
    prompts = [ConceptPrompt("purple circle", ((920.0, 360.0, 1080.0, 510.0),), (True,))]
    before = fallbacks()
    [found] = loaded(folder, GPU_AUTO).segment([(SAMPLE, prompts)])
    [expected] = loaded(folder, "float32").segment([(SAMPLE, prompts)])
    assert fallbacks() == before + 1
    assert found[0].presence == pytest.approx(expected[0].presence, abs=0.05)
    assert len(found[0].instances) == len(expected[0].instances)


def test_only_the_request_that_overflows_runs_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of a batch, only the requests whose output is not finite run again; each gets its own results."""
    folder = overflowing_folder(tmp_path / "weights", FUSION_VALUES, 14)
    before = fallbacks()
    requests = [(GREY, concepts("circle")), (SAMPLE, PROMPTS), (GREY, concepts("star", "ring"))]
    with caplog.at_level(logging.WARNING, "sam3_runner"):
        first, second, third = loaded(folder, GPU_AUTO).segment(
            requests, log_ids=[{"request_id": str(row)} for row in range(3)]
        )
    [expected] = loaded(folder, "float32").segment([(SAMPLE, PROMPTS)])
    check_close(second, expected)
    assert [result.prompt for result in (*first, *third)] == ["circle", "star", "ring"]
    assert not any(result.instances for result in (*first, *third))
    assert fallbacks() == before + 1
    assert [vars(record)["request_id"] for record in caplog.records] == ["1"]


def test_features_that_overflow_are_not_kept(tmp_path: Path) -> None:
    """A further prompt on a picture that overflows needs its pixels, for its second pass."""
    folder = overflowing_folder(tmp_path / "weights", VISION_VALUES, 20)
    predictor = SAM3Predictor(str(folder), "cpu", dtype=GPU_AUTO, max_feature_bytes=2**30)
    predictor.load()
    predictor.segment([(replace(SAMPLE, key="sample"), PROMPTS)])
    assert not predictor.holds("sample")


@pytest.mark.parametrize(("layer", "exponent"), [(VISION_VALUES, 20), (MASK_CONVOLUTION, 12)])
def test_explicit_float16_fails(tmp_path: Path, layer: str, exponent: int) -> None:
    """Where float16 is asked for, an overflow is an error that names the setting, never an answer."""
    predictor = loaded(overflowing_folder(tmp_path / "weights", layer, exponent), "float16")
    with pytest.raises(InferenceFailed, match="not finite in float16: set SAM3_DTYPE=auto or bfloat16"):
        predictor.segment([(SAMPLE, PROMPTS)])


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (GPU_AUTO, "not finite in float16 or bfloat16: set SAM3_DTYPE=float32"),
        ("bfloat16", "not finite in bfloat16: set SAM3_DTYPE=float32"),
        ("float32", "not finite in float32: .* check the weights of SAM3_WEIGHTS_PATH"),
    ],
)
def test_no_precision_helps(tmp_path: Path, dtype: DTypeSetting | Precision, message: str) -> None:
    """Weights that are not finite are an error in each precision."""
    predictor = loaded(damaged_folder(tmp_path / "weights"), dtype)
    with pytest.raises(InferenceFailed, match=message):
        predictor.segment([(SAMPLE, PROMPTS)])


def test_replaced_weights_are_not_mixed(tmp_path: Path) -> None:
    """When the weights on disk are others by now, the second precision is not loaded from them."""
    folder = overflowing_folder(tmp_path / "weights", VISION_VALUES, 20)
    predictor = loaded(folder, GPU_AUTO)
    copy(DEMO_FOLDER / "model.safetensors", tmp_path / "new")
    (tmp_path / "new").replace(folder / "model.safetensors")
    with pytest.raises(InferenceFailed, match=r"weights were replaced on disk: .* SAM3_DTYPE=bfloat16"):
        predictor.segment([(SAMPLE, PROMPTS)])


# In the engine, which warms up first.


def engine_of(folder: Path, dtype: DTypeSetting | Precision) -> Engine:
    engine = Engine(EngineConfig(str(folder), "cpu", cpu_threads=1, dtype=dtype))
    engine.start()
    wait_for(engine.status, lambda status: status.state != "loading")
    return engine


def request(log_ids: dict[str, str] | None = None) -> SegmentRequest:
    return SegmentRequest(SAMPLE, PROMPTS, time.monotonic() + 600, log_ids=log_ids or {})


@pytest.mark.parametrize(("layer", "exponent"), [(VISION_VALUES, 20), (MASK_CONVOLUTION, 12)])
def test_overflow_in_the_warm_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, layer: str, exponent: int
) -> None:
    """A model that overflows in its warm-up is served in bfloat16: no request is run twice."""
    folder = overflowing_folder(tmp_path / "weights", layer, exponent)
    with caplog.at_level(logging.WARNING, "sam3_runner"):
        engine = engine_of(folder, GPU_AUTO)
    assert engine.status().dtype == "bfloat16"
    [warning] = [record.getMessage() for record in caplog.records]
    assert "not finite in float16: every request runs in bfloat16" in warning
    before = fallbacks()
    [outcome] = engine.segment([request()])
    assert outcome.results
    check_close(outcome.results, loaded(folder, "float32").segment([(SAMPLE, PROMPTS)])[0])
    assert fallbacks() == before


def test_warm_up_of_a_sound_model() -> None:
    """A model that does not overflow is served in float16."""
    engine = engine_of("demo", GPU_AUTO)  # type: ignore[arg-type]
    assert engine.status().dtype == "float16"


def test_engine_refuses_a_model_that_overflows(tmp_path: Path) -> None:
    """Where float16 is asked for, a model that overflows in its warm-up is not served."""
    engine = engine_of(overflowing_folder(tmp_path / "weights", VISION_VALUES, 20), "float16")
    status = engine.status()
    assert status.state == "error"
    assert "SAM3_DTYPE" in str(status.detail)


def test_log_ids_of_a_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The engine logs a second pass with the ids of its request."""
    # The sample's mask overflows from 2**10.25 on, the warm-up's not yet at 2**10.75.
    engine = engine_of(overflowing_folder(tmp_path / "weights", MASK_CONVOLUTION, 10.5), GPU_AUTO)
    assert engine.status().dtype == "float16"
    caplog.clear()
    with caplog.at_level(logging.WARNING, "sam3_runner"):
        [outcome] = engine.segment([request({"request_id": "request-17", "task_id": "a-task"})])
    assert outcome.results
    [record] = caplog.records
    assert (vars(record)["request_id"], vars(record)["task_id"]) == ("request-17", "a-task")
