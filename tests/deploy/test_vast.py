"""The Vast.ai kit with the real `vastai` of PyPI, against a server that records its requests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.deploy.commands import commands_in
from tests.deploy.vast_api import LOG_TEXT, RecordedRequest, VastApi, vast_api
from tests.tiers import need

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent.parent
KIT = ROOT / "deploy" / "vast"
TEMPLATE = json.loads((KIT / "template.json").read_text())
IMAGE = f"registry.example/team/sam3-vast@sha256:{'0123456789abcdef' * 4}"
ACCOUNT_KEY = "key-of-the-account"

pytestmark = pytest.mark.slow


def vastai_python() -> Path:
    """The Python of `make vastai`; VASTAI_PYTHON overrides it."""
    return Path(os.environ.get("VASTAI_PYTHON", ROOT / ".venv" / "vastai" / "bin" / "python"))


class Vast:
    """Runs vast.py with the real `vastai` against `api`."""

    def __init__(self, api: VastApi, home: Path) -> None:
        self.api = api
        self._environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "VAST_URL": api.url,
            "VAST_API_KEY": ACCOUNT_KEY,
        }

    def __call__(self, *arguments: str, typed: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(vastai_python()), str(KIT / "vast.py"), *arguments],
            cwd=ROOT,
            env=self._environment,
            input=typed,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def the_change(self) -> RecordedRequest:
        """The only request other than GET; checks that it has the account's key."""
        [change] = self.api.changes
        assert change.authorization == f"Bearer {ACCOUNT_KEY}"
        return change


@pytest.fixture
def vast(tmp_path: Path) -> Iterator[Vast]:
    need(None if vastai_python().exists() else "no vastai (make vastai)")
    with vast_api() as api:
        yield Vast(api, tmp_path)


def without_nulls(body: dict[str, Any]) -> dict[str, Any]:
    """A request's fields that are not null."""
    return {name: value for name, value in body.items() if value is not None}


GPUS = {
    "rtx4090": {"eq": "RTX 4090"},
    "a100": {"in": ["A100 PCIE", "A100 SXM4"]},
    "h100": {"in": ["H100 PCIE", "H100 SXM", "H100 NVL"]},
}
DRIVERS = {
    "13": {"cuda_max_good": {"gte": "13.0"}, "driver_version": {"gte": 580000000}},
    "12": {"cuda_max_good": {"gte": "12.1"}},
}


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("cuda", DRIVERS)
def test_search_filters_offers(vast: Vast, gpu: str, cuda: str) -> None:
    """Each filter is valid for vastai; the search is for one GPU of this kind with a suitable driver."""
    ended = vast("search", gpu, "--cuda", cuda)
    assert ended.returncode == 0, ended.stderr
    assert "Unrecognized field" not in ended.stderr
    assert "4242" in ended.stdout, "the offers are listed"
    request = vast.the_change()
    assert (request.method, request.path) == ("POST", "/api/v0/bundles/")
    assert request.body["gpu_name"] == GPUS[gpu]
    assert request.body["num_gpus"] == {"eq": "1"}
    fields = ("cuda_max_good", "driver_version")
    assert {name: request.body[name] for name in fields if name in request.body} == DRIVERS[cuda]
    assert request.body["order"] == [["dph_total", "asc"]], "the cheapest come first"
    assert request.body["allocated_storage"] == float(TEMPLATE["recommended_disk_space"])


def test_template_is_created_from_the_file(vast: Vast) -> None:
    """Vastai sends template.json with the given image, and no secret."""
    assert vast("template", "--image", IMAGE).returncode == 0
    request = vast.the_change()
    assert (request.method, request.path) == ("POST", "/api/v0/template/")
    assert without_nulls(request.body) == {**TEMPLATE, "image": IMAGE}
    assert TEMPLATE["runtype"] == "args", "the image's own entrypoint runs"


def test_template_for_cuda_12_allows_older_drivers(vast: Vast) -> None:
    """The template for CUDA 12 accepts older drivers."""
    assert vast("template", "--image", IMAGE, "--cuda", "12").returncode == 0
    filters = vast.the_change().body["extra_filters"]
    assert filters["cuda_max_good"] == {"gte": "12.1"}
    assert "driver_version" not in filters


def test_create_uses_the_template(vast: Vast) -> None:
    """The instance has the given image and tunnel, and the template's disk and start mode."""
    ended = vast("create", "4242", "--image", IMAGE, "--tunnel", "green", "--template", "0123abcd")
    assert ended.returncode == 0, ended.stderr
    assert "77" in ended.stdout, "the new instance's id is printed"
    request = vast.the_change()
    assert (request.method, request.path) == ("PUT", "/api/v0/asks/4242/")
    sent = without_nulls(request.body)
    assert sent["template_hash_id"] == "0123abcd"
    assert (sent["image"], sent["disk"]) == (IMAGE, float(TEMPLATE["recommended_disk_space"]))
    assert sent["env"] == {"CLOUDFLARE_TUNNEL": "green"}
    assert (sent["label"], sent["cancel_unavail"]) == ("sam3-green", True)
    assert not {"runtype", "onstart", "user", "price"} & set(sent), "on demand, as the template starts it"


def test_create_for_ssh_starts_the_server(vast: Vast) -> None:
    """SSH mode has the template's variables, and an on-start script that starts the server."""
    assert vast("create", "4242", "--image", IMAGE, "--tunnel", "blue", "--ssh").returncode == 0
    sent = without_nulls(vast.the_change().body)
    assert "ssh" in sent["runtype"]
    assert sent["onstart"] == (KIT / "onstart.sh").read_text()
    assert sent["user"] == "root"
    names = [word.partition("=")[0] for word in TEMPLATE["env"].split() if word != "-e"]
    assert set(sent["env"]) == {*names, "CLOUDFLARE_TUNNEL"}
    assert sent["env"]["DATA_DIR"] == "/data"


