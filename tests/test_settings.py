"""Valid and invalid settings, and the messages for the invalid ones."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from settings import (
    Settings,
    SettingsError,
    choose_demo_by_default,
    freeze_settings,
    inspect_settings,
    load_settings,
    load_weights_settings,
    make_demo_key,
    overlooked_variables,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLE = Path(__file__).parent.parent / ".env.example"
EXAMPLE_LINE = re.compile(r"^# ([A-Z0-9_]+)=(\S*)", re.MULTILINE)

KEY = "k" * 32
SECRET = "hush-hush-0123456789abcdef"
R2 = {
    "R2_ENDPOINT": "https://acc0.r2.cloudflarestorage.com",
    "R2_ACCESS_KEY_ID": SECRET,
    "R2_SECRET_ACCESS_KEY": SECRET,
}
MAKE_A_KEY = "`openssl rand -hex 32` makes one"
ORIGINS = "must be origins such as https://app.example.com, without a path"
HTTPS = "must start with https:// (http:// only for a local server)"
NO_URL = "is not a URL: it must name a host, as in https://images.example.com"
SUPABASE = {"SUPABASE_URL": "https://abcd.supabase.co", "SUPABASE_SERVICE_KEY": SECRET}


@pytest.fixture(autouse=True)
def _other_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the tests from reading the developer's .env."""
    monkeypatch.chdir(tmp_path)


def load(monkeypatch: pytest.MonkeyPatch, **variables: str) -> Settings:
    """Load the settings from an environment with an API key and `variables`."""
    for name, value in ({"API_SECRET_KEY": KEY} | variables).items():
        monkeypatch.setenv(name, value)
    return load_settings()


def refusal(monkeypatch: pytest.MonkeyPatch, **variables: str) -> str:
    """The message that refuses an environment; checks that it is one line without the secret."""
    with monkeypatch.context() as only_here, pytest.raises(SettingsError) as refused:
        load(only_here, **variables)
    assert refused.value.__cause__ is None
    assert "\n" not in str(refused.value)
    assert SECRET not in str(refused.value)
    return str(refused.value)


def test_example_lists_every_setting() -> None:
    """`.env.example` lists every setting once, in upper case, and nothing else."""
    listed = [name for name, _ in EXAMPLE_LINE.findall(EXAMPLE.read_text())]
    assert sorted(listed) == sorted(name.upper() for name in Settings.model_fields)


def as_text(default: Any) -> str:
    """A default in the format of `.env.example`."""
    if default is None or default == ():
        return ""
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, float) and default.is_integer():
        return str(int(default))
    return str(default)


@pytest.mark.parametrize("name", Settings.model_fields)
def test_example_has_the_defaults(name: str) -> None:
    """Each value in `.env.example` is the default of the code."""
    listed = dict(EXAMPLE_LINE.findall(EXAMPLE.read_text()))
    assert listed[name.upper()] == as_text(Settings.model_fields[name].default)


def test_uncommented_example_is_valid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A copy of `.env.example` without the comment signs is a valid `.env` once it has a key."""
    text = EXAMPLE_LINE.sub(r"\1=\2", EXAMPLE.read_text())
    (tmp_path / ".env").write_text(text + f"\nAPI_SECRET_KEY={KEY}\n")
    assert load_settings() == load(monkeypatch, ENV_FILE=".env")


def test_environment_overrides_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A variable in the environment overrides the file, which overrides the default."""
    (tmp_path / "my.env").write_text("API_WORKERS=7\nMAX_IN_FLIGHT=9\n")
    read = load(monkeypatch, ENV_FILE="my.env", API_WORKERS="5")
    assert (read.api_workers, read.max_in_flight, read.sam3_max_batch) == (5, 9, 8)


