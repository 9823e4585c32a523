"""The commands of sam3 that run the server's code, and what they say where it is missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from commands.local_server import ROOT, clean_environment
from sam3_client import Client
from sam3_client.command_line import main
from sam3_client.command_line.app import app
from tests.drawn import scene

if TYPE_CHECKING:
    from pathlib import Path

    from commands.local_server import LocalServer

KEY = "0123456789abcdef"
SECRET = "hush-hush-0123456789abcdef"
NEED_SERVER = {
    "serve": [],
    "demo": [],
    "weights": [],
    "doctor": [],
    "benchmark": [],
    "predict": ["picture.png", "--prompts", "star", "--local", "--out", "out"],
}
RUN_EACH = f"""
from typer.testing import CliRunner
from sam3_client.command_line.app import app
for name, options in {NEED_SERVER}.items():
    ended = CliRunner().invoke(app, [name, *options])
    print(ended.exit_code, ended.stderr.strip())
"""


def sam3(data_dir: Path, *arguments: str, **settings: str) -> tuple[int, str]:
    """The exit status of `sam3`, and all that it printed."""
    ended = subprocess.run(
        [sys.executable, "-m", "sam3_client", *arguments],
        cwd=ROOT,
        env=clean_environment(data_dir, KEY) | {"COLUMNS": "300"} | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Traceback" not in ended.stdout
    return ended.returncode, ended.stdout


@pytest.mark.slow
def test_serve_starts_the_server(tmp_path: Path) -> None:
    """`sam3 serve` becomes the server, with its port and with the demo where nothing names weights."""
    status, printed = sam3(tmp_path, "serve", "--port", "70000", SAM3_WEIGHTS_PATH="", API_SECRET_KEY="")
    assert status != 0
    assert "cannot start: --port (or BENTOML_PORT) must be at most 65535, not 70000" in printed


def test_doctor_prints_a_table(tmp_path: Path) -> None:
    """`sam3 doctor` shows each wrong setting with its mend and no secret, and ends with 1."""
    wrong = {
        "R2_ACCESS_KEY_ID": SECRET,
        "API_WORKERS": SECRET,
        "SUPABASE_URL": "http://<PROJECT>.supabase.co",
        "SUPABASE_SERVICE_KEY": f"sb_secret_{SECRET}",
    }
    status, printed = sam3(tmp_path, "doctor", "--port", "0", **wrong)
    assert status == 1
    assert SECRET not in printed
    for words in ("API_WORKERS must be a whole number", "still has the placeholder <PROJECT>", "R2_ENDPOINT"):
        assert words in printed


def test_commands_run_the_programs_of_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmark has the options of its program, and weights the answer of its own for the demo."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sam3"])
    monkeypatch.setenv("SAM3_WEIGHTS_PATH", "demo")
    monkeypatch.setenv("ENV_FILE", os.devnull)
    ended = CliRunner().invoke(app, ["benchmark", "--help"])
    assert ended.exit_code == 0
    assert ended.stdout.startswith("usage: sam3 benchmark")
    assert "--rounds" in ended.stdout
    ended = CliRunner().invoke(app, ["weights"])
    assert ended.exit_code == 1
    assert "demo is embedded: there is nothing to download" in ended.output


def test_client_alone_says_what_is_missing(tmp_path: Path) -> None:
    """Where only the client is installed, the commands that need more say so in one sentence."""
    shutil.copytree(ROOT / "sam3_client", tmp_path / "sam3_client")
    scene(1).image.save(tmp_path / "picture.png")
    command = [sys.executable, "-c", RUN_EACH]
    ended = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=True)
    lines = ended.stdout.splitlines()
    assert len(lines) == len(NEED_SERVER)
    for line in lines:
        assert line.startswith("2 sam3: `sam3 ")
        assert "only its client is installed here: clone the server's repository" in line


def test_client_without_the_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without typer the command names the extra."""
    monkeypatch.delitem(sys.modules, "sam3_client.command_line.app")
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit, match="pip install typer rich filelock"):
        main()


@pytest.mark.server
def test_local_model_finds_what_the_server_finds(server: LocalServer, tmp_path: Path) -> None:
    """`--local` gives the same instances as a server, with options too; a broken file fails alone."""
    picture = tmp_path / "picture.png"
    scene(300).image.save(picture)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    options: dict[str, Any] = {"score_threshold": 0.1, "min_area": 50, "max_instances": 1}
    flags = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    prompts = ["triangle", "yellow shape"]
    local = ["--local", "--weights", "demo", "--format", "json", "--out", str(tmp_path / "out")]
    ended = CliRunner().invoke(app, ["predict", str(tmp_path), "--prompts", *prompts, *flags, *local])
    assert ended.exit_code == 1
    assert "failed: broken.png" in ended.stderr
    found = json.loads((tmp_path / "out" / "picture.png.result.json").read_text())
    with Client(server.url, server.api_key) as client:
        expected = client.segment(picture, prompts, **options)
    assert [each["label"] for each in found["instances"]] == expected.labels == prompts
    assert [each["score"] for each in found["instances"]] == pytest.approx(expected.scores.tolist(), abs=1e-3)
    assert [each["area"] for each in found["instances"]] == pytest.approx(
        [each.area for each in expected.instances], rel=0.01
    )
    assert found["presence"] == pytest.approx(expected.presence, abs=1e-3)
