"""The checks before the first process starts, and the errors that stop it."""

from __future__ import annotations

import asyncio
import io
import os
import shutil
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save

import startup
from processes import data_lock
from sam3_runner.weights.checkpoint import DEMO_FOLDER
from settings import load_settings

if TYPE_CHECKING:
    from collections.abc import Callable

KEY = "0123456789abcdef0123456789abcdef"
SECRET = "hush-hush-0123456789abcdef"

R2 = {
    "R2_ENDPOINT": "https://acc0.r2.cloudflarestorage.com",
    "R2_ACCESS_KEY_ID": SECRET,
    "R2_SECRET_ACCESS_KEY": SECRET,
}

REFUSED: dict[str, tuple[dict[str, str | None], list[str]]] = {
    "no key": ({"API_SECRET_KEY": None, "SAM3_WEIGHTS_PATH": str(DEMO_FOLDER)}, ["API_SECRET_KEY"]),
    "short key": ({"API_SECRET_KEY": f"{SECRET},short"}, ["API_SECRET_KEY", "16"]),
    "half of R2": ({**R2, "R2_ENDPOINT": None}, ["R2_ENDPOINT missing", "R2_SECRET_ACCESS_KEY"]),
    "placeholder": (
        {**R2, "R2_ENDPOINT": "https://<ACCOUNT>.r2.cloudflarestorage.com"},
        ["R2_ENDPOINT still has the placeholder <ACCOUNT>"],
    ),
    "half of Supabase": ({"SUPABASE_SERVICE_KEY": SECRET}, ["SUPABASE_URL missing", "SUPABASE_SERVICE_KEY"]),
    "slip": ({"R2_ENDPONT": SECRET}, ["R2_ENDPONT", "did you mean R2_ENDPOINT?"]),
    "bad number": (
        {"API_WORKERS": "two", "HF_TOKEN": SECRET},
        ["API_WORKERS must be a whole number from 1 to 64, not 'two'"],
    ),
    "zero workers": ({"API_WORKERS": "0"}, ["API_WORKERS must be a whole number from 1 to 64, not '0'"]),
    "bad origin": ({"ALLOWED_ORIGINS": "*"}, ["ALLOWED_ORIGINS", "https://app.example.com"]),
    "no weights": ({"SAM3_WEIGHTS_PATH": "no/such/folder"}, ["no/such/folder", "SAM3_WEIGHTS_PATH=demo"]),
    "embedded in production": (
        {"APP_ENV": "production", "LOG_FORMAT": "text"},
        ["R2_ENDPOINT", "APP_ENV=production", "EMBEDDED_PARTS"],
    ),
}
"""Changes to the environment of the embedded demo, and parts of the error message."""


@pytest.fixture(autouse=True)
def _demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The environment of the embedded demo. Variables and locks are reset after the test."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(data_lock, "_held", [])
    monkeypatch.chdir(tmp_path)
    demo = {"SAM3_WEIGHTS_PATH": "demo", "SAM3_DEVICE": "cpu", "API_SECRET_KEY": KEY}
    os.environ.update(demo, DATA_DIR=str(tmp_path / "data"))


def refusal() -> str:
    """The message of a refused start."""
    with pytest.raises(SystemExit) as ended:
        startup.prepare_deployment([Path(os.environ["DATA_DIR"], "runner_0.pid")], "sam3_runner_")
    sentence = str(ended.value.code)
    assert sentence.startswith("cannot start: ")
    assert "\n" not in sentence
    assert SECRET not in sentence
    assert KEY not in sentence
    return sentence


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_setting_stops_the_start(case: str) -> None:
    """A wrong setting ends the start with one sentence that names it and contains no secret."""
    changes, parts = REFUSED[case]
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    sentence = refusal()
    for part in parts:
        assert part in sentence


def in_utf16(tmp_path: Path) -> str:
    path = tmp_path / "my.env"
    path.write_text("API_WORKERS=1\n", encoding="utf-16")
    os.environ["ENV_FILE"] = str(path)
    return f"ENV_FILE {path} is in UTF-16"