@pytest.fixture
def _environment_is_restored() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.usefixtures("_environment_is_restored")
@pytest.mark.parametrize("after", ["", "NO_SUCH_SETTING=1", "API_WORKERS=two", None])
def test_frozen_settings_do_not_depend_on_their_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, after: str | None
) -> None:
    """Frozen settings do not change if the file changes or is deleted."""
    file = tmp_path / "my.env"
    file.write_text(
        "ENV_FILE=other.env\nexport API_WORKERS=7\nmax_in_flight=9\nMAX_IN_FLIGHT=10\nSAM3_DEVICE=\n"
        'ALLOWED_ORIGINS="https://a.example.com, https://b.example.com"  # two\nDATA_DIR=${HOME}/data\n'
        f"SAM3_MAX_BATCH=3\nSUPABASE_MASK_COLUMN\nAPI_SECRET_KEY={KEY}\n"
    )
    monkeypatch.setenv("ENV_FILE", str(file))
    monkeypatch.setenv("Sam3_Max_Batch", "5")
    monkeypatch.setenv("API_WORKERS", "")
    frozen = freeze_settings(1)
    assert (frozen.api_workers, frozen.max_in_flight, frozen.sam3_max_batch) == (7, 10, 5)
    if after is None:
        file.unlink()
    else:
        file.write_text(after)
    read = load_settings()
    assert read.model_dump(exclude={"env_file"}) == frozen.model_dump(exclude={"env_file"})
    assert freeze_settings(1) == read


@pytest.mark.usefixtures("_environment_is_restored")
@pytest.mark.parametrize(
    "given",
    [{}, {"DATA_DIR": "state", "SAM3_WEIGHTS_PATH": "models/sam3.pt"}, {"SAM3_KERNEL_CACHE": "cache"}],
)
def test_frozen_paths_are_absolute(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: dict[str, str]
) -> None:
    """A process that is started in another folder uses the same files."""
    monkeypatch.setenv("API_SECRET_KEY", KEY)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    frozen = freeze_settings(1)
    monkeypatch.chdir("/")
    read = load_settings()
    assert read.data_dir == frozen.data_dir == tmp_path / given.get("DATA_DIR", "data")
    weights = tmp_path / given.get("SAM3_WEIGHTS_PATH", "weights/sam3.pt")
    assert read.sam3_weights_path == frozen.sam3_weights_path == str(weights)
    kernels = given.get("SAM3_KERNEL_CACHE", f"{given.get('DATA_DIR', 'data')}/kernels")
    assert read.kernel_cache == frozen.kernel_cache == tmp_path / kernels


