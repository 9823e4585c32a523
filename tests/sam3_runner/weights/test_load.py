"""Weights in every layout are loaded without a difference; other files are refused."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import Sam3Config, Sam3Model

from commands.local_server import ROOT
from sam3_runner import DeviceUnavailable, SAM3Predictor, WeightsError
from sam3_runner.weights.checkpoint import DEMO, DEMO_FOLDER, find_checkpoint
from sam3_runner.weights.layouts import detector_state
from sam3_runner.weights.load import load_network, to_transformers
from tests.drawn import scene
from tests.sam3_runner.official import EXTRA_SHAPES, TRACKER, as_official

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from sam3_runner.weights.checkpoint import Checkpoint

    State = dict[str, Tensor]
    Write = Callable[[State, Path], Path]

OFFICIAL_KEYS_SHA256 = "ba916edf75c65e619fe28092fc3b487e340d8fb378ba050ecb35eb3d89029a34"
"""Of the 1,134 names and shapes of the image model that the PyPI package sam3 0.1.4 builds."""


@pytest.fixture(scope="module")
def known(tiny_checkpoint: Checkpoint) -> State:
    """Random weights of the tiny model, fp32."""
    generator = torch.Generator().manual_seed(7)
    model: Any = Sam3Model(Sam3Config.from_dict(tiny_checkpoint.config))
    return {name: torch.randn(each.shape, generator=generator) for name, each in model.state_dict().items()}


@pytest.fixture
def folder(tiny_checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A folder with the tiny model's config.json and tokenizer.json, without weights."""
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(tiny_checkpoint.weights_file.parent / name, tmp_path)
    return tmp_path


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def official_file(state: State) -> State:
    """The tensors of the released file: the detector with tensors that we do not use, and the tracker."""
    extras = {name: torch.zeros(shape) for name, shape in EXTRA_SHAPES.items()}
    extras |= {"backbone.vision_backbone.sam2_convs.0.conv_1x1.weight": torch.zeros(8)}
    tracker = {name: torch.zeros(shape) for name, shape in TRACKER.items()}
    return prefixed("detector.", as_official(state) | extras) | tracker


def in_pt(content: object, folder: Path) -> Path:
    torch.save(content, folder / "sam3.pt")
    return folder / "sam3.pt"


def in_safetensors(state: State, folder: Path, name: str = "tuned.safetensors") -> Path:
    save_file({key: each.contiguous().clone() for key, each in state.items()}, folder / name)
    return folder / name


