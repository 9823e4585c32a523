"""What the environment may hold, and what is said when it is wrong."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from settings import (
    Settings,
    SettingsError,
    freeze_settings,
    load_settings,
    load_weights_settings,
    make_demo_key,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLE = Path(__file__).parent.parent / ".env.example"
EXAMPLE_LINE = re.compile(r"^# ([A-Z0-9_]+)=(\S*)", re.MULTILINE)

KEY = "k" * 32
SECRET = "hush-hush-0123456789abcdef"
R2 = {
    "R2_ENDPOINT": "https://account.r2.cloudflarestorage.com",
    "R2_ACCESS_KEY_ID": SECRET,
    "R2_SECRET_ACCESS_KEY": SECRET,
}
SUPABASE = {"SUPABASE_URL": "https://project.supabase.co", "SUPABASE_SERVICE_KEY": SECRET}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No .env of the developer's is read."""
    monkeypatch.chdir(tmp_path)


def load(monkeypatch: pytest.MonkeyPatch, **variables: str) -> Settings:
    """The settings of an environment that holds an API key, and `variables`."""
    for name, value in ({"API_SECRET_KEY": KEY} | variables).items():
        monkeypatch.setenv(name, value)
    return load_settings()


def refusal(monkeypatch: pytest.MonkeyPatch, **variables: str) -> str:
    """The sentence that refuses an environment."""
    with monkeypatch.context() as only_here, pytest.raises(SettingsError) as refused:
        load(only_here, **variables)
    assert refused.value.__cause__ is None
    assert "\n" not in str(refused.value)
    assert SECRET not in str(refused.value)
    return str(refused.value)


def test_example_lists_every_setting() -> None:
    """`.env.example` names every setting once, in capitals, and nothing else."""
    listed = [name for name, _ in EXAMPLE_LINE.findall(EXAMPLE.read_text())]
    assert sorted(listed) == sorted(name.upper() for name in Settings.model_fields)


def as_text(default: Any) -> str:
    """A default as `.env.example` writes it."""
    if default is None or default == ():
        return ""
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, float) and default.is_integer():
        return str(int(default))
    return str(default)


@pytest.mark.parametrize("name", Settings.model_fields)
def test_example_tells_the_defaults(name: str) -> None:
    """Each value in `.env.example` is the one that the code takes when the variable is unset."""
    told = dict(EXAMPLE_LINE.findall(EXAMPLE.read_text()))
    assert told[name.upper()] == as_text(Settings.model_fields[name].default)


def test_example_works_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A copy of `.env.example` with its comments taken off is a valid `.env` once it has a key."""
    text = EXAMPLE_LINE.sub(r"\1=\2", EXAMPLE.read_text())
    (tmp_path / ".env").write_text(text + f"\nAPI_SECRET_KEY={KEY}\n")
    assert load_settings() == load(monkeypatch, ENV_FILE=".env")


def test_environment_has_the_last_word(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A variable in the environment beats the same in the file, which beats the default."""
    (tmp_path / "my.env").write_text("API_WORKERS=7\nMAX_IN_FLIGHT=9\n")
    read = load(monkeypatch, ENV_FILE="my.env", API_WORKERS="5")
    assert (read.api_workers, read.max_in_flight, read.sam3_max_batch) == (5, 9, 8)


@pytest.fixture
def _environment_is_put_back() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.usefixtures("_environment_is_put_back")
@pytest.mark.parametrize("after", ["", "NO_SUCH_SETTING=1", "API_WORKERS=two", None])
def test_frozen_settings_outlive_their_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, after: str | None
) -> None:
    """Once frozen, the settings are what was read, whatever becomes of the file."""
    file = tmp_path / "my.env"
    file.write_text(
        "ENV_FILE=other.env\nexport API_WORKERS=7\nmax_in_flight=9\nMAX_IN_FLIGHT=10\nSAM3_DEVICE=\n"
        'ALLOWED_ORIGINS="https://a.example.com, https://b.example.com"  # two\nDATA_DIR=${HOME}/data\n'
        f"SAM3_MAX_BATCH=3\nSUPABASE_MASK_COLUMN\nAPI_SECRET_KEY={KEY}\n"
    )
    monkeypatch.setenv("ENV_FILE", str(file))
    monkeypatch.setenv("Sam3_Max_Batch", "5")
    monkeypatch.setenv("API_WORKERS", "")
    frozen = freeze_settings()
    assert (frozen.api_workers, frozen.max_in_flight, frozen.sam3_max_batch) == (7, 10, 5)
    if after is None:
        file.unlink()
    else:
        file.write_text(after)
    read = load_settings()
    assert read.model_dump(exclude={"env_file"}) == frozen.model_dump(exclude={"env_file"})
    assert freeze_settings() == read