@pytest.mark.usefixtures("_environment_is_restored")
def test_demo_is_not_made_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of the embedded checkpoint does not become an absolute path."""
    monkeypatch.setenv("SAM3_WEIGHTS_PATH", "demo")
    assert freeze_settings(1).is_demo


@pytest.mark.usefixtures("_environment_is_restored")
@pytest.mark.parametrize("given", ["auto", "2"])
def test_frozen_runners_are_a_number(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    """Every process has as many runners as the first one counted, also after a GPU was lost."""
    assert load(monkeypatch, GPUS=given).gpus in {"auto", 2}
    assert freeze_settings(2).gpus == load_settings().gpus == 2


@pytest.mark.usefixtures("_environment_is_restored")
def test_refused_settings_are_not_frozen(tmp_path: Path) -> None:
    """A refused file does not change the environment."""
    (tmp_path / ".env").write_text(f"API_SECRET_KEY={KEY}\nAPI_WORKERS=two\n")
    before = dict(os.environ)
    with pytest.raises(SettingsError, match="API_WORKERS"):
        freeze_settings(1)
    assert dict(os.environ) == before


def test_empty_variable_is_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """`R2_ENDPOINT=` is the same as no R2_ENDPOINT."""
    read = load(monkeypatch, R2_ENDPOINT="", SUPABASE_URL="", API_WORKERS="")
    assert (read.uses_r2, read.uses_supabase, read.api_workers) == (False, False, None)


@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [
        ("API_WORKERS", "two", "must be a whole number from 1 to 64, not 'two'"),
        ("API_WORKERS", "0", "must be a whole number from 1 to 64, not '0'"),
        ("API_WORKERS", "2.5", "must be a whole number from 1 to 64, not '2.5'"),
        ("API_WORKERS", SECRET, "must be a whole number from 1 to 64"),
        ("GPUS", "0", "must be auto or a whole number from 1 to 64, not '0'"),
        ("GPUS", "-1", "must be auto or a whole number from 1 to 64, not '-1'"),
        ("GPUS", "all", "must be auto or a whole number from 1 to 64, not 'all'"),
        ("GPUS", "1.5", "must be auto or a whole number from 1 to 64, not '1.5'"),
        ("GPUS", "65", "must be auto or a whole number from 1 to 64, not '65'"),
        ("SAM3_MAX_BATCH", "1", "must be a whole number from 2 to 64, not '1'"),
        ("SAM3_CPU_THREADS", "-1", "must be a whole number from 1 to 256, not '-1'"),
        ("MAX_IN_FLIGHT", "-1", "must be a whole number, 1 or more, not '-1'"),
        ("MAX_BODY_BYTES", "1", "must be a whole number of bytes, 1024 or more, not '1'"),
        ("MAX_IMAGE_BYTES", "10MB", "must be a whole number of bytes, 1 or more, not '10MB'"),
        ("MAX_IMAGE_PIXELS", "10,000,000", "must be a whole number of pixels, 1 or more, not '10,000,000'"),
        ("REQUEST_TIMEOUT_S", "0", "must be a number of seconds above 0, at most 600, not '0'"),
        ("REQUEST_TIMEOUT_S", "60s", "must be a number of seconds above 0, at most 600, not '60s'"),
        ("REQUEST_TIMEOUT_S", "nan", "must be a number of seconds above 0, at most 600, not 'nan'"),
        ("OUTAGE_LIMIT_S", "inf", "must be a number of seconds, 0 or more, not 'inf'"),
        ("USER_PREFIX_REQUIRED", "ja", "must be true or false, not 'ja'"),
        ("SAM3_DEVICE", "tpu", "must be cuda or cpu, not 'tpu'"),
        ("SAM3_DTYPE", "fp16", "must be auto or float16 or bfloat16 or float32, not 'fp16'"),
        ("APP_ENV", "prod", "must be development or production, not 'prod'"),
        ("EMBEDDED_PARTS", "storage,all", "must be a list of storage or results, not 'storage,all'"),
        ("SAM3_HF_REPO", "sam3", "must be owner/name, such as facebook/sam3"),
        ("SAM3_HF_REPO", "https://huggingface.co/facebook/sam3", "must be owner/name, such as facebook/sam3"),
        ("API_SECRET_KEY", "short", f"must have 16 characters or more in each key: {MAKE_A_KEY}"),
        ("API_SECRET_KEY", f"{KEY},short", f"must have 16 characters or more in each key: {MAKE_A_KEY}"),
        ("API_SECRET_KEY", "schlüssel-schlüssel", "must be ASCII without spaces: it is sent in a header"),
        ("API_SECRET_KEY", "open sesame open sesame", "must be ASCII without spaces: it is sent in a header"),
        ("ALLOWED_ORIGINS", "*", ORIGINS),
        ("ALLOWED_ORIGINS", "app.example.com", ORIGINS),
        ("ALLOWED_ORIGINS", "https://app.example.com/", ORIGINS),
        ("ALLOWED_ORIGINS", "https://a.example.com,https://b.example.com/path", ORIGINS),
        ("R2_PUBLIC_BASE_URL", "pub.example.com", HTTPS),
        ("R2_IMAGE_URL_BASES", "https://a.example.com,b.example.com", HTTPS),
        ("R2_PUBLIC_BASE_URL", "https://", NO_URL),
        ("R2_PUBLIC_BASE_URL", "https://[::1", NO_URL),
        ("R2_PUBLIC_BASE_URL", "https://pub.example.com:https", NO_URL),
        ("R2_BUCKET", "s3-\nimages", "holds a line break or another control character: set it again"),
    ],
)
def test_wrong_value_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str, fault: str) -> None:
    """The message names the variable, its valid values, and its value if that is not a secret."""
    assert refusal(monkeypatch, **{name: value}) == f"{name} {fault}"


@pytest.mark.parametrize("name", ["API_WORKERS", "API_SECRET_KEY", "R2_BUCKET", "DATA_DIR"])
@pytest.mark.parametrize("quote", ["'", '"'])
def test_quoted_value_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, quote: str) -> None:
    """`docker run --env-file` keeps quotes as part of the value."""
    sentence = refusal(monkeypatch, **{name: f"{quote}{SECRET}{quote}"})
    assert sentence == f"{name} has quotes round its value, which count as a part of it: take them off"


@pytest.mark.parametrize("space", [" ", "\r", "\n", "\r\n", "\t"])
def test_white_space_around_a_value_is_removed(monkeypatch: pytest.MonkeyPatch, space: str) -> None:
    """Values from Windows' files or from secret files may end in a line break; a blank value is unset."""
    padded = {
        name: f" {value}{space}"
        for name, value in {**R2, "API_SECRET_KEY": SECRET, "HF_TOKEN": SECRET}.items()
    }
    read = load(monkeypatch, **padded, DATA_DIR=f"data{space}", SAM3_DEVICE=f"cpu{space}", SUPABASE_URL=space)
    assert (read.r2_endpoint, read.api_keys, read.data_dir) == (R2["R2_ENDPOINT"], (SECRET,), Path("data"))
    assert (read.sam3_device, read.supabase_url) == ("cpu", None)
    for secret in (read.r2_secret_access_key, read.hf_token):
        assert secret is not None
        assert secret.get_secret_value() == SECRET


