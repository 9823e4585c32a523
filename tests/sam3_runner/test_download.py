"""The weights come from the hub whole, once, and go on where they ended; failures say what to do."""

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

from tests.services.hub import COMMIT, REPO, TOKEN, hub
from tests.services.processes import free_ports, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.services.hub import Hub

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
CHUNK_BYTES = 10 << 20
"""What huggingface_hub writes at once: less than that is lost when a connection ends."""

WEIGHTS = os.urandom(4 * CHUNK_BYTES + 12_345)
SMALL_FILES = {"config.json": b'{"model_type": "sam3_video"}', "tokenizer.json": b"{}"}
TIMEOUT_S = 120.0

IN_A_PROCESS = """
import json, logging, sys
from pathlib import Path
from sam3_runner import WeightsError
from sam3_runner.checkpoint import HubSource
from sam3_runner.download import download

logging.basicConfig(level=logging.DEBUG)
target, repo, revision, token = sys.argv[1:]
source = HubSource(repo, revision, token or None)
told = []
try:
    download(Path(target), source, lambda done, total: told.append((done, total)))
except WeightsError as error:
    sys.exit(f"WeightsError: {error}")
print(json.dumps({"told": told, "shown": repr(source), "torch": "torch" in sys.modules}))
"""


@pytest.fixture
def served() -> Iterator[Hub]:
    """A hub with every file that a download may ask for."""
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
    """The operator's command, in a process of its own, since the hub's address is read at import."""
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
    """What a process said until it ended well."""
    said, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, said
    assert TOKEN not in said
    return said


def refusal(process: subprocess.Popen[str]) -> str:
    """The one sentence with which a process ended."""
    said, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    assert "Traceback" not in said
    assert TOKEN not in said
    return said.splitlines()[-1]


def in_a_process(url: str, target: Path, token: str) -> subprocess.CompletedProcess[str]:
    """`download` as Python calls it."""
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
    """Files that are not whole yet."""
    return list(folder.glob(".*.part"))


@pytest.mark.parametrize(
    ("name", "on_hub"), [("sam3.pt", "sam3.pt"), ("my.safetensors", "model.safetensors")]
)
def test_file_lands_at_its_path(served: Hub, tmp_path: Path, name: str, on_hub: str) -> None:
    """A file comes bit for bit to the very path that was asked for, with its commit and sha256 in the log."""
    target = tmp_path / "weights" / name
    said = end(start(served.url, target))
    assert target.read_bytes() == served.files[on_hub]
    assert COMMIT in said
    assert hashlib.sha256(served.files[on_hub]).hexdigest() in said
    assert not parts(target.parent)


def test_folder_lands_whole(served: Hub, tmp_path: Path) -> None:
    """A path without a suffix becomes a transformers folder; all of it is of one commit."""
    target = tmp_path / "sam3"
    end(start(served.url, target))
    names = ("config.json", "tokenizer.json", "model.safetensors")
    assert {name: (target / name).read_bytes() for name in names} == {
        name: served.files[name] for name in names
    }
    asked = [seen.path.split("/")[-2:] for seen in served.requests if seen.method == "HEAD"]
    assert asked == [["main", names[0]], [COMMIT, names[1]], [COMMIT, names[2]]]


def test_complete_target_asks_nothing(tmp_path: Path) -> None:
    """What lies there already is left alone, without a network."""
    (tmp_path / "sam3.pt").write_bytes(b"mine")
    assert "is complete" in end(start("http://127.0.0.1:9", tmp_path / "sam3.pt"))
    assert (tmp_path / "sam3.pt").read_bytes() == b"mine"


def test_killed_download_goes_on(served: Hub, tmp_path: Path) -> None:
    """After a kill in the middle the path is still empty; the next start fetches the rest alone, by Range."""
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
def test_broken_connection_is_mended(served: Hub, tmp_path: Path, how: str) -> None:
    """A connection that ends or is reset is made again, and the download goes on in the same process."""
    served.cuts = [(3 * CHUNK_BYTES, how)]
    end(start(served.url, tmp_path / "sam3.pt"))
    assert (tmp_path / "sam3.pt").read_bytes() == WEIGHTS
    assert ["range" in seen.headers for seen in served.gets()] == [False, True]


