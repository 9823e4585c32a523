"""What sam3_runner uses of its libraries beyond their public interface, one test per dependency.

A failure says what an upgrade changed, and which module of ours depends on it or does not need its
workaround any more. Names of the libraries are looked up inside the tests, so that a removed one fails its
own test only.
"""

from __future__ import annotations

import inspect
import io
import logging
from importlib import import_module
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
import tokenizers
import torch
import tqdm
import transformers
from huggingface_hub import constants, errors, file_download
from transformers import modeling_outputs

from sam3_runner.serving import gpu
from sam3_runner.weights import layouts
from sam3_runner.weights.checkpoint import CLIP_TOKENIZER_FILE
from sam3_runner.weights.load import load_network, to_transformers
from tests.services.hub import REPO, TOKEN, hub

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sam3_runner.weights.checkpoint import Checkpoint
    from tests.services.hub import Hub

utils: Any = import_module("huggingface_hub.utils")

CONTENT = bytes(range(256)) * 4096
"""1 MiB: enough for a connection to break in the middle."""


def check_call(function: Callable[..., Any], name: str, used_by: str, call: tuple[object, ...]) -> None:
    """Fail unless `function` takes the arguments of `call`: positional ones, then a dict of named ones."""
    *positional, named = call
    assert isinstance(named, dict)
    try:
        inspect.signature(function).bind(*positional, **named)
    except TypeError as error:
        pytest.fail(f"{name} cannot be called any more as {used_by} calls it: {error}")


def error_of(function: Callable[[], object]) -> Exception | None:
    """The exception that `function` raises."""
    try:
        function()
    except Exception as error:  # noqa: BLE001 - the test checks its type
        return error
    return None


@pytest.mark.parametrize(
    ("module", "name", "used_by", "call"),
    [
        ("huggingface_hub", "hf_hub_url", "download.py", (0, 0, {"revision": 0})),
        ("huggingface_hub", "get_hf_file_metadata", "download.py", (0, {"token": 0})),
        (
            "huggingface_hub.file_download",
            "http_get",
            "download.py",
            (
                *(0, 0),
                dict.fromkeys(
                    ("resume_size", "headers", "expected_size", "displayed_filename", "tqdm_class")
                ),
            ),
        ),
        ("huggingface_hub.utils", "build_hf_headers", "download.py", ({"token": 0},)),
        ("huggingface_hub.utils", "WeakFileLock", "download.py", (0, {})),
        ("huggingface_hub.utils.sha", "git_hash", "download.py", (0, {})),
        ("transformers", "Sam3Config.from_dict", "load.py", (0, {})),
        ("tokenizers", "Tokenizer.from_str", "prompts.py", None),
        ("tokenizers", "Tokenizer.encode_batch", "prompts.py", None),
    ],
)
def test_name_exists(module: str, name: str, used_by: str, call: tuple[object, ...] | None) -> None:
    """The library has the name, and takes the arguments that we pass; None: it has no signature."""
    try:
        function = attrgetter(name)(import_module(module))
    except (ImportError, AttributeError) as error:
        pytest.fail(f"there is no {module}.{name} any more, which {used_by} uses: {error}")
    if call is not None:
        check_call(function, f"{module}.{name}", used_by, call)


# download.py uses huggingface_hub.


@pytest.fixture
def served() -> Iterator[Hub]:
    with hub({"sam3.pt": CONTENT}) as running:
        yield running


def fetch(served: Hub, **options: Any) -> bytes:
    """The file from the hub's store, by `http_get`."""
    file = io.BytesIO()
    file_download.http_get(f"{served.store_url}/sam3.pt?signature=s", file, **options)
    return file.getvalue()


def test_hub_metadata() -> None:
    """The hub's metadata has the fields that identify and verify a file."""
    missing = {"commit_hash", "etag", "size"} - set(file_download.HfFileMetadata.__dataclass_fields__)
    assert not missing, f"HfFileMetadata has no {missing} any more: download.py verifies files by them"


