"""The only place that reads the environment: every variable typed, read once, validated.

`.env.example` lists the same variables, and a test holds the two together. A wrong value stops the
start with one sentence that names the variable, the fault and the mend.
"""

from __future__ import annotations

import os
import re
import secrets
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from sam3_runner.images.image_file import DEFAULT_MAX_PIXELS
from sam3_runner.inference.precision import DTypeSetting
from sam3_runner.serving.cpu_share import cpu_share
from sam3_runner.weights.checkpoint import DEFAULT_WEIGHTS_PATH, DEMO, HubSource
from setting_text import TextRefused, checked_url, cleaned, hint, read_env_file, rule, shown, split_list

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

_Read = TypeVar("_Read", bound=BaseModel)

R2_REQUIRED = ("r2_endpoint", "r2_access_key_id", "r2_secret_access_key")
SUPABASE_REQUIRED = ("supabase_url", "supabase_service_key")
SAM3_COMMIT = "3c879f39826c281e95690f02c7821c4de09afae7"
"""Of facebook/sam3 on the hub: its sam3.pt has 3,450,062,241 bytes and the sha256 9999e234...c3cf8c9e."""


MAX_GPUS = 64
"""Eight GPUs of which each is divided into seven (MIG) are 56."""

OWN_PREFIXES = ("SAM3_", "R2_", "SUPABASE_", "API_SECRET")
"""A variable with such a prefix that is no setting is taken for a misspelt one, and refused."""
CLIENT_VARIABLES = {"SAM3_URL", "SAM3_API_KEY"}
"""Of `sam3_client`, which tell it where a server is; a server that starts there ignores them."""

MISSPELT_SIMILARITY = 0.85
"""difflib's ratio from which a variable of the host gets a warning as a misspelt setting. API_WORKER and
REQUEST_TIMEOUT reach it; XDG_DATA_DIRS, HF_TOKEN_PATH and Kubernetes' API_WORKERS_PORT do not."""

_WORD = re.compile(r"\w+")


class SettingsError(Exception):
    """A variable is missing or wrong; the message is the sentence to print."""


class WeightsSettings(BaseModel):
    """Where the weights are, and where they are downloaded from: all that a download needs."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    sam3_weights_path: str = Field(
        DEFAULT_WEIGHTS_PATH, description="the weights, or the word demo for the embedded demo checkpoint"
    )
    hf_token: SecretStr | None = Field(
        None, description="downloads the gated weights from the Hugging Face hub, where they are missing"
    )
    sam3_hf_repo: str = Field("facebook/sam3", description="owner/name of a repository on the hub")
    sam3_hf_revision: str = Field(
        SAM3_COMMIT, description="a commit, tag or branch of it; a commit alone never changes"
    )

    @field_validator("sam3_weights_path")
    @classmethod
    def _expand_weights_home(cls, value: str) -> str:
        return os.path.expanduser(value)  # noqa: PTH111 - it may be the word demo

    @field_validator("sam3_hf_repo")
    @classmethod
    def _is_repo(cls, value: str) -> str:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", value, re.ASCII):
            raise ValueError("must be owner/name, such as facebook/sam3")
        return value

    @property
    def hub_source(self) -> HubSource:
        """The repository that missing weights are downloaded from."""
        token = self.hf_token.get_secret_value() if self.hf_token else None
        return HubSource(self.sam3_hf_repo, self.sam3_hf_revision, token)


class DataSettings(BaseModel):
    """Where the server keeps its files: all that the operator's commands need."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    data_dir: Path = Field(
        Path("data"),
        description="of the outbox, which should outlive a restart, and of the embedded storage and results",
    )

    @field_validator("data_dir")
    @classmethod
    def _expand_data_home(cls, value: Path) -> Path:
        return _expanded(value)


