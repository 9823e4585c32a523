"""Downloads of the weights: complete, once, resumed after an interruption; errors say what to do."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from commands.local_server import reserved_ports
from tests.services.hub import COMMIT, REPO, TOKEN, hub
from tests.services.processes import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.services.hub import Hub

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
CHUNK_BYTES = 10 << 20
"""Size of one write by huggingface_hub; a broken connection loses at most this much."""

WEIGHTS = os.urandom(4 * CHUNK_BYTES + 12_345)
SMALL_FILES = {"config.json": b'{"model_type": "sam3_video"}', "tokenizer.json": b"{}"}
TIMEOUT_S = 120.0

IN_A_PROCESS = """
import json, logging, sys
from pathlib import Path
from sam3_runner import WeightsError
from sam3_runner.weights.checkpoint import HubSource
from sam3_runner.weights.download import download

logging.basicConfig(level=logging.DEBUG)
target, repo, revision, token = sys.argv[1:]
source = HubSource(repo, revision, token or None)
progress = []
try:
    download(Path(target), source, lambda done, total: progress.append((done, total)))
except WeightsError as error:
    sys.exit(f"WeightsError: {error}")
print(json.dumps({"progress": progress, "source": repr(source), "torch": "torch" in sys.modules}))
"""


@pytest.fixture
def served() -> Iterator[Hub]:
    """A hub with every file that a download may request."""
    with hub({"sam3.pt": WEIGHTS, "model.safetensors": WEIGHTS[::-1], **SMALL_FILES}) as running:
        yield running


def start(
    url: str,
    target: Path,
    *,
    token: str = TOKEN,
    repo: str = REPO,
    revision: str = "main",
    stderr: int = subprocess.STDOUT,
    limits: str = "",
    **variables: str,
) -> subprocess.Popen[str]:
    """Start the operator's command in a separate process, since the hub's address is read at import."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(target.parent),
        "ENV_FILE": os.devnull,
        "HF_ENDPOINT": url,
        "HF_TOKEN": token,
        "SAM3_HF_REPO": repo,
        "SAM3_HF_REVISION": revision,
        "SAM3_WEIGHTS_PATH": str(target),
        **variables,
    }
    command = ["sh", "-c", f'{limits} exec "$0" -m commands.download_weights', sys.executable]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=stderr
    )


def end(process: subprocess.Popen[str]) -> str:
    """The output of a process that must succeed."""
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, output
    assert TOKEN not in output
    return output


def error_message(process: subprocess.Popen[str]) -> str:
    """The error message of a process that must fail."""
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    assert "Traceback" not in output
    assert TOKEN not in output
    return output.splitlines()[-1]


