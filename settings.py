"""The only place that reads the environment: every variable typed, read once, validated.

`.env.example` lists the same variables, and a test holds the two together. A wrong value stops the
start with one sentence that names the variable and the mend.
"""

from __future__ import annotations

import os
import re
import secrets
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from dotenv import dotenv_values
from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

if TYPE_CHECKING:
    from collections.abc import Iterable

_Read = TypeVar("_Read", bound=BaseSettings)

R2_REQUIRED = ("r2_endpoint", "r2_access_key_id", "r2_secret_access_key")
SUPABASE_REQUIRED = ("supabase_url", "supabase_service_key")
SAM3_COMMIT = "3c879f39826c281e95690f02c7821c4de09afae7"
"""Of facebook/sam3 on the hub: its sam3.pt has 3,450,062,241 bytes and the sha256 9999e234...c3cf8c9e."""

OWN_PREFIXES = ("SAM3_", "R2_", "SUPABASE_", "API_SECRET")
"""Variables that start so and are not ours are taken for slips of the pen."""


class SettingsError(Exception):
    """A variable is missing or wrong; the message is the sentence to print."""


class WeightsSettings(BaseSettings):
    """Where the weights lie, and where they come from when they do not: all that a download needs."""

    model_config = SettingsConfigDict(
        env_file_encoding="utf-8", env_ignore_empty=True, extra="ignore", frozen=True
    )

    sam3_weights_path: str = Field(
        "weights/sam3.pt", description="the weights, or the word demo for the embedded demo checkpoint"
    )
    hf_token: SecretStr | None = Field(
        None, description="downloads the gated weights from the Hugging Face hub, where they are missing"
    )
    sam3_hf_repo: str = Field("facebook/sam3", description="owner/name of a repository on the hub")
    sam3_hf_revision: str = Field(
        SAM3_COMMIT, description="a commit, tag or branch of it; a commit alone never changes"
    )

    @field_validator("hf_token")
    @classmethod
    def _strip(cls, value: SecretStr | None) -> SecretStr | None:
        return SecretStr(value.get_secret_value().strip()) if value else None  # a file's last line break

    @field_validator("sam3_hf_repo")
    @classmethod
    def _is_repo(cls, value: str) -> str:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", value, re.ASCII):
            raise ValueError("must be owner/name, such as facebook/sam3")
        return value


class DataSettings(BaseSettings):
    """Where the server keeps its files: all that its operator's commands need."""

    model_config = SettingsConfigDict(
        env_file_encoding="utf-8", env_ignore_empty=True, extra="ignore", frozen=True
    )

    data_dir: Path = Field(
        Path("data"),
        description="of the outbox, which should outlive a restart, and of the embedded storage and results",
    )