class LogSettings(BaseModel):
    """How the log is written. Read apart from the others, whose errors the log reports."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    app_env: Literal["development", "production"] = Field(
        "development", description="production refuses embedded parts that are not asked for by name"
    )
    log_format: Literal["text", "json"] | None = Field(
        None, description="text or json, one event a line; default: json when APP_ENV=production, else text"
    )

    @property
    def logs_json(self) -> bool:
        """The log is JSON."""
        return (self.log_format or ("json" if self.app_env == "production" else "text")) == "json"


class Settings(WeightsSettings, DataSettings, LogSettings):
    """Every setting, with its default. The field's name in capitals is the variable's."""

    model_config = ConfigDict(extra="forbid")

    env_file: Path = Field(Path(".env"), description="read beside the environment, which takes precedence")
    api_secret_key: SecretStr | None = Field(
        None, description="keys that X-API-Key may hold, comma-separated: two while rotating"
    )
    allowed_origins: tuple[str, ...] = Field(
        (), description="CORS: origins of the Edge, comma-separated; none by default"
    )

    sam3_device: Literal["cuda", "cpu"] | None = Field(None, description="default: cuda if there is one")
    gpus: Literal["auto"] | int = Field(
        "auto",
        description="runners, each on a GPU of its own; auto: one for each GPU that the server may use, and "
        "one on a CPU",
    )
    sam3_cpu_threads: int | None = Field(
        None,
        ge=1,
        le=256,
        description="of the model, where it runs on the CPU; default: one a core that it may use",
    )
    sam3_dtype: DTypeSetting = Field(
        "auto",
        description="auto, float16, bfloat16 or float32; auto: float16 on a GPU, with bfloat16 where that "
        "overflows, and float32 on a CPU",
    )
    sam3_max_batch: int = Field(8, ge=2, le=64, description="requests that share one pass of the model")
    sam3_feature_cache_mb: int | None = Field(
        None,
        ge=0,
        le=1_000_000,
        description="memory for the features of images, on each GPU; default: 2048, on a CPU 256; 0: none",
    )
    sam3_kernel_cache: Path | None = Field(
        None, description="folder of the kernels compiled for the GPU; default: kernels in DATA_DIR"
    )

    r2_endpoint: str | None = Field(
        None, description="https://ACCOUNT.r2.cloudflarestorage.com, without the bucket"
    )
    r2_access_key_id: SecretStr | None = Field(
        None, description="of a token with Object Read & Write on the bucket"
    )
    r2_secret_access_key: SecretStr | None = Field(None, description="of the same token")
    r2_bucket: str = Field("s3-images", description="holds uploads/ and masks/")
    r2_public_base_url: str | None = Field(None, description="where browsers read the bucket: mask URLs")
    r2_image_url_bases: tuple[str, ...] = Field(
        (), description="more URLs that image_url may start with, comma-separated; they name no bucket"
    )
    user_prefix_required: bool = Field(
        True,  # noqa: FBT003 - pydantic's own order
        description="image_url must lie below uploads/{user_id}/ of the request",
    )

    supabase_url: str | None = Field(None, description="https://PROJECT.supabase.co")
    supabase_service_key: SecretStr | None = Field(None, description="sb_secret_... or service_role")
    supabase_publishable_key: SecretStr | None = Field(
        None, description="only beside a SUPABASE_SERVICE_KEY that is the JWT of a role of your own"
    )
    supabase_mask_column: str | None = Field(None, description="default: found in the table at start")

    embedded_parts: tuple[Literal["storage", "results"], ...] = Field(
        (), description="storage, results: embedded parts that production may use, comma-separated"
    )
    api_workers: int | None = Field(
        None,
        ge=1,
        le=64,
        description="processes that speak HTTP; default: one for eight cores, from 2 to 4",
    )
    max_in_flight: int = Field(
        768, ge=1, description="requests that an API worker holds at once; others get 429"
    )
    max_connections: int = Field(
        1024, ge=16, description="an API worker holds at once; more close those that wait longest"
    )
    request_timeout_s: float = Field(60.0, gt=0, le=600, description="from claim to answer")
    default_deadline_s: float = Field(
        25.0,
        gt=0,
        le=600,
        description="of requests without X-Deadline-Ms; more than REQUEST_TIMEOUT_S counts as that",
    )
    outage_limit_s: float = Field(
        900.0,
        ge=0,
        allow_inf_nan=False,
        description="a claimed task that waits longer for R2 or the model ends as error",
    )
    max_image_bytes: int = Field(10 * 1024 * 1024, ge=1, description="10 MB")
    max_image_pixels: int = Field(
        DEFAULT_MAX_PIXELS, ge=1, description="67 megapixels: phones' 50 are up to 8192 x 6144"
    )
    max_body_bytes: int = Field(64 * 1024, ge=1024, description="64 KiB")
    direct_api: bool | None = Field(
        None,
        description="serve POST /v1/images/segmentations, which takes an image in its body and stores "
        "nothing; default: in the embedded demo alone",
    )
    metrics_and_docs: Literal["open", "key", "loopback"] | None = Field(
        None,
        description="who may read /metrics and the documentation: open (everyone), key (X-API-Key or "
        "Authorization: Bearer), loopback (a key, or a caller on this machine; not behind a tunnel or a "
        "proxy); default: key when APP_ENV=production, else open",
    )

    otel_exporter_otlp_endpoint: str | None = Field(
        None,
        description="of a collector that takes traces by OTLP over HTTP, as http://HOST:4318; default: none",
    )

    @field_validator("gpus", mode="before")
    @classmethod
    def _is_auto_or_count(cls, value: object) -> object:
        text = str(value)
        if text == "auto":
            return text
        if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= MAX_GPUS):
            raise ValueError(f"must be auto or a whole number from 1 to {MAX_GPUS}{shown(text)}")
        return int(text)

    @field_validator("sam3_kernel_cache")
    @classmethod
    def _expand_cache_home(cls, value: Path | None) -> Path | None:
        return _expanded(value) if value else None

    @field_validator("allowed_origins", "embedded_parts", "r2_image_url_bases", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return split_list(value) if isinstance(value, str) else value

    @field_validator("allowed_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
                raise ValueError("must be origins such as https://app.example.com, without a path")
        return origins

    @field_validator("r2_endpoint", "r2_public_base_url", "supabase_url", "otel_exporter_otlp_endpoint")
    @classmethod
    def _is_url(cls, value: str | None) -> str | None:
        return checked_url(value) if value else value

    @field_validator("r2_image_url_bases")
    @classmethod
    def _are_urls(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(checked_url(value) for value in values)

    @field_validator("api_secret_key")
    @classmethod
    def _keys_are_long(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and any(len(key) < 16 for key in split_list(value.get_secret_value())):
            raise ValueError("must have 16 characters or more in each key: `openssl rand -hex 32` makes one")
        return value

    @model_validator(mode="after")
    def _fits_together(self, info: ValidationInfo) -> Settings:
        """Raise the first error between fields, or add all of them to the list that is the context."""
        for sentence in (*self._half_set_groups(), *self._missing_in_production(), *self._missing_key()):
            if info.context is None:
                raise ValueError(sentence)
            info.context.append(sentence)
        return self

    def _half_set_groups(self) -> Iterator[str]:
        for group in (R2_REQUIRED, SUPABASE_REQUIRED):
            missing = [name for name in group if getattr(self, name) is None]
            if missing and len(missing) < len(group):
                yield (
                    f"{_variables(missing)} missing beside {_variables(set(group) - set(missing))}: "
                    "set all of them, or none to use the embedded default"
                )

    def _missing_in_production(self) -> Iterator[str]:
        if self.app_env != "production":
            return
        for part, real, group in (
            ("storage", self.uses_r2, R2_REQUIRED),
            ("results", self.uses_supabase, SUPABASE_REQUIRED),
        ):
            if not real and part not in self.embedded_parts:
                yield (
                    f"{_variables(group)} must be set when APP_ENV=production; "
                    f"EMBEDDED_PARTS={part} asks for the embedded one"
                )

    def _missing_key(self) -> Iterator[str]:
        if not self.api_keys and not self.is_demo:
            yield (
                "API_SECRET_KEY must be set: `openssl rand -hex 32` makes one. "
                "Only the embedded demo (SAM3_WEIGHTS_PATH=demo, no R2_*, no SUPABASE_*) starts without"
            )

    @property
    def api_worker_count(self) -> int:
        """API_WORKERS, or what follows from the cores."""
        return self.api_workers or max(2, min(4, cpu_share().threads // 8))

    @property
    def max_feature_bytes(self) -> int | None:
        """SAM3_FEATURE_CACHE_MB in bytes."""
        return None if self.sam3_feature_cache_mb is None else self.sam3_feature_cache_mb * 2**20

    @property
    def kernel_cache(self) -> Path:
        """Where compiled kernels are kept between starts."""
        return self.sam3_kernel_cache or self.data_dir / "kernels"

    @property
    def uses_r2(self) -> bool:
        """Storage is R2, not a folder."""
        return self.r2_endpoint is not None

    @property
    def uses_supabase(self) -> bool:
        """Results are Supabase rows, not SQLite's."""
        return self.supabase_url is not None

    @property
    def lease_s(self) -> float:
        """How long a claim holds a task: longer than the longest request.

        The minute is for claiming and settling the row while the database is slow.
        """
        return self.request_timeout_s + 60

    @property
    def is_demo(self) -> bool:
        """Everything is embedded: the demo checkpoint, a folder, SQLite, on a developer's machine."""
        embedded = not self.uses_r2 and not self.uses_supabase
        return embedded and self.sam3_weights_path == DEMO and self.app_env == "development"

    @property
    def serves_direct_api(self) -> bool:
        """`/v1/images/segmentations` is served."""
        return self.is_demo if self.direct_api is None else self.direct_api

    @property
    def metrics_and_docs_access(self) -> Literal["open", "key", "loopback"]:
        """Who may read `/metrics` and the documentation."""
        return self.metrics_and_docs or ("key" if self.app_env == "production" else "open")

    @property
    def api_keys(self) -> tuple[str, ...]:
        """The keys that X-API-Key may hold; empty only in the demo, before its key is made."""
        return split_list(self.api_secret_key.get_secret_value()) if self.api_secret_key else ()