def trained(state: State) -> dict[str, object]:
    """A file of training code: bare keys in a wrapper, beside its optimizer."""
    return {"model": as_official(state), "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}}, "epoch": 3}


TRACKER_OF_TRANSFORMERS = {"tracker_model.x": torch.zeros(1), "tracker_neck.y": torch.zeros(1)}
LAYOUTS: dict[str, tuple[str, Write]] = {
    "official": ("official", lambda state, to: in_pt(official_file(state), to)),
    "official, wrapped": ("official", lambda state, to: in_pt({"model": official_file(state)}, to)),
    "official, fine-tuned": ("official", lambda state, to: in_pt(trained(state), to)),
    "official, safetensors": ("official", lambda state, to: in_safetensors(official_file(state), to)),
    "transformers, whole": (
        "transformers",
        lambda state, to: in_safetensors(prefixed("detector_model.", state) | TRACKER_OF_TRANSFORMERS, to),
    ),
    "transformers, bare": ("transformers", in_safetensors),
    "transformers, torch": ("transformers", lambda state, to: in_pt({"state_dict": state}, to)),
    "transformers, folder": (
        "transformers",
        lambda state, to: in_safetensors(state, to, "model.safetensors").parent,
    ),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_layout_is_loaded(known: State, folder: Path, kind: str) -> None:
    """From every layout each tensor of the model is loaded without a difference, and no other tensor."""
    layout, write = LAYOUTS[kind]
    model, found_layout = load_network(find_checkpoint(str(write(known, folder))), torch.device("cpu"))
    read = to_transformers(model.state_dict())
    assert found_layout == layout
    assert read.keys() == known.keys()
    assert [name for name in known if not torch.equal(read[name], known[name])] == []
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_converted(known: State, folder: Path, dtype: torch.dtype) -> None:
    """Tensors of half-precision files have the same values in fp32."""
    halves = {name: tensor.to(dtype) for name, tensor in known.items()}
    model, _ = load_network(find_checkpoint(str(in_pt(official_file(halves), folder))), torch.device("cpu"))
    read = to_transformers(model.state_dict())
    assert [name for name in known if not torch.equal(read[name], halves[name].float())] == []


def test_full_size_keys_are_the_official_ones() -> None:
    """All 1,134 names and shapes of the official model map to those of `Sam3Model`."""
    with torch.device("meta"):
        model: Any = Sam3Model(Sam3Config())
        expected = model.state_dict()
        official = as_official(expected) | {name: torch.empty(size) for name, size in EXTRA_SHAPES.items()}
    listed = sorted(f"{name} {tuple(tensor.shape)}" for name, tensor in official.items())
    assert hashlib.sha256("\n".join(listed).encode()).hexdigest() == OFFICIAL_KEYS_SHA256
    _, detector = detector_state(official)
    assert {name: each.shape for name, each in detector.items()} == {
        name: each.shape for name, each in expected.items()
    }


def test_official_file_gives_the_same_results(tmp_path: Path) -> None:
    """The demo checkpoint, converted to a `sam3.pt`, gives the same instances with the same masks."""
    demo = find_checkpoint(DEMO)
    model, _ = load_network(demo, torch.device("cpu"))
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(DEMO_FOLDER / name, tmp_path)
    path = in_pt({"model": official_file(to_transformers(model.state_dict()))}, tmp_path)
    picture = scene(4_000_000)
    results = []
    for weights in (DEMO, str(path)):
        predictor = SAM3Predictor(weights, "cpu")
        predictor.load()
        results.append(predictor.predict_batch(picture.image, picture.names))
    assert results[0] == results[1]
    assert any(result.instances for result in results[0])


def test_single_file_is_sam3_of_the_official_size(tmp_path: Path) -> None:
    """Without a config.json a file is read as SAM 3: 1008 px, CLIP's tokenizer, the official eps."""
    (tmp_path / "sam3.pt").touch()
    checkpoint = find_checkpoint(str(tmp_path / "sam3.pt"))
    config: Any = Sam3Config.from_dict(checkpoint.config)
    backbone = config.vision_config.backbone_config
    assert (checkpoint.input_side_px, checkpoint.name) == (1008, "sam3.pt")
    assert (backbone.layer_norm_eps, backbone.hidden_size, backbone.image_size) == (1e-5, 1024, 1008)
    assert checkpoint.tokenizer_file.parent == DEMO_FOLDER


def test_metas_own_folder_has_the_official_eps(tmp_path: Path) -> None:
    """The hub's config.json describes the video model, and does not set the eps."""
    (tmp_path / "config.json").write_text(
        '{"model_type": "sam3_video", "detector_config": {"model_type": "sam3", "detr_decoder_config": '
        '{"num_queries": 77}}, "tracker_config": {}}'
    )
    (tmp_path / "model.safetensors").touch()
    shutil.copy(DEMO_FOLDER / "tokenizer.json", tmp_path)
    config: Any = Sam3Config.from_dict(find_checkpoint(str(tmp_path)).config)
    assert config.vision_config.backbone_config.layer_norm_eps == 1e-5
    assert config.detr_decoder_config.num_queries == 77


def drop(name: str) -> Callable[[State], object]:
    return lambda state: state.pop(name)


def put(name: str, tensor: Tensor) -> Callable[[State], object]:
    return lambda state: state.update({name: tensor})


PRESENCE = "detector.transformer.decoder.presence_token.weight"


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        (drop(PRESENCE), ["1 missing: detr_decoder.presence_token.weight"]),
        (put("detector.backbone.surplus", torch.zeros(1)), ["1 unexpected: backbone.surplus"]),
        (put("surplus", torch.zeros(1)), ["1 unexpected: surplus"]),
        (put(PRESENCE, torch.zeros(2, 7)), ["1 of another shape", "(2, 7) instead of (1, 64)"]),
        (put(PRESENCE, torch.zeros(1, 64, dtype=torch.int8)), ["1 of a type that is not read", "int8"]),
        (
            put(PRESENCE, torch.zeros(1, 64, dtype=torch.float8_e4m3fn)),
            ["1 of a type that is not read", "float8_e4m3fn"],
        ),
        (
            lambda state: [state.pop(name) for name in list(state) if "decoder.layers" in name],
            ["missing: detr_decoder.layers.0", " more"],
        ),
        (
            put("detector.transformer.decoder.layers.0.self_attn.in_proj_bias", torch.zeros(7)),
            ["3 missing", "1 unexpected"],
        ),
    ],
)
def test_official_tensors_that_do_not_fit(
    known: State, folder: Path, edit: Callable[[State], object], parts: list[str]
) -> None:
    """A missing or unexpected tensor, or a wrong shape or dtype, is refused with the tensor's name."""
    state = official_file(known)
    edit(state)
    check_refused(in_pt(state, folder), "does not fit the model", *parts)