class Settings(WeightsSettings, DataSettings):
    """Every setting, with its default. The field's name in capitals is the variable's."""

    model_config = SettingsConfigDict(extra="forbid")

    env_file: Path = Field(Path(".env"), description="read beside the environment, which has the last word")
    app_env: Literal["development", "production"] = Field(
        "development", description="production refuses embedded parts that are not asked for by name"
    )
    api_secret_key: SecretStr | None = Field(
        None, description="keys that X-API-Key may hold, comma-separated: two while rotating"
    )
    allowed_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="CORS: origins of the Edge, comma-separated; none by default"
    )

    sam3_device: Literal["cuda", "cpu"] | None = Field(None, description="default: cuda if there is one")
    sam3_cpu_threads: int | None = Field(
        None, ge=1, le=256, description="of the model, where it runs on the CPU; default: one a core"
    )
    sam3_max_batch: int = Field(8, ge=2, le=64, description="requests that share one pass of the model")

    r2_endpoint: str | None = Field(
        None, description="https://ACCOUNT.r2.cloudflarestorage.com, without the bucket"
    )
    r2_access_key_id: SecretStr | None = Field(
        None, description="of a token with Object Read & Write on the bucket"
    )
    r2_secret_access_key: SecretStr | None = Field(None, description="of the same token")
    r2_bucket: str = Field("s3-images", description="holds uploads/ and masks/")
    r2_public_base_url: str | None = Field(None, description="where browsers read the bucket: mask URLs")
    r2_image_url_bases: Annotated[tuple[str, ...], NoDecode] = Field(
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

    embedded_parts: Annotated[tuple[Literal["storage", "results"], ...], NoDecode] = Field(
        (), description="storage, results: embedded parts that production may use, comma-separated"
    )
    api_workers: int = Field(2, ge=1, le=64, description="processes that speak HTTP")
    max_in_flight: int = Field(
        256, ge=1, description="requests an API worker works on at once; more are told 429"
    )
    max_connections: int = Field(
        1024, ge=16, description="an API worker holds at once; more close those that wait longest"
    )
    request_timeout_s: float = Field(60.0, gt=0, le=600, description="from claim to answer")
    outage_limit_s: float = Field(
        900.0, ge=0, description="a claimed task that waits longer for R2 or the model ends as error"
    )
    max_image_bytes: int = Field(10 * 1024 * 1024, ge=1, description="10 MB")
    max_image_pixels: int = Field(2**26, ge=1, description="67 megapixels: phones' 50 are up to 8192 x 6144")
    max_body_bytes: int = Field(64 * 1024, ge=1024, description="64 KiB")

    @field_validator("allowed_origins", "embedded_parts", "r2_image_url_bases", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return _split_list(value) if isinstance(value, str) else value

    @field_validator("allowed_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
                raise ValueError("must be origins such as https://app.example.com, without a path")
        return origins

    @field_validator("r2_endpoint", "r2_public_base_url", "supabase_url")
    @classmethod
    def _is_url(cls, value: str | None) -> str | None:
        return _checked_url(value) if value else value

    @field_validator("r2_image_url_bases")
    @classmethod
    def _are_urls(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_checked_url(value) for value in values)

    @field_validator("api_secret_key")
    @classmethod
    def _keys_are_long(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and any(len(key) < 16 for key in _split_list(value.get_secret_value())):
            raise ValueError("each key must have 16 characters or more; `openssl rand -hex 32` makes one")
        return value

    @model_validator(mode="after")
    def _groups_are_whole(self) -> Settings:
        for group in (R2_REQUIRED, SUPABASE_REQUIRED):
            missing = [name for name in group if getattr(self, name) is None]
            if missing and len(missing) < len(group):
                raise ValueError(
                    f"{_variables(missing)} missing beside {_variables(set(group) - set(missing))}: "
                    "set all of them, or none to use the embedded default"
                )
        return self

    @model_validator(mode="after")
    def _production_is_real(self) -> Settings:
        if self.app_env == "production":
            for part, real, group in (
                ("storage", self.uses_r2, R2_REQUIRED),
                ("results", self.uses_supabase, SUPABASE_REQUIRED),
            ):
                if not real and part not in self.embedded_parts:
                    raise ValueError(
                        f"{_variables(group)} must be set when APP_ENV=production; "
                        f"EMBEDDED_PARTS={part} asks for the embedded one"
                    )
        if not self.api_keys and not self.is_demo:
            raise ValueError(
                "API_SECRET_KEY must be set: `openssl rand -hex 32` makes one. "
                "Only the embedded demo (SAM3_WEIGHTS_PATH=demo, no R2_*, no SUPABASE_*) starts without"
            )
        return self

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
        """After it a claimed task may be taken over: well over the time that a request may take.

        The minute is for claiming and telling the row while the database is slow.
        """
        return self.request_timeout_s + 60

    @property
    def wants_gpu(self) -> bool:
        """Ask BentoML for a GPU: none is refused, and none was seen to be missing."""
        return self.sam3_device != "cpu" and Path("/dev/nvidiactl").exists()

    @property
    def is_demo(self) -> bool:
        """Everything is embedded: the demo checkpoint, a folder, SQLite, on a developer's machine."""
        embedded = not self.uses_r2 and not self.uses_supabase
        return embedded and self.sam3_weights_path == "demo" and self.app_env == "development"

    @property
    def api_keys(self) -> tuple[str, ...]:
        """The keys that X-API-Key may hold; empty only in the demo, before it made one."""
        return _split_list(self.api_secret_key.get_secret_value()) if self.api_secret_key else ()


def load_settings() -> Settings:
    """Read the environment and `.env`. Raises `SettingsError`."""
    return _load(Settings)


def freeze_settings() -> Settings:
    """Read as `load_settings` does, and leave what was read where child processes find it. Raises the same.

    From then on the file plays no part: a process that is started anew has the settings that were checked,
    whatever the file says by then.
    """
    checked = load_settings()
    given = {name.upper() for name, value in os.environ.items() if value}
    in_file = dotenv_values(Path(os.environ.get("ENV_FILE", ".env")).expanduser(), encoding="utf-8")
    for name, value in in_file.items():
        if value and name.upper() not in given:
            os.environ[name.upper()] = value
    os.environ["ENV_FILE"] = os.devnull
    return checked


def load_weights_settings() -> WeightsSettings:
    """The same, where nothing is served and so neither keys nor stores are needed."""
    return _load(WeightsSettings)


def load_data_settings() -> DataSettings:
    """The same, for a command beside the server."""
    return _load(DataSettings)


def _load(kind: type[_Read]) -> _Read:
    _refuse_slips()
    try:
        return kind(_env_file=os.environ.get("ENV_FILE", ".env"))
    except ValidationError as error:
        raise SettingsError(_sentence(error)) from None  # the original holds values, secrets among them


def make_demo_key() -> str:
    """A random API key for the demo, left in the environment so that child processes share it."""
    key = secrets.token_hex(16)
    os.environ["API_SECRET_KEY"] = key
    return key


def _refuse_slips() -> None:
    known = [name.upper() for name in Settings.model_fields]
    for name in os.environ:
        if name.startswith(OWN_PREFIXES) and name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else "; .env.example lists what there is"
            raise SettingsError(f"{name} is not a setting of this server{hint}")


def _sentence(error: ValidationError) -> str:
    first = error.errors(include_input=False, include_url=False)[0]
    if first["type"] == "extra_forbidden":
        return f"{str(first['loc'][0]).upper()} in .env is not a setting; .env.example lists what there is"
    reason = first["msg"].removeprefix("Value error, ")
    return f"{str(first['loc'][0]).upper()}: {reason}" if first["loc"] else reason


def _checked_url(value: str) -> str:
    if not value.startswith(("http://", "https://")):
        raise ValueError("must start with https:// (http:// only for a local server)")
    return value.rstrip("/")


def _split_list(value: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in value.split(",") if item.strip())


def _variables(names: Iterable[str]) -> str:
    return ", ".join(sorted(name.upper() for name in names))