def test_error_of_the_store_passes(served: Hub, tmp_path: Path) -> None:
    """A store that fails for a moment is asked again."""
    served.failures = [503, 500]
    end(start(served.url, tmp_path / "sam3.pt"))
    assert len(served.gets()) == 3


def test_changed_content_starts_anew(served: Hub, tmp_path: Path) -> None:
    """What is left of another version of the file is thrown away, not gone on with."""
    (tmp_path / ".sam3.pt.0123456789abcdef.part").write_bytes(b"old" * 1000)
    end(start(served.url, tmp_path / "sam3.pt"))
    assert (tmp_path / "sam3.pt").read_bytes() == WEIGHTS
    assert not parts(tmp_path)


def test_two_starts_at_once(served: Hub, tmp_path: Path) -> None:
    """Of two processes one downloads, and the other finds it done."""
    both = [start(served.url, tmp_path / "sam3.pt") for _ in range(2)]
    for process in both:
        end(process)
    assert (tmp_path / "sam3.pt").read_bytes() == WEIGHTS
    assert len(served.gets()) == 1


def test_token_stays_on_the_hub(served: Hub, tmp_path: Path) -> None:
    """The store, another host, gets the signed link and not the token."""
    end(start(served.url, tmp_path / "sam3.pt"))
    assert all(TOKEN in str(seen.headers) for seen in served.requests if not seen.at_store)
    assert [TOKEN in str(seen.headers) for seen in served.gets()] == [False]


def test_log_has_lines(served: Hub, tmp_path: Path) -> None:
    """Where stderr is no terminal, progress is whole lines: how far, of what, how fast, how long still."""
    said = end(start(served.url, tmp_path / "sam3.pt"))
    assert "\r" not in said
    line = re.compile(r"^downloading sam3.pt: (\d+) % of 42.0MB, \S+B/s, [\d:]+ left$", re.MULTILINE)
    assert line.findall(said) == ["24", "49", "74", "99", "100"]


def test_terminal_has_a_bar(served: Hub, tmp_path: Path) -> None:
    """On a terminal progress is one bar, and no lines."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    process = start(served.url, tmp_path / "sam3.pt", stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 1 << 16):
            shown += piece
    except OSError:  # the terminal's end
        pass
    os.close(ours)
    end(process)
    assert re.search(rb"\rsam3.pt: +100%\|.*42.0M/42.0M", shown)
    assert b"downloading" not in shown
    assert TOKEN.encode() not in shown


def test_progress_is_told(served: Hub, tmp_path: Path) -> None:
    """A caller is told the bytes of all files together; no torch is loaded, no token or link logged."""
    done = in_a_process(served.url, tmp_path / "sam3", TOKEN)
    assert TOKEN not in done.stdout + done.stderr
    assert "HTTP Request" not in done.stderr
    printed = json.loads(done.stdout)
    total = sum(len(served.files[name]) for name in (*SMALL_FILES, "model.safetensors"))
    assert printed["told"][-1] == [total, total]
    assert [done for done, _ in printed["told"]] == sorted(done for done, _ in printed["told"])
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
def test_refusal_says_what_to_do(
    served: Hub, tmp_path: Path, variables: dict[str, str], sentence: str
) -> None:
    """A wrong token, name or revision is one sentence that names the setting."""
    said = refusal(start(served.url, tmp_path / "sam3.pt", **variables))  # type: ignore[arg-type]
    assert re.search(sentence, said), said
    assert not (tmp_path / "sam3.pt").exists()


def test_gated_says_where_to_ask(served: Hub, tmp_path: Path) -> None:
    """An account without access is told the page where it is asked for."""
    served.granted = False
    said = refusal(start(served.url, tmp_path / "sam3.pt"))
    assert f"access to {served.url}/{REPO} is gated" in said
    assert "granted by hand" in said


def test_refusal_of_the_store_is_not_the_gate(served: Hub, tmp_path: Path) -> None:
    """A link that the store refuses says nothing of the account's access."""
    served.failures = [403]
    said = refusal(start(served.url, tmp_path / "sam3.pt"))
    assert f"127.0.0.1 answers 403 to the download from {served.url}/{REPO}" in said