PRESENCE_NAME = "detr_decoder.presence_token.weight"


@pytest.mark.parametrize("prefix", ["detector_model.", ""])
@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        (lambda prefix: drop(prefix + PRESENCE_NAME), [f"1 missing: {PRESENCE_NAME}"]),
        (lambda _: put("surplus", torch.zeros(1)), ["1 unexpected: surplus"]),
        (
            lambda prefix: put(prefix + PRESENCE_NAME, torch.zeros(2, 7)),
            [f"{PRESENCE_NAME} (2, 7) instead of (1, 64)"],
        ),
        (
            lambda prefix: put(prefix + PRESENCE_NAME, torch.zeros(1, 64, dtype=torch.float64)),
            [f"{PRESENCE_NAME} float64"],
        ),
    ],
)
def test_transformers_tensors_that_do_not_fit(
    known: State,
    folder: Path,
    prefix: str,
    edit: Callable[[str], Callable[[State], object]],
    parts: list[str],
) -> None:
    """Files of the transformers layouts are checked in the same way."""
    state = prefixed(prefix, known)
    edit(prefix)(state)
    check_refused(in_safetensors(state, folder), "does not fit the model", *parts)


def test_many_missing_are_counted(known: State, folder: Path) -> None:
    """Of many missing keys the error lists the first and counts all."""
    missing = sorted(name for name in known if "detr_encoder" in name)
    state = {name: tensor for name, tensor in known.items() if name not in missing}
    listed = ", ".join(missing[:8])
    check_refused(in_pt(state, folder), f"{len(missing)} missing: {listed} and {len(missing) - 8} more")


@pytest.mark.parametrize(
    ("field", "number"), [("num_queries", "many"), ("hidden_size", -5), ("num_attention_heads", 0)]
)
def test_invalid_configuration(known: State, folder: Path, field: str, number: object) -> None:
    """A config.json with invalid values is reported as invalid, not as truncated weights."""
    config = json.loads((folder / "config.json").read_text())
    config["detr_decoder_config"][field] = number
    (folder / "config.json").write_text(json.dumps(config))
    check_refused(in_pt(known, folder), "sam3.pt is invalid: ")


class CodeInPickle:
    """A pickle that runs a command when it is read."""

    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self._command,)


@pytest.mark.parametrize("wrap", [lambda code: code, lambda code: {"model": {}, "extra": code}])
def test_pickle_that_would_run_code(tmp_path: Path, wrap: Callable[[CodeInPickle], object]) -> None:
    """The error has the name of the function that the pickle requests, and nothing was run."""
    marker = tmp_path / "it-ran"
    path = in_pt(wrap(CodeInPickle(f"touch {marker}")), tmp_path)
    check_refused(path, "is refused", "system", "can run code")
    assert not marker.exists()


def test_bare_pickle(tmp_path: Path) -> None:
    """A pickle without torch's zip file is not read either, and nothing was run."""
    marker = tmp_path / "it-ran"
    (tmp_path / "sam3.pt").write_bytes(pickle.dumps(CodeInPickle(f"touch {marker}")))
    check_refused(tmp_path / "sam3.pt", "is a bare pickle")
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*TorchScript:UserWarning")
def test_torchscript(tmp_path: Path) -> None:
    """A compiled program is reported as one, without torch's advice to load it."""
    program: Any = torch.jit.script(torch.nn.Linear(2, 2))
    program.save(str(tmp_path / "sam3.pt"))
    check_refused(tmp_path / "sam3.pt", "is a TorchScript program, not weights", "state_dict()")


OTHER_FILES = {
    b"": "is empty",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:99\n": "Git LFS pointer",
    b"<!DOCTYPE html><html>Access to model facebook/sam3 is restricted": "neither a torch nor a safetensors",
    b"PK\x03\x04 and then nothing": "cannot be read",
    b"\x08\x00\x00\x00\x00\x00\x00\x00{not json": "cannot be read",
}


@pytest.mark.parametrize("content", OTHER_FILES)
def test_files_of_other_kinds(tmp_path: Path, content: bytes) -> None:
    """The error says what kind of file is at the weights' path."""
    (tmp_path / "sam3.pt").write_bytes(content)
    check_refused(tmp_path / "sam3.pt", OTHER_FILES[content])