@pytest.mark.usefixtures("_environment_is_put_back")
def test_refused_settings_are_not_frozen(tmp_path: Path) -> None:
    """A file that is refused leaves nothing in the environment."""
    (tmp_path / ".env").write_text(f"API_SECRET_KEY={KEY}\nAPI_WORKERS=two\n")
    before = dict(os.environ)
    with pytest.raises(SettingsError, match="API_WORKERS"):
        freeze_settings()
    assert dict(os.environ) == before


def test_empty_variable_is_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """`R2_ENDPOINT=` in a file of variables means that there is none."""
    read = load(monkeypatch, R2_ENDPOINT="", SUPABASE_URL="", API_WORKERS="")
    assert (read.uses_r2, read.uses_supabase, read.api_workers) == (False, False, 2)


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("API_WORKERS", "two", "integer"),
        ("API_WORKERS", "0", "greater"),
        ("API_WORKERS", "2.5", "integer"),
        ("API_WORKERS", "65", "less"),
        ("SAM3_MAX_BATCH", "1", "greater"),
        ("SAM3_CPU_THREADS", "-1", "greater"),
        ("SAM3_DEVICE", "tpu", "cuda"),
        ("SAM3_HF_REPO", "sam3", "owner/name"),
        ("SAM3_HF_REPO", "https://huggingface.co/facebook/sam3", "owner/name"),
        ("APP_ENV", "prod", "production"),
        ("REQUEST_TIMEOUT_S", "0", "greater"),
        ("REQUEST_TIMEOUT_S", "601", "less"),
        ("REQUEST_TIMEOUT_S", "nan", ""),
        ("MAX_BODY_BYTES", "1", "1024"),
        ("MAX_IMAGE_BYTES", "10MB", "integer"),
        ("EMBEDDED_PARTS", "everything", "storage"),
        ("API_SECRET_KEY", "short", "16"),
        ("API_SECRET_KEY", f"{KEY},short", "16"),
        ("ALLOWED_ORIGINS", "*", "origins"),
        ("ALLOWED_ORIGINS", "app.example.com", "origins"),
        ("ALLOWED_ORIGINS", "https://app.example.com/", "origins"),
        ("ALLOWED_ORIGINS", "https://a.example.com,https://b.example.com/path", "origins"),
        ("R2_PUBLIC_BASE_URL", "pub.example.com", "https://"),
    ],
)
def test_wrong_value_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, part: str) -> None:
    """A value of the wrong kind or out of range is refused with the variable's name and the rule."""
    sentence = refusal(monkeypatch, **{name: value})
    assert sentence.startswith(name)
    assert part in sentence


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("R2_ENDPONT", "did you mean R2_ENDPOINT?"),
        ("SUPABASE_SERVICE_ROLE_KEY", "did you mean SUPABASE_SERVICE_KEY?"),
        ("SAM3_WEIGHT_PATH", "did you mean SAM3_WEIGHTS_PATH?"),
        ("API_SECRET", "did you mean API_SECRET_KEY?"),
        ("API_SECRET_KEYS", "did you mean API_SECRET_KEY?"),
        ("R2_QQQQQQQQ", ".env.example"),
    ],
)
def test_slip_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, hint: str) -> None:
    """A misspelt variable, which would be overlooked, stops the start with the name that was meant."""
    sentence = refusal(monkeypatch, **{name: SECRET})
    assert sentence.startswith(name)
    assert hint in sentence


def test_unknown_name_in_the_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In our own file any unknown name is a slip."""
    (tmp_path / ".env").write_text(f"WORKERS={SECRET}\n")
    assert "WORKERS" in refusal(monkeypatch)


@pytest.mark.parametrize("group", [R2, SUPABASE])
def test_half_a_group_is_refused(monkeypatch: pytest.MonkeyPatch, group: dict[str, str]) -> None:
    """Some of R2_* or SUPABASE_* without the rest is refused, naming what is missing."""
    for missing in group:
        sentence = refusal(monkeypatch, **{name: value for name, value in group.items() if name != missing})
        assert f"{missing} missing" in sentence


def test_whole_groups_choose_the_real_services(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of R2_* and SUPABASE_* mean R2 and Supabase, and then it is no demo; URLs lose their last slash."""
    read = load(
        monkeypatch, **R2, **SUPABASE, SAM3_WEIGHTS_PATH="demo", R2_PUBLIC_BASE_URL="https://p.example/"
    )
    assert (read.uses_r2, read.uses_supabase, read.is_demo) == (True, True, False)
    assert read.r2_public_base_url == "https://p.example"
    assert read.r2_bucket == "s3-images"