def in_a_process(url: str, target: Path, token: str) -> subprocess.CompletedProcess[str]:
    """Call `download` in a separate process."""
    return subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS, str(target), REPO, "main", token],
        cwd=ROOT,
        env={"HF_ENDPOINT": url, "HOME": str(target.parent), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def parts(folder: Path) -> list[Path]:
    """Partial files."""
    return list(folder.glob(".*.part"))


@pytest.mark.parametrize(
    ("name", "on_hub"), [("sam3.pt", "sam3.pt"), ("my.safetensors", "model.safetensors")]
)
def test_file_is_written_to_its_path(served: Hub, tmp_path: Path, name: str, on_hub: str) -> None:
    """A file is written unchanged to the requested path; its commit and sha256 are in the log."""
    target = tmp_path / "weights" / name
    output = end(start(served.url, target))
    assert target.read_bytes() == served.files[on_hub]
    assert COMMIT in output
    assert hashlib.sha256(served.files[on_hub]).hexdigest() in output
    assert not parts(target.parent)


def test_folder_is_complete(served: Hub, tmp_path: Path) -> None:
    """A path without a suffix becomes a transformers folder, with all files of one commit."""
    target = tmp_path / "sam3"
    end(start(served.url, target))
    names = ("config.json", "tokenizer.json", "model.safetensors")
    assert {name: (target / name).read_bytes() for name in names} == {
        name: served.files[name] for name in names
    }
    requested = [seen.path.split("/")[-2:] for seen in served.requests if seen.method == "HEAD"]
    assert requested == [["main", names[0]], [COMMIT, names[1]], [COMMIT, names[2]]]


def test_complete_target_sends_no_request(tmp_path: Path) -> None:
    """An existing file is not changed, and no network is needed."""
    (tmp_path / "sam3.pt").write_bytes(b"mine")
    assert "is complete" in end(start("http://127.0.0.1:9", tmp_path / "sam3.pt"))
    assert (tmp_path / "sam3.pt").read_bytes() == b"mine"


def test_killed_download_is_resumed(served: Hub, tmp_path: Path) -> None:
    """After a kill there is no file at the path; the next start requests only the rest, with Range."""
    target = tmp_path / "sam3"
    served.hold_after_bytes = 2 * CHUNK_BYTES + 1
    first = start(served.url, target)
    wait_until(lambda: any(part.stat().st_size == 2 * CHUNK_BYTES for part in parts(target)))
    first.kill()
    first.communicate()
    assert not (target / "model.safetensors").exists()
    served.hold_after_bytes = None
    served.requests.clear()
    assert "downloading model.safetensors: 100 %" in end(start(served.url, target))
    assert (target / "model.safetensors").read_bytes() == served.files["model.safetensors"]
    assert [seen.headers["range"] for seen in served.gets()] == [f"bytes={2 * CHUNK_BYTES}-"]
    assert not served.gets(at_store=False)[:-1]


@pytest.mark.parametrize("how", ["close", "reset"])
def test_broken_connection_is_retried(served: Hub, tmp_path: Path, how: str) -> None:
    """After a closed or reset connection the same process resumes the download."""
    served.cuts = [(3 * CHUNK_BYTES, how)]
    end(start(served.url, tmp_path / "sam3.pt"))
    assert (tmp_path / "sam3.pt").read_bytes() == WEIGHTS
    assert ["range" in seen.headers for seen in served.gets()] == [False, True]


def test_error_of_the_store_is_retried(served: Hub, tmp_path: Path) -> None:
    """Requests that the store answers with 5xx are retried."""
    served.failures = [503, 500]
    end(start(served.url, tmp_path / "sam3.pt"))
    assert len(served.gets()) == 3


def test_changed_content_is_downloaded_from_the_start(served: Hub, tmp_path: Path) -> None:
    """The partial file of another version is deleted, not resumed."""
    (tmp_path / ".sam3.pt.0123456789abcdef.part").write_bytes(b"old" * 1000)
    end(start(served.url, tmp_path / "sam3.pt"))
    assert (tmp_path / "sam3.pt").read_bytes() == WEIGHTS
    assert not parts(tmp_path)


def test_two_starts_at_once(served: Hub, tmp_path: Path) -> None:
    """Of two processes one downloads, and the other waits and uses its result."""
    both = [start(served.url, tmp_path / "sam3.pt") for _ in range(2)]
    for process in both:
        end(process)
    assert (tmp_path / "sam3.pt").read_bytes() == WEIGHTS
    assert len(served.gets()) == 1


def test_token_is_sent_to_the_hub_only(served: Hub, tmp_path: Path) -> None:
    """The store, which is another host, gets the signed link and not the token."""
    end(start(served.url, tmp_path / "sam3.pt"))
    assert all(TOKEN in str(seen.headers) for seen in served.requests if not seen.at_store)
    assert [TOKEN in str(seen.headers) for seen in served.gets()] == [False]


def test_log_has_lines(served: Hub, tmp_path: Path) -> None:
    """Where stderr is no terminal, progress is logged as lines: per cent, size, speed, remaining time."""
    output = end(start(served.url, tmp_path / "sam3.pt"))
    assert "\r" not in output
    line = re.compile(r"^downloading sam3.pt: (\d+) % of 42.0MB, \S+B/s, [\d:]+ left$", re.MULTILINE)
    assert line.findall(output) == ["24", "49", "74", "99", "100"]


def test_terminal_has_a_bar(served: Hub, tmp_path: Path) -> None:
    """On a terminal progress is one bar, without log lines."""
    reader, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    process = start(served.url, tmp_path / "sam3.pt", stderr=terminal)
    os.close(terminal)
    output = b""
    try:
        while piece := os.read(reader, 1 << 16):
            output += piece
    except OSError:  # the terminal is closed
        pass
    os.close(reader)
    end(process)
    assert re.search(rb"\rsam3.pt: +100%\|.*42.0M/42.0M", output)
    assert b"downloading" not in output
    assert TOKEN.encode() not in output


def test_progress_is_reported(served: Hub, tmp_path: Path) -> None:
    """`on_progress` gets the bytes of all files together; torch is not loaded; no token or link is logged."""
    done = in_a_process(served.url, tmp_path / "sam3", TOKEN)
    assert TOKEN not in done.stdout + done.stderr
    assert "HTTP Request" not in done.stderr
    printed = json.loads(done.stdout)
    total = sum(len(served.files[name]) for name in (*SMALL_FILES, "model.safetensors"))
    assert printed["progress"][-1] == [total, total]
    assert [done for done, _ in printed["progress"]] == sorted(done for done, _ in printed["progress"])
    assert printed["torch"] is False


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"token": ""}, "needs HF_TOKEN: make one at"),
        ({"token": "hf_expired"}, "does not accept HF_TOKEN, which is wrong or expired: make one at"),
        ({"repo": "facebook/other"}, "there is no http://.*/facebook/other, or HF_TOKEN may not read it"),
        ({"revision": "v9"}, "has no revision v9: set SAM3_HF_REVISION to"),
        ({"HF_HUB_OFFLINE": "1"}, "sam3.pt is missing and HF_HUB_OFFLINE forbids to download it: unset it"),
        ({"token": f"{TOKEN}\x7f"}, "^HF_TOKEN holds a line break or another control character"),
    ],
)
def test_access_error_says_what_to_do(
    served: Hub, tmp_path: Path, variables: dict[str, str], sentence: str
) -> None:
    """For a wrong token, name or revision the error names the setting."""
    message = error_message(start(served.url, tmp_path / "sam3.pt", **variables))  # type: ignore[arg-type]
    assert re.search(sentence, message), message
    assert not (tmp_path / "sam3.pt").exists()