@pytest.mark.parametrize(
    ("name", "value", "placeholder"),
    [
        ("R2_ENDPOINT", "https://<ACCOUNT>.r2.cloudflarestorage.com", "<ACCOUNT>"),
        ("R2_ENDPOINT", "https://ACCOUNT.r2.cloudflarestorage.com", "ACCOUNT"),
        ("R2_ENDPOINT", "https://account-id.eu.r2.cloudflarestorage.com", "ACCOUNT-ID"),
        ("R2_ENDPOINT", "https://...", "..."),
        ("R2_PUBLIC_BASE_URL", "https://your-domain.example", "YOUR-DOMAIN"),
        ("SUPABASE_URL", "https://PROJECT.supabase.co", "PROJECT"),
        ("SUPABASE_URL", "https://{{ project }}.supabase.co", "{{ project }}"),
        ("R2_BUCKET", "${BUCKET}", "${BUCKET}"),
        ("DATA_DIR", "<folder>", "<folder>"),
    ],
)
def test_placeholder_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, placeholder: str
) -> None:
    """A placeholder of a template is reported before any service is called."""
    sentence = refusal(monkeypatch, **(R2 | SUPABASE | {name: value}))
    assert sentence == f"{name} still has the placeholder {placeholder}: put the real value in its place"