def test_hub_endpoint() -> None:
    """The address that HF_ENDPOINT names is a constant."""
    assert constants.ENDPOINT.startswith("http"), "constants.ENDPOINT is no URL: download.py reports it"


def test_hub_errors() -> None:
    """All errors that `download` explains are subclasses of those that it catches."""
    for kind in (errors.GatedRepoError, errors.RemoteEntryNotFoundError, errors.RevisionNotFoundError):
        assert issubclass(kind, errors.HfHubHTTPError), f"{kind.__name__} is no HfHubHTTPError any more"
    assert issubclass(errors.HfHubHTTPError, httpx2.HTTPError), "download.py does not catch HfHubHTTPError"
    assert issubclass(errors.OfflineModeIsEnabled, OSError), "download.py does not catch the offline error"


def test_hub_client() -> None:
    """The hub's client is one of httpx2, whose errors `download` catches."""
    assert isinstance(utils.get_session(), httpx2.Client), "the hub's client is not of httpx2 any more"


def test_hub_log(served: Hub, caplog: pytest.LogCaptureFixture) -> None:
    """httpx2 logs signed URLs, so `download` raises its logger's level."""
    with caplog.at_level(logging.INFO, "httpx2"):
        fetch(served)
    assert "signature=s" in caplog.text, "httpx2 does not log URLs any more: download.py need not silence it"


def test_hub_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`build_hf_headers` sends the token that it gets, and with False not that of the machine's own login."""
    login = tmp_path / "token"
    login.write_text("hf_login")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(login))
    assert utils.build_hf_headers()["authorization"] == "Bearer hf_login"
    assert "authorization" not in utils.build_hf_headers(token=False), "download.py relies on token=False"
    assert utils.build_hf_headers(token="hf_ours")["authorization"] == "Bearer hf_ours"


def test_hub_git_hash() -> None:
    """`git_hash` is the hash of `git hash-object`."""
    found = import_module("huggingface_hub.utils.sha").git_hash(b"Hello, World!")
    assert found == "b45ef6fec89518d314f546fd6c3025367b721684", (
        "download.py verifies small files with git_hash"
    )


def test_hub_lock(tmp_path: Path) -> None:
    """`WeakFileLock` excludes a second holder."""

    def lock_again() -> None:
        with utils.WeakFileLock(tmp_path / "lock", timeout=0.1):
            pass

    with utils.WeakFileLock(tmp_path / "lock"):
        assert error_of(lock_again) is not None, "WeakFileLock does not exclude a second download any more"
    assert error_of(lock_again) is None


def test_http_get_resumes(served: Hub) -> None:
    """`http_get` requests only the rest of a file."""
    rest = fetch(served, resume_size=1000, expected_size=len(CONTENT))
    assert rest == CONTENT[1000:], (
        "http_get does not resume at resume_size any more: download.py relies on it"
    )
    assert served.gets()[0].headers["range"] == "bytes=1000-"


def test_http_get_reports_a_wrong_size(served: Hub) -> None:
    """A wrong size is an OSError without errno, by which `download` recognises it."""
    error = error_of(lambda: fetch(served, expected_size=len(CONTENT) + 1))
    assert isinstance(error, OSError), "http_get accepts a wrong size now: download.py relies on its check"
    assert error.errno is None, "a wrong size has an errno now: download.py would report the target's disk"


def test_http_get_creates_the_progress(served: Hub) -> None:
    """A progress class of ours gets `desc`, `initial` and `total`, and no `disable`."""
    created: list[dict[str, Any]] = []

    def progress(**options: Any) -> Any:
        created.append(options)
        return tqdm.tqdm(**options, disable=True)

    fetch(served, displayed_filename="sam3.pt", tqdm_class=progress)
    assert len(created) == 1, "http_get does not use tqdm_class any more: download.py reports with it"
    assert created[0].keys() >= {"desc", "initial", "total"}, "download.py's _Progress reads these"
    assert "disable" not in created[0], "http_get passes disable now, and download.py's _Progress as well"