def load_settings() -> Settings:
    """Read the environment and `.env`. Raises `SettingsError`."""
    return _load(Settings)


def freeze_settings(runners: int) -> Settings:
    """Read as `load_settings` does, and put what was read into the environment of child processes.

    After that no process reads the file: one that is restarted has the settings that were checked, whatever
    the file holds then. Paths become absolute: the processes of a built Bento run in another folder than the
    one in which it was started.

    Args:
        runners: what `GPUS` stands for: the processes must agree on it, also after a GPU was lost.

    Raises:
        SettingsError: a setting is wrong.
    """
    values = _read()
    checked = _checked(Settings, values)
    values["GPUS"] = str(runners)
    values["DATA_DIR"] = str(checked.data_dir.absolute())
    if checked.sam3_kernel_cache is not None:
        values["SAM3_KERNEL_CACHE"] = str(checked.sam3_kernel_cache.absolute())
    if checked.sam3_weights_path != DEMO:
        values["SAM3_WEIGHTS_PATH"] = str(Path(checked.sam3_weights_path).absolute())
    os.environ.update(values)
    os.environ["ENV_FILE"] = os.devnull
    return _checked(Settings, values)


def freeze_device(device: Literal["cuda", "cpu"]) -> None:
    """Let child processes use this device, also one that is restarted and does not find it any more."""
    os.environ["SAM3_DEVICE"] = device


