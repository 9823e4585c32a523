"""Weights in every layout, read back bit for bit; and what must not be read."""

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
from transformers.models.sam3.configuration_sam3 import Sam3Config
from transformers.models.sam3.modeling_sam3 import Sam3Model

from commands.local_server import ROOT
from sam3_runner import DeviceUnavailable, SAM3Predictor, WeightsError
from sam3_runner.checkpoint import DEMO_FOLDER, find_checkpoint
from sam3_runner.layouts import detector_state
from sam3_runner.weights import load_model
from tests.drawn import scene
from tests.sam3_runner.official import EXTRA_SHAPES, TRACKER, as_official

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from sam3_runner.checkpoint import Checkpoint

    State = dict[str, Tensor]
    Write = Callable[[State, Path], Path]

OFFICIAL_KEYS_SHA256 = "ba916edf75c65e619fe28092fc3b487e340d8fb378ba050ecb35eb3d89029a34"
"""Of the 1,134 names and shapes of the image model that the PyPI package sam3 0.1.4 builds."""


@pytest.fixture(scope="module")
def known(tiny_checkpoint: Checkpoint) -> State:
    """Weights of the tiny model, fp32, no two alike."""
    generator = torch.Generator().manual_seed(7)
    model: Any = Sam3Model(Sam3Config.from_dict(tiny_checkpoint.config))
    return {name: torch.randn(each.shape, generator=generator) for name, each in model.state_dict().items()}