def test_missing_file_is_named(served: Hub, tmp_path: Path) -> None:
    """A repository without the file that the path asks for is named with the file."""
    del served.files["sam3.pt"]
    said = refusal(start(served.url, tmp_path / "sam3.pt"))
    assert f"{served.url}/{REPO} has no sam3.pt at revision main" in said


def test_other_suffix_is_refused(served: Hub, tmp_path: Path) -> None:
    """A path that names neither layout is refused before anything is asked."""
    assert "it ends in .bin" in refusal(start(served.url, tmp_path / "sam3.bin"))
    assert not served.requests


def test_dead_network_is_named(tmp_path: Path) -> None:
    """A hub that cannot be reached is named, with the way by hand."""
    url = f"http://127.0.0.1:{free_ports(1)[0]}"
    said = refusal(start(url, tmp_path / "sam3.pt"))
    assert f"the hub at {url} or its store does not answer (" in said
    assert "Connection refused" in said
    assert f"copy the files to {tmp_path / 'sam3.pt'} by hand" in said


def test_other_server_is_no_hub(tmp_path: Path) -> None:
    """A server that does not answer as a hub is refused, since nothing could be verified."""
    with hub({"sam3.pt": b""}) as served:
        url = f"{served.store_url}"
        served.files = {f"{REPO}/resolve/main/sam3.pt": b"page"}
        said = refusal(start(url, tmp_path / "sam3.pt"))
    assert "does not tell commit, size and checksum of sam3.pt as a Hugging Face hub does" in said


def test_damage_is_found(served: Hub, tmp_path: Path) -> None:
    """Bytes that differ from the hub's checksum never reach the path, and the next start begins anew."""
    served.tampered = True
    said = refusal(start(served.url, tmp_path / "sam3.pt"))
    assert f"its checksum is not {hashlib.sha256(WEIGHTS).hexdigest()}" in said
    assert not (tmp_path / "sam3.pt").exists()
    served.tampered = False
    end(start(served.url, tmp_path / "sam3.pt"))
    assert (tmp_path / "sam3.pt").read_bytes() == WEIGHTS


def test_wrong_size_is_found(served: Hub, tmp_path: Path) -> None:
    """A store that sends more than the hub told is not believed."""
    served.large_size_bytes = CHUNK_BYTES
    assert "sent another number of bytes than it told" in refusal(start(served.url, tmp_path / "sam3.pt"))
    assert not (tmp_path / "sam3.pt").exists()


def test_too_much_is_thrown_away(served: Hub, tmp_path: Path) -> None:
    """A rest that is longer than the file is not gone on with, since no Range begins after the end."""
    checksum = hashlib.sha256(WEIGHTS).hexdigest()
    (tmp_path / f".sam3.pt.{checksum[:16]}.part").write_bytes(WEIGHTS + b"more")
    end(start(served.url, tmp_path / "sam3.pt"))
    assert (tmp_path / "sam3.pt").read_bytes() == WEIGHTS


def test_small_disk_is_seen_before(served: Hub, tmp_path: Path) -> None:
    """A file larger than what is free is not begun; the sentence tells both."""
    served.large_size_bytes = 10**15
    said = refusal(start(served.url, tmp_path / "sam3.pt"))
    assert f"{tmp_path} has no room for the weights: 1.00PB more are needed" in said
    assert not served.gets()


def test_full_disk_is_named(served: Hub, tmp_path: Path) -> None:
    """When a file may not grow any more, the sentence tells what is still needed, and what came is kept."""
    said = refusal(start(served.url, tmp_path / "sam3.pt", limits="ulimit -f 40000;"))
    assert "more are needed" in said
    assert "File too large" in said
    assert parts(tmp_path)[0].stat().st_size > CHUNK_BYTES


def test_forbidden_folder_is_named(served: Hub) -> None:
    """A path that may not be written, even by root, is named with the setting."""
    said = refusal(start(served.url, Path("/sys/sam3.pt"), HOME="/tmp"))  # noqa: S108 - only a home
    assert "/sys/sam3.pt cannot be written" in said
    assert "SAM3_WEIGHTS_PATH" in said