def test_http_get_does_not_retry_everything(served: Hub) -> None:
    """`http_get` raises on a 5xx and on a reset connection, so `_call_with_retries` is needed."""
    served.failures = [503]
    assert isinstance(error_of(lambda: fetch(served)), errors.HfHubHTTPError), (
        "http_get retries a 5xx now: check whether download.py needs _call_with_retries"
    )
    served.cuts = [(len(CONTENT) // 2, "reset")]
    assert isinstance(error_of(lambda: fetch(served)), httpx2.NetworkError), (
        "http_get retries a reset now: check whether download.py needs _call_with_retries"
    )


def test_hf_hub_download_does_not_resume(served: Hub, tmp_path: Path) -> None:
    """`hf_hub_download` starts again after a broken connection, so download.py is needed."""
    served.cuts = [(len(CONTENT) // 2, "reset")]

    def download() -> None:
        file_download.hf_hub_download(REPO, "sam3.pt", cache_dir=tmp_path, endpoint=served.url, token=TOKEN)

    assert error_of(download) is not None, "hf_hub_download resumes now: use it instead of download.py"
    download()
    ranges = ["range" in seen.headers for seen in served.gets()]
    assert ranges == [False, False], "hf_hub_download resumes now: use it instead of download.py"


# load.py and layouts.py use transformers; the network is our own, where transformers' forward differs.


def test_geometry_token(tiny_checkpoint: Checkpoint) -> None:
    """A text-only prompt of transformers has no geometry token, so the network appends it."""
    network, _ = load_network(tiny_checkpoint, torch.device("cpu"))
    model: Any = transformers.Sam3Model(transformers.Sam3Config.from_dict(tiny_checkpoint.config))
    model.eval().load_state_dict(to_transformers(network.state_dict()))
    pixels = torch.randint(0, 256, (1, 3, 112, 112), dtype=torch.uint8)
    with torch.inference_mode():
        text = network.encode_text(torch.arange(6)[None], torch.ones(1, 6, dtype=torch.bool))
        image = network.encode_image(pixels)
        ours = network.decode(image.attended, image.geometry_token, text.tokens, text.valid).logits
        text_only = model(
            vision_embeds=model.get_vision_features(pixels.float() / 127.5 - 1.0),
            text_embeds=modeling_outputs.BaseModelOutputWithPooling(pooler_output=text.tokens),
            attention_mask=text.valid.long(),
        ).pred_logits
    assert (text_only - ours).abs().max() > 2e-3, (
        "transformers' forward gives our logits: if it appends the geometry token now, say so in the docs"
    )


def test_module_names() -> None:
    """Every module that layouts.py translates to exists in the full-size model."""
    with torch.device("meta"):
        existing = {name for name, _ in transformers.Sam3Model(transformers.Sam3Config()).named_modules()}
    used = {*layouts._MODULES.values(), *layouts.MLPS.values(), *layouts._NUMBERED_MODULES.values()}
    for stack, modules in layouts._LAYER_STACKS.values():
        used |= {f"{stack}.0.{module}" for module in modules.values()}
    assert used - existing == set(), "layouts.py translates to modules that Sam3Model does not have any more"


# prompts.py uses tokenizers, gpu.py uses torch.


def test_tokenizer_error() -> None:
    """A malformed file raises a bare Exception, so prompts.py catches that."""
    error = error_of(lambda: tokenizers.Tokenizer.from_str("{}"))
    assert type(error) is Exception, "tokenizers has an error of its own now: prompts.py should catch it"


def test_end_token() -> None:
    """CLIP's vocabulary has the end token with which prompts.py pads."""
    end = tokenizers.Tokenizer.from_file(str(CLIP_TOKENIZER_FILE)).token_to_id("<|endoftext|>")
    assert end == 49407, "the end token's name or id changed: prompts.py pads with it"


def test_torch_version_file() -> None:
    """The version file of torch can be run without torch, and has the CUDA version."""
    assert gpu._torch_cuda_version() == torch.version.cuda, "torch's version.py changed: gpu.py reads it"