@pytest.mark.parametrize("write", [in_pt, in_safetensors])
@pytest.mark.parametrize("part", [0.001, 0.5, 0.999])
def test_truncated_files(known: State, folder: Path, write: Write, part: float) -> None:
    """For a truncated file the error has its path."""
    path = write(known, folder)
    os.truncate(path, int(path.stat().st_size * part))
    check_refused(path, str(path), "cannot be read, it may be cut short")


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (["image_encoder.trunk.blocks.0.norm1.weight", "sam_mask_decoder.iou_token.weight"], "it is a SAM 2"),
        (["memory_attention.layers.0.norm1.weight"], "it is a SAM 2"),
        (["image_encoder.blocks.0.norm1.weight", "mask_decoder.iou_token.weight"], "it is a SAM 1"),
        (["detector.backbone.vision_backbone.interactive_convs.0.conv_1x1.weight"], "it is a SAM 3.1"),
        (["detector.backbone.vision_backbone.trunk.pos_embed", "tracker.model.x"], "it is a SAM 3.1"),
        (["tracker.sam_mask_decoder.iou_token.weight"], "holds no SAM 3 detector"),
        (["model.0.conv.weight", "model.1.conv.weight"], "its first keys: model.0.conv.weight"),
    ],
)
def test_other_models(tmp_path: Path, keys: list[str], sentence: str) -> None:
    """For a checkpoint of another model the error has that model's name."""
    check_refused(
        in_pt({"model": {key: torch.zeros(1) for key in keys}}, tmp_path), "cannot be served", sentence
    )


@pytest.mark.parametrize(
    "content", [[1, 2], {}, {"model": {}}, {"epoch": 3}, torch.zeros(3), {0: torch.zeros(3)}]
)
def test_pt_without_weights(tmp_path: Path, content: object) -> None:
    """A torch file without weights is refused."""
    check_refused(in_pt(content, tmp_path), "holds no named tensors")


def test_missing_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """For cuda without a GPU the error says what to do; the model is not loaded on the CPU instead."""
    if torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceUnavailable, match="SAM3_DEVICE=cpu"):
        SAM3Predictor(DEMO, "cuda").load()


def check_refused(path: Path, *parts: str) -> None:
    """Loading fails with one line that contains `parts`."""
    with pytest.raises(WeightsError) as refused:
        SAM3Predictor(str(path), "cpu").load()
    message = str(refused.value)
    assert [part for part in parts if part not in message] == []
    assert "\n" not in message
    assert len(message) < 1500


MIDDLE = {
    "model_type": "sam3",
    "vision_config": {
        "backbone_config": {
            "model_type": "sam3_vit_model",
            "num_hidden_layers": 2,
            "global_attn_indexes": [1],
        }
    },
    "text_config": {"num_hidden_layers": 1, "hidden_size": 512, "num_attention_heads": 8},
}
"""SAM 3 with fewer layers: about 0.4 GB."""

PEAK = """
import re, sys
import psutil, torch
import sam3_runner.predictor
from sam3_runner.weights.checkpoint import Checkpoint, CLIP_TOKENIZER_FILE
from sam3_runner.weights.load import load_network
from sam3_runner.network.model import SAM3Network
from pathlib import Path
from transformers import Sam3Config
torch.set_num_threads(1)
with torch.device("meta"):
    SAM3Network(Sam3Config())  # imports code, which is not part of the measurement
path = Path(sys.argv[1])
before = psutil.Process().memory_info().rss
model, _ = load_network(Checkpoint(path, CLIP_TOKENIZER_FILE, CONFIG, "middle"), torch.device("cpu"))
sum(float(parameter.sum()) for parameter in model.parameters())  # reads every page
# Not ru_maxrss, which a child inherits from its parent.
peak_kb = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]
print(int(peak_kb) * 1024 - before, "torch._dynamo" in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize("write", [lambda state, to: in_pt(official_file(state), to), in_safetensors])
def test_host_memory(tmp_path: Path, write: Write) -> None:
    """Loading takes at most 1.3 times the file's size in memory, with all of its pages read.

    It leaves out torch's compiler, whose import takes two seconds of a core.
    """
    model: Any = Sam3Model(Sam3Config.from_dict(MIDDLE))
    path = write(model.state_dict(), tmp_path)
    size_bytes = path.stat().st_size
    del model
    code = PEAK.replace("CONFIG", repr(MIDDLE))
    peak_bytes, has_compiler = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    ).stdout.split()
    assert size_bytes > 200e6
    assert int(peak_bytes) < 1.3 * size_bytes
    assert has_compiler == "False"