def file_in_the_way(tmp_path: Path) -> str:
    path = tmp_path / "data" / "storage"
    path.parent.mkdir()
    path.write_text("a file")
    return f"DATA_DIR: {path} is not a folder: move it away"


def no_tokenizer(tmp_path: Path) -> str:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(DEMO_FOLDER / name, folder)
    os.environ["SAM3_WEIGHTS_PATH"] = str(folder)
    return f"SAM3_WEIGHTS_PATH: {folder} holds no tokenizer.json"


@pytest.mark.parametrize("prepare", [in_utf16, file_in_the_way, no_tokenizer])
def test_file_that_cannot_be_used_stops_the_start(tmp_path: Path, prepare: Callable[[Path], str]) -> None:
    """The error for a file that cannot be used names the variable and the path."""
    expected = prepare(tmp_path)
    assert refusal().startswith(f"cannot start: {expected}")


def in_zip(name: str) -> bytes:
    """A zip file with one part."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr(name, "<xml/>")
    return made.getvalue()


def in_torch_file() -> bytes:
    """A tensor that torch saved."""
    made = io.BytesIO()
    torch.save({"x": torch.zeros(9)}, made)
    return made.getvalue()


WHOLE = DEMO_FOLDER / "model.safetensors"
NO_WEIGHTS: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "is empty"),
    "web page": (
        lambda: b"<!DOCTYPE html><title>Sign in</title>",
        "is neither a torch nor a safetensors file",
    ),
    "pointer": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3450062241\n",
        "is a Git LFS pointer, not the weights: `git lfs pull` fetches them",
    ),
    "torn safetensors": (
        lambda: WHOLE.read_bytes()[: WHOLE.stat().st_size // 2],
        "cannot be read, it may be cut short: ",
    ),
    "torn zip": (lambda: in_torch_file()[:-100], "cannot be read, it may be cut short: "),
    "another zip": (lambda: in_zip("word/document.xml"), "is a zip file without weights in it"),
    "SAM 2": (
        lambda: save({"memory_attention.x": torch.zeros(1)}),
        "cannot be served: it is a SAM 2 checkpoint: this server serves SAM 3",
    ),
}
"""Contents of files that are recognisably not SAM 3 weights, and the fault."""


@pytest.mark.parametrize("kind", NO_WEIGHTS)
def test_other_file_than_weights_stops_the_start(tmp_path: Path, kind: str) -> None:
    """Faults in the first bytes or the index are reported."""
    content, fault = NO_WEIGHTS[kind]
    path = tmp_path / "weights.pt"
    path.write_bytes(content())
    os.environ["SAM3_WEIGHTS_PATH"] = str(path)
    assert refusal().startswith(f"cannot start: SAM3_WEIGHTS_PATH: {path} {fault}")


def test_broken_tokenizer_stops_the_start(tmp_path: Path) -> None:
    """An invalid tokenizer is reported; it would end every process."""
    folder = Path(shutil.copytree(DEMO_FOLDER, tmp_path / "sam3"))
    (folder / "tokenizer.json").write_text("{}")
    os.environ["SAM3_WEIGHTS_PATH"] = str(folder)
    path = folder / "tokenizer.json"
    assert refusal().startswith(f"cannot start: SAM3_WEIGHTS_PATH: {path} is not a tokenizer: ")


def test_damaged_file_of_attempts_does_not_stop_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A damaged file of attempts is moved aside and logged, and the server starts with an empty one."""
    file = tmp_path / "data" / "outbox.sqlite"
    file.parent.mkdir()
    file.write_bytes(b"no database" * 100)
    asyncio.run(startup._prepare_stores(load_settings()))
    assert any(f"{file.name} is damaged" in record.getMessage() for record in caplog.records)
    [aside] = file.parent.glob("outbox.sqlite.damaged-*")
    assert aside.read_bytes() == b"no database" * 100
    assert file.read_bytes().startswith(b"SQLite format 3")
