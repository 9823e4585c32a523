"""The command sam3 as a process, against the real server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from commands.local_server import ROOT
from sam3_client.command_line.formats import FORMATS
from tests.drawn import Scene, iou, scene
from tests.services.faults import FaultProxy, fault_proxy
from tests.services.processes import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from commands.local_server import LocalServer

pytestmark = pytest.mark.server

NOBODY = "http://127.0.0.1:9"
SEGMENT = "/v1/images/segmentations"
SEEDS = (300, 301, 302)
BROKEN = "broken[b]\x1b.jpg"
"""A name that would change a terminal's colours."""


@dataclass(frozen=True)
class Command:
    """Runs the command against one server, whose requests it sees."""

    proxy: FaultProxy
    key: str

    def start(self, *arguments: object, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "sam3_client", *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | {"SAM3_URL": self.proxy.url, "SAM3_API_KEY": self.key} | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Where the tests run in the background, Ctrl-C is ignored, and so it would be here.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - one call
        )

    def __call__(self, *arguments: object, **variables: str) -> tuple[int, str, str]:
        """Exit code, stdout and stderr."""
        process = self.start(*arguments, **variables)
        stdout, stderr = process.communicate(timeout=120)
        assert "Traceback" not in stderr
        assert self.key not in stdout + stderr
        return process.returncode, stdout, stderr

    @property
    def sent(self) -> int:
        """How many pictures were sent so far, once for each prompt."""
        return sum(request.path == SEGMENT for request in self.proxy.requests)


@pytest.fixture
def sam3(server: LocalServer) -> Iterator[Command]:
    with fault_proxy(server.url) as proxy:
        yield Command(proxy, server.api_key)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [scene(seed) for seed in SEEDS]


@pytest.fixture
def folder(tmp_path: Path, scenes: list[Scene]) -> Path:
    """a.jpg and a.png, which differ; a picture in a subfolder; a broken one, a hidden one, and a text."""
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    for drawn, name in zip(scenes, ("a.jpg", "a.png", "sub/b.webp"), strict=True):
        drawn.image.save(folder / name, quality=95)
    (folder / BROKEN).write_bytes(b"no picture")
    (folder / ".hidden.jpg").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("no picture")
    return folder


def pixels(path: Path) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(path))


def test_folder_with_a_broken_picture(
    sam3: Command, folder: Path, scenes: list[Scene], tmp_path: Path
) -> None:
    """Every other picture has its files; the broken one is a row of the summary, and is tried again alone."""
    prompts = ["circle", "red shape", "star"]
    arguments = [folder, "--prompts", *prompts, "--out", out := tmp_path / "out"]
    status, stdout, stderr = sam3("predict", *arguments, "--format", ",".join(FORMATS))
    assert status == 1
    assert "failed: broken[b]?.jpg: is no picture" in stderr
    assert "4 of 4 pictures" in stderr
    assert "\x1b" not in stdout + stderr
    assert "broken[b]?.jpg" in stdout
    assert "3 of 4 pictures done" in stdout
    names = ["a.jpg", "a.png", "sub/b.webp"]
    coco = json.loads((out / "coco.json").read_text())
    assert [image["file_name"] for image in coco["images"]] == names
    assert [category["name"] for category in coco["categories"]] == prompts
    assert [each["id"] for each in coco["annotations"]] == list(range(1, len(coco["annotations"]) + 1))
    for image_id, (name, drawn) in enumerate(zip(names, scenes, strict=True), 1):
        found = json.loads((out / f"{name}.result.json").read_text())["instances"]
        assert sorted(each["label"] for each in found) == sorted(
            prompt for prompt in prompts for thing in drawn.named(prompt) if thing.counted
        )
        assert sum(each["image_id"] == image_id for each in coco["annotations"]) == len(found)
        numbers, union = pixels(out / f"{name}.label_map.png"), pixels(out / f"{name}.mask.png")
        assert ((numbers > 0) == (union == 255)).all()
        for each in found:
            mask = pixels(out / f"{name}.instances/{each['number']:03}.png") == 255
            assert mask.sum() == each["area"]
            assert max(iou(mask, thing.mask) for thing in drawn.named(each["label"])) > 0.8
        picture = np.asarray(drawn.image).astype(int)
        changed = np.abs(pixels(out / f"{name}.overlay.jpg") - picture).max(axis=2) > 15
        assert not found or changed[union == 255].mean() > 0.8
    assert not [path for path in out.rglob("*") if "broken" in path.name or path.name.endswith(".unfinished")]

    scenes[0].image.save(folder / BROKEN)
    before = sam3.sent
    status, stdout, _ = sam3("predict", *arguments, "--format", ",".join(FORMATS))
    assert (status, sam3.sent - before) == (0, len(prompts))
    assert "1 of 4 pictures done" in stdout
    assert "3 were done before" in stdout
    assert len(json.loads((out / "coco.json").read_text())["images"]) == 4