def limit_child_processes(threads: int) -> None:
    """Limit threads and kept memory of each child process, unless the operator has set these variables.

    OpenMP and numpy's BLAS start a thread for each core of the host, however few a container may use. glibc
    keeps freed memory in up to eight arenas a core: two take half the memory (docs/benchmarks.md).
    """
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, str(threads))
    os.environ.setdefault("MALLOC_ARENA_MAX", "2")


def named_gpus() -> list[str] | None:
    """The GPUs that `CUDA_VISIBLE_DEVICES` names, by index or UUID; None where it is not set: all GPUs."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if value is None else [name.strip() for name in value.split(",")]


def load_weights_settings() -> WeightsSettings:
    """Read the settings of a download alone. Raises `SettingsError`."""
    return _load(WeightsSettings)


def load_data_settings() -> DataSettings:
    """Read the settings of a command beside the server. Raises `SettingsError`."""
    return _load(DataSettings)


def load_log_settings() -> LogSettings:
    """Read the settings of the log alone. Raises `SettingsError`."""
    return _load(LogSettings)


def overlooked_variables() -> list[str]:
    """A warning for each variable that may be a misspelt setting; it may be another program's."""
    found = []
    for name in sorted(os.environ):
        # A misspelt name keeps the first letter: AWS_SECRET_ACCESS_KEY is not meant as R2_SECRET_ACCESS_KEY.
        alike = [each for each in _names() if each[0] == name[:1].upper()]
        close = get_close_matches(name.upper(), alike, n=1, cutoff=MISSPELT_SIMILARITY)
        if close and close[0] != name.upper():
            found.append(
                f"{name} is no setting of this server and has no effect; if {close[0]} is meant, correct it"
            )
    return found


def make_demo_key() -> str:
    """A random API key for the demo, put into the environment so that child processes have it too."""
    key = secrets.token_hex(16)
    os.environ["API_SECRET_KEY"] = key
    return key