def test_gated_repository_is_named(served: Hub, tmp_path: Path) -> None:
    """For an account without access the error names the page to request it."""
    served.granted = False
    message = error_message(start(served.url, tmp_path / "sam3.pt"))
    assert f"access to {served.url}/{REPO} is gated" in message
    assert "granted by hand" in message


def test_403_of_the_store_is_no_missing_access(served: Hub, tmp_path: Path) -> None:
    """A link that the store refuses is not reported as missing access."""
    served.failures = [403]
    message = error_message(start(served.url, tmp_path / "sam3.pt"))
    assert f"127.0.0.1 answers 403 to the download from {served.url}/{REPO}" in message


def test_missing_file_is_named(served: Hub, tmp_path: Path) -> None:
    """Where the repository lacks the requested file, the error names both."""
    del served.files["sam3.pt"]
    message = error_message(start(served.url, tmp_path / "sam3.pt"))
    assert f"{served.url}/{REPO} has no sam3.pt at revision main" in message


def test_other_suffix_is_refused(served: Hub, tmp_path: Path) -> None:
    """A path with another suffix is refused before any request."""
    assert "it ends in .bin" in error_message(start(served.url, tmp_path / "sam3.bin"))
    assert not served.requests


def test_unreachable_hub_is_named(tmp_path: Path) -> None:
    """For an unreachable hub the error names its address, and the way without it."""
    with reserved_ports(1) as [closed]:
        url = f"http://127.0.0.1:{closed}"
        message = error_message(start(url, tmp_path / "sam3.pt"))
    assert f"the hub at {url} or its store does not answer (" in message
    assert "Connection refused" in message
    assert f"copy the files to {tmp_path / 'sam3.pt'} by hand" in message


def test_server_that_is_no_hub_is_refused(tmp_path: Path) -> None:
    """A server without a hub's headers is refused, since nothing could be verified."""
    with hub({"sam3.pt": b""}) as served:
        url = f"{served.store_url}"
        served.files = {f"{REPO}/resolve/main/sam3.pt": b"page"}
        message = error_message(start(url, tmp_path / "sam3.pt"))
    assert "does not send commit, size and checksum of sam3.pt as a Hugging Face hub does" in message


def test_damaged_file_is_deleted(served: Hub, tmp_path: Path) -> None:
    """A file with a wrong checksum never gets to the path; the next start downloads it again."""
    served.tampered = True
    message = error_message(start(served.url, tmp_path / "sam3.pt"))
    assert f"its checksum is not {hashlib.sha256(WEIGHTS).hexdigest()}" in message
    assert not (tmp_path / "sam3.pt").exists()
    served.tampered = False
    end(start(served.url, tmp_path / "sam3.pt"))
    assert (tmp_path / "sam3.pt").read_bytes() == WEIGHTS


def test_wrong_size_is_refused(served: Hub, tmp_path: Path) -> None:
    """A file that is longer than the hub announced is refused."""
    served.large_size_bytes = CHUNK_BYTES
    assert "sent another number of bytes than it announced" in error_message(
        start(served.url, tmp_path / "sam3.pt")
    )
    assert not (tmp_path / "sam3.pt").exists()


def test_partial_file_that_is_too_long_is_discarded(served: Hub, tmp_path: Path) -> None:
    """A partial file that is longer than the file is not resumed: no Range starts after the end."""
    checksum = hashlib.sha256(WEIGHTS).hexdigest()
    (tmp_path / f".sam3.pt.{checksum[:16]}.part").write_bytes(WEIGHTS + b"more")
    end(start(served.url, tmp_path / "sam3.pt"))
    assert (tmp_path / "sam3.pt").read_bytes() == WEIGHTS


def test_disk_space_is_checked_first(served: Hub, tmp_path: Path) -> None:
    """A download that does not fit on the disk is not started; the error has both sizes."""
    served.large_size_bytes = 10**15
    message = error_message(start(served.url, tmp_path / "sam3.pt"))
    assert f"{tmp_path} has no room for the weights: 1.00PB more are needed" in message
    assert not served.gets()


def test_full_disk_is_named(served: Hub, tmp_path: Path) -> None:
    """When the disk is full, the error has the missing size, and the partial file is kept."""
    message = error_message(start(served.url, tmp_path / "sam3.pt", limits="ulimit -f 40000;"))
    assert "more are needed" in message
    assert "File too large" in message
    assert parts(tmp_path)[0].stat().st_size > CHUNK_BYTES


def test_unwritable_folder_is_named(served: Hub) -> None:
    """For a path that cannot be written, even by root, the error names the path and the setting."""
    message = error_message(start(served.url, Path("/sys/sam3.pt"), HOME="/tmp"))  # noqa: S108 - only a home
    assert "/sys/sam3.pt cannot be written" in message
    assert "SAM3_WEIGHTS_PATH" in message