@pytest.mark.parametrize(
    "value",
    ["sb_secret_...", "hf_…", "<secret>", "your-key-here", "YOUR_KEY", "change-me-change-me", "${KEY}"],
)
@pytest.mark.parametrize("name", ["SUPABASE_SERVICE_KEY", "HF_TOKEN", "API_SECRET_KEY", "R2_ACCESS_KEY_ID"])
def test_placeholder_of_a_secret_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """A placeholder in place of a secret is reported."""
    sentence = refusal(monkeypatch, **(R2 | SUPABASE | {name: value}))
    assert sentence == f"{name} still has a placeholder for its value: put the real one in its place"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("API_SECRET_KEY", "a<b>c...d${e}-0123456789"),
        ("R2_PUBLIC_BASE_URL", "https://project.example.com"),
        ("R2_PUBLIC_BASE_URL", "https://account.example.com/your-images"),
        ("DATA_DIR", "my-account/data"),
    ],
)
def test_real_values_are_not_placeholders(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """A secret may contain any character, and a host's name may contain such words."""
    load(monkeypatch, **{name: value})


def test_tilde_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`~` in a path is replaced by the home directory."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my.env").write_text("DATA_DIR=~/data\nSAM3_WEIGHTS_PATH='~/w.pt'\nSAM3_KERNEL_CACHE=~/k\n")
    read = load(monkeypatch, ENV_FILE="~/my.env")
    assert (read.data_dir, read.sam3_weights_path) == (tmp_path / "data", str(tmp_path / "w.pt"))
    assert read.kernel_cache == tmp_path / "k"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("R2_ENDPONT", "did you mean R2_ENDPOINT?"),
        ("SUPABASE_SERVICE_ROLE_KEY", "did you mean SUPABASE_SERVICE_KEY?"),
        ("SAM3_WEIGHT_PATH", "did you mean SAM3_WEIGHTS_PATH?"),
        ("API_SECRET", "did you mean API_SECRET_KEY?"),
        ("API_SECRET_KEYS", "did you mean API_SECRET_KEY?"),
        ("r2_endpont", "did you mean R2_ENDPOINT?"),
        ("R2_QQQQQQQQ", ".env.example"),
    ],
)
def test_misspelt_variable_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, hint: str) -> None:
    """A misspelt variable with one of our prefixes stops the start; the message proposes the right name."""
    sentence = refusal(monkeypatch, **{name: SECRET})
    assert sentence.startswith(name.upper())
    assert hint in sentence


def test_variables_of_the_client_are_no_misspelt_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server starts in a shell that says where the client finds one."""
    load(monkeypatch, SAM3_URL="http://127.0.0.1:3000", SAM3_API_KEY=SECRET)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("API_WORKER", "API_WORKERS"),
        ("MAX_IMAGE_BYTE", "MAX_IMAGE_BYTES"),
        ("REQUEST_TIMEOUT", "REQUEST_TIMEOUT_S"),
        ("allowed_origin", "ALLOWED_ORIGINS"),
        ("ENVFILE", "ENV_FILE"),
        ("DATADIR", "DATA_DIR"),
        ("SUPBASE_URL", "SUPABASE_URL"),
    ],
)
def test_similar_variable_gives_a_warning(monkeypatch: pytest.MonkeyPatch, name: str, meant: str) -> None:
    """A similar variable without our prefix may be another program's: it gives only a warning."""
    load(monkeypatch, **{name: SECRET})
    assert overlooked_variables() == [
        f"{name} is no setting of this server and has no effect; if {meant} is meant, correct it"
    ]