def test_production_refuses_embedded_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """In production a folder or SQLite is used only when it is asked for by name."""
    production = {"APP_ENV": "production"}
    assert "EMBEDDED_PARTS=storage" in refusal(monkeypatch, **production)
    assert "SUPABASE_URL" in refusal(monkeypatch, **production, **R2)
    assert "R2_ENDPOINT" in refusal(monkeypatch, **production, EMBEDDED_PARTS="results")
    read = load(monkeypatch, **production, EMBEDDED_PARTS="storage, results")
    assert read.embedded_parts == ("storage", "results")
    assert load(monkeypatch, **production, **R2, **SUPABASE, EMBEDDED_PARTS="").embedded_parts == ()


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SAM3_WEIGHTS_PATH": "weights/sam3.pt"},
        {"SAM3_WEIGHTS_PATH": "demo", **R2},
        {"SAM3_WEIGHTS_PATH": "demo", **SUPABASE},
        {"SAM3_WEIGHTS_PATH": "demo", "APP_ENV": "production", "EMBEDDED_PARTS": "storage,results"},
        {"API_SECRET_KEY": " , "},
    ],
)
def test_no_key_no_start(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    """Without an API key only the embedded demo starts; anything real in it, and it does not."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match="API_SECRET_KEY"):
        load_settings()


def test_demo_starts_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo makes its own key, another one each time, and leaves it where its workers find it."""
    monkeypatch.setenv("SAM3_WEIGHTS_PATH", "demo")
    read = load_settings()
    assert (read.is_demo, read.api_keys) == (True, ())
    monkeypatch.setenv("API_SECRET_KEY", "")  # so that it is taken back after the test
    first, second = make_demo_key(), make_demo_key()
    assert first != second
    assert os.environ["API_SECRET_KEY"] == second
    assert load_settings().api_keys == (second,)


def test_keys_may_be_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """While keys rotate, each of a comma-separated list opens the API."""
    assert load(monkeypatch, API_SECRET_KEY=f" {KEY} ,{SECRET},").api_keys == (KEY, SECRET)


def test_download_needs_no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where nothing is served, the weights' settings are read from the same places without the others."""
    (tmp_path / ".env").write_text("SAM3_HF_REVISION=main\nAPI_WORKERS=3\n")
    monkeypatch.setenv("SAM3_WEIGHTS_PATH", "w/sam3")
    read = load_weights_settings()
    assert (read.sam3_weights_path, read.sam3_hf_repo, read.sam3_hf_revision) == (
        "w/sam3",
        "facebook/sam3",
        "main",
    )
    monkeypatch.setenv("SAM3_HF_REVISON", "main")
    with pytest.raises(SettingsError, match="did you mean SAM3_HF_REVISION"):
        load_weights_settings()


def test_revision_is_a_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default the weights are those of one commit, which never change under a server."""
    assert re.fullmatch("[0-9a-f]{40}", load(monkeypatch).sam3_hf_revision)


def test_token_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line break with which a file of a secret ends is no part of the token."""
    token = load(monkeypatch, HF_TOKEN=f"{SECRET}\n").hf_token
    assert token is not None
    assert token.get_secret_value() == SECRET


def test_lists_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Origins are given with commas, with or without spaces."""
    read = load(monkeypatch, ALLOWED_ORIGINS="https://a.example.com, http://localhost:5173,")
    assert read.allowed_origins == ("https://a.example.com", "http://localhost:5173")


def test_secrets_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Printed or logged, settings show no key, token or password."""
    read = load(monkeypatch, **R2, **SUPABASE, HF_TOKEN=SECRET, API_SECRET_KEY=SECRET)
    for shown in (str(read), repr(read), str(read.model_dump()), read.model_dump_json()):
        assert SECRET not in shown


def test_settings_are_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read at the start does not change afterwards."""
    read = load(monkeypatch)
    with pytest.raises(ValueError, match="frozen"):
        setattr(read, "api_workers", 3)  # noqa: B010 - mypy knows it too
