"""`sam3 bulk` over a bucket on a local Ray: killed, started again, over bad pictures and failing stores."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import zlib
from itertools import count
from typing import TYPE_CHECKING
from uuid import uuid4

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image
from pycocotools.coco import COCO

from bulk.samples import results_of
from commands.local_server import reserved_ports
from sam3_runner import SAM3Predictor
from tests.bulk.runs import PROMPTS, ROOT, BulkRuns, picture
from tests.services.faults import fault_proxy
from tests.services.processes import wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.services.objects import S3Service

pytestmark = [
    pytest.mark.services,
    pytest.mark.slow,
    # Ray's start fails where one of its processes takes longer than 15 s to begin.
    pytest.mark.alone,
    # pycocotools' decode.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

GOOD = 288
EXPIRED = b"<?xml version='1.0'?><Error><Code>ExpiredToken</Code><Message>expired</Message></Error>"


@pytest.fixture
def runs(seaweedfs: S3Service, tmp_path: Path) -> BulkRuns:
    return BulkRuns(seaweedfs, f"bulk-{uuid4()}", seaweedfs.endpoint, tmp_path)


def _huge_png() -> bytes:
    """A PNG of 60,000 x 60,000 px in a few bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4) + kind + body + zlib.crc32(kind + body).to_bytes(4)

    head = (60_000).to_bytes(4) * 2 + bytes([8, 0, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


def _put_special_pictures(runs: BulkRuns) -> dict[str, str | None]:
    """Pictures with unusual names, and objects that are none; the error code of each by its URI."""
    seeds = count(10_000)
    long = ("n" * 199 + "/") * 4 + "n" * 140  # 1,000 characters with what stands before it
    good = ["with space.jpg", "über/日本語 🎉.JPG", "100%25 & ?#=+.jpeg", long, "folder/no-ending"]
    bad = {
        "bad/text.jpg": b"this is no picture",
        "bad/empty.png": b"",
        "bad/truncated.jpg": picture(1)[:-900],
        "bad/corrupt.jpg": picture(2)[:200] + bytes(500) + picture(2)[700:],
        "bad/huge.png": _huge_png(),
        "bad/<script>alert(1)</script>.png": b"\x89PNG\r\n\x1a\n" + bytes(100),
    }
    for name in good:
        runs.put(name, picture(next(seeds)))
    for name, data in bad.items():
        runs.put(name, data)
    runs.put("same-content.jpg", picture(0))
    runs.store.put(f"{runs.prefix}/in/notes.txt", b"is not listed")
    return {f"{runs.uri}/in/{name}": "UNSUPPORTED_IMAGE" for name in bad}


def test_killed_run_goes_on_and_does_nothing_twice(runs: BulkRuns) -> None:
    """300 pictures; the model's process is killed, then the command; the second command ends the run."""
    runs.put_drawn(GOOD)
    bad = _put_special_pictures(runs)
    with reserved_ports(1) as [port], runs.command("--metrics-port", str(port)) as first:
        runs.wait_for_rows(3, first)
        [model] = first.workers("Segment")
        model.kill()
        runs.wait_for_rows(len(runs.stored("rows/")) + 3, first)
        metrics = httpx.get(f"http://127.0.0.1:{port}/metrics").text
        assert f"sam3_bulk_pictures_planned {len(runs.pictures)}.0" in metrics
        assert re.search(r'sam3_bulk_pictures_total\{outcome="done"\} [1-9]', metrics)
        first.kill()
    before = runs.stored()
    assert len(before) > 6
    done = sum(len(row.instances) >= 0 for row in runs.rows())

    with runs.command() as second:
        assert second.exit_code() == 1, second.output()
        assert f"{done} of {len(runs.pictures)} pictures are done already" in second.output()
        assert "1 object has another ending" not in second.output()  # the list was kept

    runs.check_each_picture_once()
    after = runs.stored()
    assert {name: after[name] for name in before} == before
    rows = {row.image: row for row in runs.rows()}
    assert {image: row.error_code for image, row in rows.items() if row.error_code} == bad
    assert all(rows[image].status == "done" for image in runs.pictures if image not in bad)
    same = [rows[f"{runs.uri}/in/{name}"] for name in ("00000.jpg", "same-content.jpg")]
    assert same[0].key == same[1].key
    assert same[0].instances == same[1].instances

    with runs.command() as third:
        assert third.exit_code() == 1
        assert f"all {len(runs.pictures)} pictures were done before" in third.output()
        assert "starting Ray" not in third.output()
    assert runs.stored() == after
    _check_results(runs)


def _check_results(runs: BulkRuns) -> None:
    """COCO, summary and report hold what the rows hold, and the rows what the predictor finds."""
    rows = {row.image: row for row in runs.rows()}
    document = json.loads(runs.read("coco.json"))
    assert len(document["images"]) == sum(row.status == "done" for row in rows.values())
    assert len(document["annotations"]) == sum(len(row.instances) for row in rows.values())
    summary = json.loads(runs.read("summary.json"))
    assert summary["pictures"]["all"] == len(runs.pictures)
    assert b"<script>alert" not in runs.read("report.html")
    coco = COCO()
    coco.dataset = document
    coco.createIndex()

    predictor = SAM3Predictor("demo", "cpu")
    predictor.load()
    found_any = 0
    for image in [f"{runs.uri}/in/{seed:05}.jpg" for seed in (0, 7, 100, 287)]:
        expected = predictor.predict_batch(runs.pictures[image], PROMPTS)
        row = rows[image]
        for prompt, result, wanted in zip(row.prompts, results_of(row), expected, strict=True):
            scores = [each.score for each in wanted.instances]
            assert [each.score for each in result.instances] == pytest.approx(scores, abs=2e-3)
            assert np.mean(result.mask_array() != wanted.mask_array()) < 1e-3
            assert (prompt.mask is None) == (not scores)
            if prompt.mask is not None:
                found_any += 1
                stored = np.asarray(Image.open(io.BytesIO(runs.read(prompt.mask))))
                assert np.array_equal(stored, result.mask_array() * np.uint8(255))
    assert found_any


def test_run_goes_on_after_each_way_to_end(seaweedfs: S3Service, tmp_path: Path) -> None:
    """Ray's end, refused credentials, Ctrl-C and a busy store: a sentence, an exit code, and no error row."""
    with fault_proxy(seaweedfs.endpoint) as proxy:
        runs = BulkRuns(seaweedfs, f"bulk-{uuid4()}", proxy.url, tmp_path)
        runs.put_drawn(108)
        with runs.command("--no-masks") as command:
            runs.wait_for_rows(1, command)
            command.kill_ray()
            assert command.exit_code() == 3
        assert re.search(r"\nsam3: Ray has ended.*; the same command goes on from here\n$", command.output())

        with runs.command("--no-masks") as command:
            runs.wait_for_rows(len(runs.stored("rows/")) + 1, command)
            proxy.fail_next(10**6, status=400, body=EXPIRED, headers={"Content-Type": "application/xml"})
            assert command.exit_code() == 3
        proxy.heal()
        assert re.search(r"\nsam3: the credentials for s3://\S+ have expired .*\n$", command.output())
        assert "Traceback" not in command.output()

        with runs.command("--no-masks") as command:
            runs.wait_for_rows(len(runs.stored("rows/")) + 1, command)
            command.interrupt()
            assert command.exit_code() == 130
        assert command.output().endswith("sam3: interrupted; the same command goes on from here\n")
        assert 0 < len(runs.rows()) < 108

        proxy.fail_next(4, status=429, when=lambda seen: "/in/" in seen.path)
        proxy.fail_next(2, status=500, when=lambda seen: seen.method == "PUT")
        with runs.command("--no-masks") as command:
            assert command.exit_code() == 0, command.output()
    runs.check_each_picture_once()
    assert all(row.status == "done" for row in runs.rows())
    assert not runs.stored("masks/")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_stop_at_the_start_is_a_sentence(tmp_path: Path, how: signal.Signals) -> None:
    """A terminal and systemd send it to both processes, while the second one still loads its modules."""
    (tmp_path / "in").mkdir()
    command = [
        sys.executable,
        "-m",
        "sam3_client",
        "bulk",
        "--images",
        "in",
        "--prompts",
        "star",
        "--out",
        "o",
    ]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as started:
        wait_until(lambda: any("spawn_main" in " ".join(each.cmdline()) for each in _children(started)), 60)
        for pid in [*(each.pid for each in _children(started)), started.pid]:
            os.kill(pid, how)
        output = started.communicate(timeout=60)[1]
    assert output == "sam3: interrupted; the same command goes on from here\n"
    assert started.returncode == 130


def _children(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"--images": "nowhere"}, "nowhere cannot be found"),
        ({"--images": "s3://"}, "names no bucket"),
        ({"--out": os.fsdecode(b"caf\xe9")}, "is not UTF-8: rename it"),
        ({"--prompts": " "}, "a prompt of --prompts is empty"),
        ({"--prompts": "circle " * 40}, "tokens"),
        ({"--weights": "no/such/weights.pt"}, "no weights at"),
        ({"--shard-pictures": "1000"}, "it must be 1 to 256"),
        ({}, "no picture in"),
    ],
)
def test_wrong_usage_is_a_sentence(tmp_path: Path, options: dict[str, str], sentence: str) -> None:
    """Exit code 2, before Ray starts."""
    (tmp_path / "empty").mkdir()
    given = {"--images": "empty", "--prompts": "star", "--out": "out", "--weights": "demo"} | options
    ended = subprocess.run(
        [sys.executable, "-m", "sam3_client", "bulk", *[text for pair in given.items() for text in pair]],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    assert sentence in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "starting Ray" not in ended.stderr