@pytest.mark.parametrize(
    "name",
    [
        *("DATA_DIRECTORY", "XDG_DATA_DIRS", "APP_NAME", "APP_HOME", "PGDATA", "HOSTNAME", "PORT", "WORKERS"),
        *("HF_HOME", "HF_ENDPOINT", "HF_TOKEN_PATH", "HF_HUB_OFFLINE", "AWS_SECRET_ACCESS_KEY", "API_KEY"),
        # Kubernetes sets these for a service that is called api-workers.
        *("API_WORKERS_PORT", "API_WORKERS_SERVICE_HOST"),
    ],
)
def test_other_programs_variables_give_no_warning(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Usual variables of a host give no warning."""
    monkeypatch.setenv(name, "1")
    assert overlooked_variables() == []


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("WORKERS=1", "WORKERS in .env, line 3 is not a setting of this server; did you mean API_WORKERS?"),
        (
            "DATA_DIRECTORY=/d",
            "DATA_DIRECTORY in .env, line 3 is not a setting of this server; did you mean DATA_DIR?",
        ),
        ("PORT=80", "PORT in .env, line 3 is not a setting of this server; .env.example lists what there is"),
        ("api_worker=2", ".env, line 3 is not a setting of this server; did you mean API_WORKERS?"),
        # What may be the rest of a secret is not shown.
        (SECRET, ".env, line 3 is not a setting of this server; .env.example lists what there is"),
        ("HUSH0123", ".env, line 3 is not a setting of this server; .env.example lists what there is"),
        ("API_WORKERS 2", ".env, line 3 cannot be read: write NAME=value there, and close each quote"),
        ("API_WORKERS: 2", ".env, line 3 cannot be read: write NAME=value there, and close each quote"),
        (
            f"API_SECRET_KEY='{SECRET}",
            ".env, line 3 cannot be read: write NAME=value there, and close each quote",
        ),
    ],
)
def test_wrong_line_in_the_file_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str, sentence: str
) -> None:
    """In our own file every line must set one of our settings."""
    (tmp_path / ".env").write_text(f"# ours\n\n{line}\nMAX_IN_FLIGHT=9\n")
    assert refusal(monkeypatch) == sentence


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_and_byte_order_mark_are_ignored(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, encoding: str, end: str
) -> None:
    """Line ends and a byte order mark change no value; the last of two lines for one name counts."""
    lines = ["API_WORKERS=3", "R2_BUCKET=bücket", "api_workers = 4 ", "", "# Ende"]
    (tmp_path / ".env").write_bytes(end.join(lines).encode(encoding))
    read = load(monkeypatch)
    assert (read.api_workers, read.r2_bucket) == (4, "bücket")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("API_WORKERS=3\n".encode("utf-16"), "is in UTF-16, or no text at all: save it in UTF-8"),
        ("API_WORKERS=3\n".encode("utf-16-be"), "is in UTF-16, or no text at all: save it in UTF-8"),
        ("API_WORKERS=3\n".encode("utf-32"), "is in UTF-16, or no text at all: save it in UTF-8"),
        ("\n# für uns\n".encode("latin-1"), "is not in UTF-8 (line 2): save it in UTF-8"),
        (None, "cannot be read (Is a directory): name a file that this server's user may read"),
    ],
)
def test_unreadable_file_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None, fault: str
) -> None:
    """The message names a file in another encoding, or a folder in its place."""
    if content is None:
        (tmp_path / ".env").mkdir()
    else:
        (tmp_path / ".env").write_bytes(content)
    assert refusal(monkeypatch) == f"ENV_FILE .env {fault}"


def test_file_named_by_env_file_must_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without .env the server starts; without the file that ENV_FILE names it does not."""
    load(monkeypatch)
    assert refusal(monkeypatch, ENV_FILE="my.env") == (
        "ENV_FILE my.env is not there: correct the path, or unset ENV_FILE"
    )
    load(monkeypatch, ENV_FILE=os.devnull)


@pytest.mark.parametrize("group", [R2, SUPABASE])
def test_incomplete_group_is_refused(monkeypatch: pytest.MonkeyPatch, group: dict[str, str]) -> None:
    """The message names the missing variables of R2_* or SUPABASE_*."""
    for missing in group:
        sentence = refusal(monkeypatch, **{name: value for name, value in group.items() if name != missing})
        assert f"{missing} missing" in sentence


def test_complete_groups_select_the_real_services(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of R2_* and SUPABASE_* select R2 and Supabase, without the demo; trailing slashes are removed."""
    read = load(
        monkeypatch, **R2, **SUPABASE, SAM3_WEIGHTS_PATH="demo", R2_PUBLIC_BASE_URL="https://p.example/"
    )
    assert (read.uses_r2, read.uses_supabase, read.is_demo) == (True, True, False)
    assert read.r2_public_base_url == "https://p.example"
    assert read.r2_bucket == "s3-images"


def test_production_refuses_embedded_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """In production a folder or SQLite is used only if EMBEDDED_PARTS names it."""
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
def test_only_the_embedded_demo_starts_without_a_key(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    """Without an API key only the embedded demo starts, without real weights, stores or production."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match="API_SECRET_KEY"):
        load_settings()


def test_demo_generates_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo generates a new key at each start, and sets it in the environment for its workers."""
    monkeypatch.setenv("SAM3_WEIGHTS_PATH", "demo")
    read = load_settings()
    assert (read.is_demo, read.api_keys) == (True, ())
    monkeypatch.setenv("API_SECRET_KEY", "")  # so that it is restored after the test
    first, second = make_demo_key(), make_demo_key()
    assert first != second
    assert os.environ["API_SECRET_KEY"] == second
    assert load_settings().api_keys == (second,)


def test_several_keys_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each key of a comma-separated list is valid, so that keys can be rotated."""
    assert load(monkeypatch, API_SECRET_KEY=f" {KEY} ,{SECRET},").api_keys == (KEY, SECRET)


def test_download_needs_no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The download reads the settings of the weights from the same places, and needs no others."""
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


def test_default_revision_is_a_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default revision is a commit, so that the weights never change."""
    assert re.fullmatch("[0-9a-f]{40}", load(monkeypatch).sam3_hf_revision)


def test_line_break_after_a_token_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line break at the end of a secret's file is not part of the token."""
    token = load(monkeypatch, HF_TOKEN=f"{SECRET}\n").hf_token
    assert token is not None
    assert token.get_secret_value() == SECRET


def test_lists_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Origins are separated by commas, with or without spaces."""
    read = load(monkeypatch, ALLOWED_ORIGINS="https://a.example.com, http://localhost:5173,")
    assert read.allowed_origins == ("https://a.example.com", "http://localhost:5173")


def test_secrets_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Printed or logged settings contain no key, token or password."""
    read = load(monkeypatch, **R2, **SUPABASE, HF_TOKEN=SECRET, API_SECRET_KEY=SECRET)
    for shown in (str(read), repr(read), str(read.model_dump()), read.model_dump_json()):
        assert SECRET not in shown


def test_settings_are_immutable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings cannot change after the start."""
    read = load(monkeypatch)
    with pytest.raises(ValueError, match="frozen"):
        setattr(read, "api_workers", 3)  # noqa: B010 - mypy refuses the assignment too


def test_every_error_is_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An inspection has all errors, without what only follows from another; `load_settings` has its first."""
    (tmp_path / ".env").write_text("MAX_IN_FLIHGT=5\n'\nR2_ENDPOINT=https://a.example.com\nSAM3_DTYPE=int8\n")
    given = {
        "API_SECRET_KEY": "too-short",
        "R2_ACCESS_KEY_ID": SECRET,
        "R2_SECRET_ACCESS_KEY": "<your secret>",
        "SUPABASE_SERVICE_KEY": SECRET,
        "SAM3_DEVICE": "tpu",
        "SAM3_WEIGHT": "x",
        "API_WORKERS": "3",
    }
    with pytest.raises(SettingsError) as refused:
        load(monkeypatch, **given)
    settings, errors = inspect_settings()
    assert errors[0] == str(refused.value)
    assert [error.split(" ")[0] for error in errors] == [
        *("SAM3_WEIGHT", "MAX_IN_FLIHGT", ".env,", "R2_SECRET_ACCESS_KEY", "API_SECRET_KEY", "SAM3_DEVICE"),
        *("SAM3_DTYPE", "SUPABASE_URL"),
    ]
    assert not any(secret in error for error in errors for secret in (SECRET, "too-short", "your secret"))
    assert (settings.api_workers, settings.sam3_dtype) == (3, "auto")


@pytest.mark.usefixtures("_environment_is_restored")
@pytest.mark.parametrize(("in_file", "chosen"), [("", "demo"), ("SAM3_WEIGHTS_PATH=mine.pt", "mine.pt")])
def test_demo_is_chosen_where_no_weights_are_named(tmp_path: Path, in_file: str, chosen: str) -> None:
    """The demo is the default of a command, and what `.env` names comes before it."""
    (tmp_path / ".env").write_text(in_file)
    choose_demo_by_default()
    assert load_weights_settings().sam3_weights_path == chosen