def inspect_settings() -> tuple[Settings, list[str]]:
    """The settings, and every error in them, a sentence each; a wrong value counts as not given.

    For a report. What serves calls `load_settings`, which refuses the first error.
    """
    values, errors = _read_all()
    wrong = {name for name, _ in errors}
    sentences = [sentence for _, sentence in errors]
    between_fields: list[str] = []
    while True:
        between_fields.clear()
        try:
            settings = Settings.model_validate(_of_kind(Settings, values), context=between_fields)
            break
        except ValidationError as error:
            for each in _details(error):
                sentences.append(_sentence(each, values))
                wrong.add(name := str(each["loc"][0]).upper())
                del values[name]
    # What names a variable whose value is wrong may only follow from that.
    if "ENV_FILE" not in wrong:
        sentences += [each for each in between_fields if wrong.isdisjoint(_WORD.findall(each))]
    return settings, sentences


def choose_demo_by_default() -> None:
    """Choose the embedded demo, for this process and its children, where no weights are named.

    Neither in the environment nor in the file: what the file names still counts.
    """
    values, errors = _read_all()
    if "SAM3_WEIGHTS_PATH" not in {*values, *(name for name, _ in errors)}:
        os.environ["SAM3_WEIGHTS_PATH"] = DEMO


def _load(kind: type[_Read]) -> _Read:
    return _checked(kind, _read())


def _read() -> dict[str, str]:
    """The values of the environment and the file, cleaned, under names in capitals; no empty ones."""
    values, errors = _read_all()
    if errors:
        raise SettingsError(errors[0][1])
    return values


def _read_all() -> tuple[dict[str, str], list[tuple[str, str]]]:
    """As `_read`, with every error: the name of the variable, or an empty one, and a sentence."""
    known = _names()
    # Windows and Compose files may spell names in small letters; of two spellings that in capitals counts.
    by_spelling = sorted(os.environ.items(), key=lambda variable: variable[0].isupper())
    environment = {name.upper(): value for name, value in by_spelling}
    errors = [("", sentence) for sentence in _unknown_variables(environment, known)]
    given = {name: value for name, value in environment.items() if name in known and value.strip()}
    in_file: dict[str, str] = {}
    try:
        in_file, line_errors = _read_file(environment.get("ENV_FILE", "").strip(), known)
        errors += [("", sentence) for sentence in line_errors]
    except TextRefused as error:
        errors.append(("ENV_FILE", str(error)))
    values = {}
    for name, value in (in_file | given).items():
        try:
            if value.strip():
                values[name] = cleaned(name, value, secret=_is_secret(name))
        except TextRefused as error:
            errors.append((name, str(error)))
    return values, errors


def _read_file(chosen: str, known: set[str]) -> tuple[dict[str, str], list[str]]:
    path = _expanded(Path(chosen or ".env"))
    try:
        is_there = path.exists()
    except PermissionError:  # read_env_file reports it
        is_there = True
    if is_there:
        return read_env_file(path, known)
    if chosen:
        raise TextRefused(f"ENV_FILE {path} is not there: correct the path, or unset ENV_FILE")
    return {}, []


def _checked(kind: type[_Read], values: dict[str, str]) -> _Read:
    try:
        return kind.model_validate(_of_kind(kind, values))
    except ValidationError as error:
        sentence = _sentence(_details(error)[0], values)
        raise SettingsError(sentence) from None  # the original holds values, secrets among them


def _of_kind(kind: type[BaseModel], values: dict[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in values.items() if name.lower() in kind.model_fields}


def _unknown_variables(environment: Iterable[str], known: set[str]) -> Iterator[str]:
    for name in environment:
        if name.startswith(OWN_PREFIXES) and name not in known | CLIENT_VARIABLES:
            yield f"{name} is not a setting of this server{hint(name, known)}"


def _details(error: ValidationError) -> Sequence[Mapping[str, Any]]:
    return error.errors(include_input=False, include_url=False)


def _sentence(error: Mapping[str, Any], values: dict[str, str]) -> str:
    reason: str = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:
        return reason
    field = str(error["loc"][0])
    name = field.upper()
    if error["type"] == "value_error":
        return f"{name} {reason}"
    return f"{name} must be {rule(name, Settings.model_fields[field])}{shown(values[name])}"


def _expanded(path: Path) -> Path:
    return Path(os.path.expanduser(path))  # noqa: PTH111 - pathlib's raises where there is no home


def _names() -> set[str]:
    return {name.upper() for name in Settings.model_fields}


def _is_secret(name: str) -> bool:
    return SecretStr in get_args(Settings.model_fields[name.lower()].annotation)


def _variables(names: Iterable[str]) -> str:
    return ", ".join(sorted(name.upper() for name in names))