def test_show_requests_the_instances(vast: Vast) -> None:
    """`show` requests the account's instances."""
    assert vast("show").returncode == 0
    assert "/api/v1/instances/" in [request.path for request in vast.api.requests]


def test_logs_prints_the_last_lines(vast: Vast) -> None:
    """The last lines of the container's log are printed."""
    ended = vast("logs", "77", "--tail", "50")
    assert LOG_TEXT in ended.stdout
    request = vast.the_change()
    assert (request.path, request.body) == ("/api/v0/instances/request_logs/77/", {"tail": "50"})


@pytest.mark.parametrize(
    ("typed", "flags", "destroyed"), [("n\n", [], False), ("y\n", [], True), ("", ["--yes"], True)]
)
def test_destroy_asks_for_confirmation(
    vast: Vast,
    typed: str,
    flags: list[str],
    destroyed: bool,  # noqa: FBT001
) -> None:
    """The instance is destroyed only after a confirmation, because its disk is deleted."""
    vast("destroy", "77", *flags, typed=typed)
    paths = [request.path for request in vast.api.changes if request.method == "DELETE"]
    assert paths == (["/api/v0/instances/77/"] if destroyed else [])


def test_variables_are_created_or_updated(vast: Vast, tmp_path: Path) -> None:
    """New variables are created, existing ones updated; no value is printed or on a command line."""
    vast.api.variables = {"HF_TOKEN": "old"}
    text = "# of the account\n\nHF_TOKEN=hf_new-value\nAPI_SECRET_KEY = first=key,second-key\n"
    file = variables_file(tmp_path / "vast.env", text)
    ended = vast("variables", str(file))
    assert ended.returncode == 0, ended.stderr
    assert [(request.method, request.path, request.body) for request in vast.api.changes] == [
        ("PUT", "/api/v0/secrets/", {"key": "HF_TOKEN", "value": "hf_new-value"}),
        ("POST", "/api/v0/secrets/", {"key": "API_SECRET_KEY", "value": "first=key,second-key"}),
    ]
    output = ended.stdout + ended.stderr
    assert "updated HF_TOKEN" in output
    assert "created API_SECRET_KEY" in output
    assert "hf_new-value" not in output
    assert "second-key" not in output
    assert "+ vastai" not in output, "vastai's command line must not run: other processes see its arguments"


@pytest.mark.parametrize(
    ("text", "mode", "sentence"),
    [
        ("HF_TOKEN=hf_secret", 0o644, "can be read by others"),
        ("HF_TOKEN=hf_secret\nhf_secret", 0o600, "line 2 of"),
        ("HF_TOKEN=", 0o600, "line 1 of"),
        ("HF_TOKEN=hf_secret  # of an account", 0o600, "has a comment or quotes"),
        ('HF_TOKEN="hf_secret"', 0o600, "has a comment or quotes"),
    ],
)
def test_unsafe_variables_file_is_refused(tmp_path: Path, text: str, mode: int, sentence: str) -> None:
    """A file that others can read, or that is not a list of variables, is refused with a message."""
    file = variables_file(tmp_path / "vast.env", text, mode)
    refused = variables_command(KIT, file)
    assert refused.returncode == 1
    assert sentence in refused.stderr
    assert "hf_secret" not in refused.stderr


def test_variables_file_in_the_repository_is_refused(tmp_path: Path) -> None:
    """A file in the repository is refused; the test uses a copy of the kit."""
    kit = shutil.copytree(KIT, tmp_path / "repository" / "deploy" / "vast")
    refused = variables_command(
        kit, variables_file(tmp_path / "repository" / "vast.env", "HF_TOKEN=hf_secret")
    )
    assert refused.returncode == 1
    assert "is in the repository" in refused.stderr


def variables_file(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def variables_command(kit: Path, file: Path) -> subprocess.CompletedProcess[str]:
    """Run `vast.py variables` of `kit` without vastai: a valid file fails only because of that."""
    return subprocess.run(
        [sys.executable, str(kit / "vast.py"), "variables", str(file)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("image", ["registry.example/sam3:1.0", TEMPLATE["image"], "sam3@sha256:0123"])
def test_image_needs_its_digest(vast: Vast, image: str) -> None:
    """A tag and the placeholder of template.json are refused."""
    ended = vast("template", "--image", image)
    assert ended.returncode == 2
    assert "by its digest" in ended.stderr
    assert not vast.api.requests


def test_documented_commands_work(vast: Vast, tmp_path: Path) -> None:
    """Each command of vast.py in the documentation works with vastai."""
    file = variables_file(tmp_path / "vast.env", "HF_TOKEN=hf_value")
    values = {
        "IMAGE": IMAGE,
        "PREVIOUS_IMAGE": IMAGE,
        "OFFER": "4242",
        "HASH": "0123abcd",
        "INSTANCE": "77",
        "OLD_INSTANCE": "76",
        "/etc/sam3/vast.env": str(file),
    }
    lines = [
        words[2:]
        for page in (ROOT / "docs" / "operations.md", KIT / "README.md")
        for words in commands_in(page)
        if "deploy/vast/vast.py" in words[:2]
    ]
    assert {line[0] for line in lines} == {
        *("search", "variables", "template", "create", "show", "logs", "destroy")
    }
    for line in lines:
        vast.api.requests.clear()
        ended = vast(*(values.get(word, word) for word in line), typed="y\n")
        assert ended.returncode == 0, f"{line}: {ended.stderr}"
        assert "usage:" not in ended.stderr
        assert vast.api.requests, line