@pytest.fixture
def folder(tiny_checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A folder with the tiny model's config.json and tokenizer.json, and no weights."""
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(tiny_checkpoint.weights_file.parent / name, tmp_path)
    return tmp_path


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def official_whole(state: State) -> State:
    """What the released file holds: the detector with all its extras, and the tracker."""
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
    """What training code writes: bare keys in a wrapper, beside its optimizer."""
    return {"model": as_official(state), "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}}, "epoch": 3}


TRACKER_OF_TRANSFORMERS = {"tracker_model.x": torch.zeros(1), "tracker_neck.y": torch.zeros(1)}
LAYOUTS: dict[str, tuple[str, Write]] = {
    "official": ("official", lambda state, to: in_pt(official_whole(state), to)),
    "official, wrapped": ("official", lambda state, to: in_pt({"model": official_whole(state)}, to)),
    "official, fine-tuned": ("official", lambda state, to: in_pt(trained(state), to)),
    "official, safetensors": ("official", lambda state, to: in_safetensors(official_whole(state), to)),
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
def test_read_back_bit_for_bit(known: State, folder: Path, kind: str) -> None:
    """Every layout gives every tensor of the model exactly as it was, and nothing else."""
    layout, write = LAYOUTS[kind]
    model, told = load_model(find_checkpoint(str(write(known, folder))), torch.device("cpu"))
    read = model.state_dict()
    assert told == layout
    assert read.keys() == known.keys()
    assert [name for name in known if not torch.equal(read[name], known[name])] == []
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(known: State, folder: Path, dtype: torch.dtype) -> None:
    """Half-precision files give the same values in fp32."""
    halves = {name: tensor.to(dtype) for name, tensor in known.items()}
    model, _ = load_model(find_checkpoint(str(in_pt(official_whole(halves), folder))), torch.device("cpu"))
    read = model.state_dict()
    assert [name for name in known if not torch.equal(read[name], halves[name].float())] == []


def test_full_size_keys_are_the_official_ones() -> None:
    """The official model's own 1,134 names and shapes map onto those of `Sam3Model`, with none left."""
    with torch.device("meta"):
        model: Any = Sam3Model(Sam3Config())
        expected = model.state_dict()
        official = as_official(expected) | {name: torch.empty(size) for name, size in EXTRA_SHAPES.items()}
    listed = sorted(f"{name} {tuple(tensor.shape)}" for name, tensor in official.items())
    assert hashlib.sha256("\n".join(listed).encode()).hexdigest() == OFFICIAL_KEYS_SHA256
    read = detector_state(official)
    assert {name: each.shape for name, each in read.items()} == {
        name: each.shape for name, each in expected.items()
    }


def test_official_file_answers_as_the_folder(tmp_path: Path) -> None:
    """The demo checkpoint, rewritten as a `sam3.pt`, finds the same things with the same masks."""
    demo = find_checkpoint("demo")
    model, _ = load_model(demo, torch.device("cpu"))
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(DEMO_FOLDER / name, tmp_path)
    path = in_pt({"model": official_whole(model.state_dict())}, tmp_path)
    picture = scene(4_000_000)
    answers = []
    for weights in ("demo", str(path)):
        predictor = SAM3Predictor(weights, "cpu")
        predictor.load()
        answers.append(predictor.predict_batch(picture.image, picture.names))
    assert answers[0] == answers[1]
    assert any(result.instances for result in answers[0])


def test_single_file_is_sam3_of_the_official_size(tmp_path: Path) -> None:
    """Without a config.json beside it a file is SAM 3 itself: 1008 px, CLIP's tokens, the official eps."""
    (tmp_path / "sam3.pt").touch()
    checkpoint = find_checkpoint(str(tmp_path / "sam3.pt"))
    config: Any = Sam3Config.from_dict(checkpoint.config)
    backbone = config.vision_config.backbone_config
    assert (checkpoint.input_side_px, checkpoint.name) == (1008, "sam3.pt")
    assert (backbone.layer_norm_eps, backbone.hidden_size, backbone.image_size) == (1e-5, 1024, 1008)
    assert checkpoint.tokenizer_file.parent == DEMO_FOLDER


def test_metas_own_folder_has_the_official_eps(tmp_path: Path) -> None:
    """The hub's config.json is that of the video model, and leaves the eps to transformers' default."""
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
def test_what_does_not_fit(
    known: State, folder: Path, edit: Callable[[State], object], parts: list[str]
) -> None:
    """A missing, unexpected, mis-shaped or mistyped tensor stops the load, which names it."""
    state = official_whole(known)
    edit(state)
    refuses(in_pt(state, folder), "does not fit the model", *parts)


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
def test_what_does_not_fit_in_transformers_layout(
    known: State,
    folder: Path,
    prefix: str,
    edit: Callable[[str], Callable[[State], object]],
    parts: list[str],
) -> None:
    """The transformers layouts are read as strictly."""
    state = prefixed(prefix, known)
    edit(prefix)(state)
    refuses(in_safetensors(state, folder), "does not fit the model", *parts)


def test_many_missing_are_counted(known: State, folder: Path) -> None:
    """Of many keys the first are listed and all are counted."""
    gone = sorted(name for name in known if "detr_encoder" in name)
    state = {name: tensor for name, tensor in known.items() if name not in gone}
    listed = ", ".join(gone[:8])
    refuses(in_pt(state, folder), f"{len(gone)} missing: {listed} and {len(gone) - 8} more")


@pytest.mark.parametrize(
    ("field", "number"), [("num_queries", "many"), ("hidden_size", -5), ("num_attention_heads", 0)]
)
def test_configuration_that_makes_no_model(known: State, folder: Path, field: str, number: object) -> None:
    """A config.json whose numbers make no sense is told as such, not as torn weights."""
    config = json.loads((folder / "config.json").read_text())
    config["detr_decoder_config"][field] = number
    (folder / "config.json").write_text(json.dumps(config))
    refuses(in_pt(known, folder), "sam3.pt makes no model: ")


class Evil:
    """A pickle that runs a command when it is read."""

    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self._command,)


@pytest.mark.parametrize("wrap", [lambda evil: evil, lambda evil: {"model": {}, "extra": evil}])
def test_pickle_that_wants_to_run_code(tmp_path: Path, wrap: Callable[[Evil], object]) -> None:
    """It is refused with the name of what it asks for, and nothing has run."""
    mark = tmp_path / "it-ran"
    path = in_pt(wrap(Evil(f"touch {mark}")), tmp_path)
    refuses(path, "is refused", "system", "can run code")
    assert not mark.exists()


def test_bare_pickle(tmp_path: Path) -> None:
    """A pickle without torch's zip around it is not read either, and nothing has run."""
    mark = tmp_path / "it-ran"
    (tmp_path / "sam3.pt").write_bytes(pickle.dumps(Evil(f"touch {mark}")))
    refuses(tmp_path / "sam3.pt", "is a bare pickle")
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*TorchScript:UserWarning")
def test_torchscript(tmp_path: Path) -> None:
    """A compiled program is told as such, without torch's advice to run it."""
    program: Any = torch.jit.script(torch.nn.Linear(2, 2))
    program.save(str(tmp_path / "sam3.pt"))
    refuses(tmp_path / "sam3.pt", "is a TorchScript program, not weights", "state_dict()")


OTHER_FILES = {
    b"": "is empty",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:99\n": "Git LFS pointer",
    b"<!DOCTYPE html><html>Access to model facebook/sam3 is restricted": "neither a torch nor a safetensors",
    b"PK\x03\x04 and then nothing": "cannot be read",
    b"\x08\x00\x00\x00\x00\x00\x00\x00{not json": "cannot be read",
}


@pytest.mark.parametrize("content", OTHER_FILES)
def test_files_that_are_no_weights(tmp_path: Path, content: bytes) -> None:
    """What was saved by mistake under the weights' name is told for what it is."""
    (tmp_path / "sam3.pt").write_bytes(content)
    refuses(tmp_path / "sam3.pt", OTHER_FILES[content])


@pytest.mark.parametrize("write", [in_pt, in_safetensors])
@pytest.mark.parametrize("part", [0.001, 0.5, 0.999])
def test_torn_files(known: State, folder: Path, write: Write, part: float) -> None:
    """A file that was cut off is refused with its path."""
    path = write(known, folder)
    os.truncate(path, int(path.stat().st_size * part))
    refuses(path, str(path), "cannot be read, it may be cut short")


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
    """A checkpoint of another model is refused by that model's name."""
    refuses(in_pt({"model": {key: torch.zeros(1) for key in keys}}, tmp_path), "cannot be served", sentence)


@pytest.mark.parametrize(
    "content", [[1, 2], {}, {"model": {}}, {"epoch": 3}, torch.zeros(3), {0: torch.zeros(3)}]
)
def test_pt_without_weights(tmp_path: Path, content: object) -> None:
    """A torch file that holds no weights is told as such."""
    refuses(in_pt(content, tmp_path), "holds no tensors")


def test_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for cuda without a GPU, it says so and what to do; it does not fall back in silence."""
    if torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceUnavailable, match="SAM3_DEVICE=cpu"):
        SAM3Predictor("demo", "cuda").load()


def refuses(path: Path, *parts: str) -> None:
    """Loading fails with one sentence that holds `parts`."""
    with pytest.raises(WeightsError) as refused:
        SAM3Predictor(str(path), "cpu").load()
    sentence = str(refused.value)
    assert [part for part in parts if part not in sentence] == []
    assert "\n" not in sentence
    assert len(sentence) < 1500


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
"""SAM 3 with few of its layers: about 0.4 GB."""

PEAK = """
import re, sys
import psutil, torch
import sam3_runner.predictor
from sam3_runner.checkpoint import Checkpoint, CLIP_TOKENIZER_FILE
from sam3_runner.weights import load_model
from pathlib import Path
torch.set_num_threads(1)
path = Path(sys.argv[1])
before = psutil.Process().memory_info().rss
model, _ = load_model(Checkpoint(path, CLIP_TOKENIZER_FILE, CONFIG, "middle"), torch.device("cpu"))
sum(float(parameter.sum()) for parameter in model.parameters())  # reads every page
# Not ru_maxrss, which a child inherits from its parent.
peak_kb = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]
print(int(peak_kb) * 1024 - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize("write", [lambda state, to: in_pt(official_whole(state), to), in_safetensors])
def test_host_memory(tmp_path: Path, write: Write) -> None:
    """Loading takes no more than 1.3 times the file, all of its pages read."""
    model: Any = Sam3Model(Sam3Config.from_dict(MIDDLE))
    path = write(model.state_dict(), tmp_path)
    size_bytes = path.stat().st_size
    del model
    code = PEAK.replace("CONFIG", repr(MIDDLE))
    printed = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    ).stdout
    assert size_bytes > 200e6
    assert int(printed) < 1.3 * size_bytes