def test_other_settings_are_refused(sam3: Command, folder: Path, tmp_path: Path) -> None:
    """A folder keeps the outputs of one run's settings, unless it is to be overwritten; then none is left."""
    out = tmp_path / "out"
    picture = ["predict", folder / "a.jpg", "--prompts", "star", "--out", out]
    assert sam3(*picture)[0] == 0
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.suffix != ".json"}
    other = [*picture, "--min-area", "5", "--format", "mask"]
    status, _, stderr = sam3(*other)
    assert status == 2
    assert "other settings (formats, min_area)" in stderr
    assert "--overwrite" in stderr
    assert all(path.stat().st_mtime_ns == time for path, time in written.items() if path.is_file())
    assert sam3(*other, "--overwrite")[0] == 0
    assert {path.name for path in out.glob("*.*")} >= {"a.jpg.mask.png"}
    assert not (out / "a.jpg.overlay.jpg").exists()
    (mine := tmp_path / "mine").mkdir()
    (mine / "letter.txt").write_text("mine")
    status, _, stderr = sam3("predict", folder, "--prompts", "star", "--out", mine)
    assert (status, "holds no run" in stderr) == (2, True)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_run_goes_on(
    sam3: Command, scenes: list[Scene], tmp_path: Path, end: signal.Signals
) -> None:
    """Pictures that were done before Ctrl-C, or a kill, are not sent again; the others are done next time."""
    for number in range(6):
        scenes[number % 3].image.save(tmp_path / f"{number}.png")
    pattern, out = str(tmp_path / "*.png"), tmp_path / "out"
    arguments = ["predict", pattern, "--prompts", "star", "--out", out, "--jobs", "1"]
    sam3.proxy.hang_next(when=lambda seen: seen.path == SEGMENT and sam3.sent == 4)
    process = sam3.start(*arguments)
    wait_until(lambda: sam3.sent == 4, 60)
    process.send_signal(end)
    stdout, stderr = process.communicate(timeout=60)
    assert len(list(out.glob("*.overlay.jpg"))) == 3
    if end == signal.SIGINT:
        assert process.returncode == 130
        assert "sam3: interrupted\nsam3: what is done is kept" in stderr
        assert "3 of 6 pictures done" in stdout
        assert len(json.loads((out / "coco.json").read_text())["images"]) == 3
    sam3.proxy.heal()
    status, stdout, stderr = sam3(*arguments)
    assert (status, sam3.sent) == (0, 4 + 3)
    assert "3 of 6 pictures are done already" in stderr
    assert "3 were done before" in stdout
    assert len(list(out.glob("*.overlay.jpg"))) == 6
    assert sam3(*arguments, SAM3_URL=NOBODY)[0] == 0, "nothing is left that needs a server"


def test_server_that_goes_away(sam3: Command, folder: Path, tmp_path: Path) -> None:
    """A server that no longer answers ends the run with its sentence; what was done is kept."""
    out = tmp_path / "out"
    arguments = ["predict", folder, "--prompts", "star", "--out", out, "--jobs", "1", "--max-wait", "0.5"]
    sam3.proxy.cut_next(1000, when=lambda seen: seen.path == SEGMENT and sam3.sent > 1)
    status, stdout, stderr = sam3(*arguments)
    assert status == 3
    assert "the connection to http://127.0.0.1:" in stderr
    assert "what is done is kept" in stderr
    assert "1 of 4 pictures done" in stdout
    sam3.proxy.heal()
    assert sam3(*arguments)[0] == 1, "the broken picture"
    assert len(list(out.rglob("*.overlay.jpg"))) == 3


@dataclass(frozen=True)
class Refusal:
    """How the command ends for some arguments, whose files are in the test's folder."""

    status: int
    sentence: str
    arguments: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict)


STARS = ("pictures", "--prompts", "star")
REFUSALS = [
    Refusal(2, "none is not there: name a folder", ("none", "--prompts", "star")),
    Refusal(2, "no picture in", ("empty", "--prompts", "star")),
    Refusal(2, "matches no file", ("pictures/*.gif", "--prompts", "star")),
    Refusal(2, "give --prompts, or --box", ("pictures",)),
    Refusal(2, "name the pictures first", ("--prompts", "star", "pictures")),
    Refusal(2, "--format knows json, mask", (*STARS, "--format", "gif")),
    Refusal(2, "as in 10,20,110,90, not 1,2", ("pictures", "--box", "1,2")),
    Refusal(2, "prompt: has 62 tokens", ("pictures/a.jpg", "--prompts", "a " * 60)),
    Refusal(3, "the server refuses the key: give --key", STARS, {"SAM3_API_KEY": "k"}),
    Refusal(3, "start a server with `sam3 serve`", STARS, {"SAM3_URL": NOBODY}),
    Refusal(2, "correct --url or SAM3_URL", STARS, {"SAM3_URL": "localhost"}),
]


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.sentence)
def test_what_cannot_begin(sam3: Command, folder: Path, tmp_path: Path, refusal: Refusal) -> None:
    """What no picture can be done with ends the command with one sentence, and writes no output."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("")
    first, *options = refusal.arguments
    pictures = first if first.startswith("-") else str(folder.parent / first)
    status, stdout, stderr = sam3(
        "predict", pictures, *options, "--out", tmp_path / "out", "--max-wait", "0", **refusal.variables
    )
    assert status == refusal.status
    assert stderr.startswith("sam3: ")
    assert refusal.sentence in stderr
    assert stderr.count("\n") == 1
    assert stdout == ""
    assert not list((tmp_path / "out").glob("[!.]*"))
