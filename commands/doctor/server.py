"""Checks of the server's settings and of what they name: weights, GPU, disks, port, stores."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pynvml

from commands.doctor.check import Check
from processes import data_lock, identity
from processes.volumes import check_writable
from results import ResultsError
from sam3_runner.errors import DeviceUnavailable, WeightsError
from sam3_runner.prompts import PromptTokenizer
from sam3_runner.serving.cpu_share import cpu_share
from sam3_runner.serving.gpu import count_gpus
from sam3_runner.weights.checkpoint import find_checkpoint, is_missing
from sam3_runner.weights.header import check_header
from settings import (
    R2_REQUIRED,
    SUPABASE_REQUIRED,
    Settings,
    SettingsError,
    inspect_settings,
    named_gpus,
    overlooked_variables,
)
from storage import StorageError
from stores import open_results, open_storage, storage_folder

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from commands.doctor.check import Status

DOWNLOAD_GB = 3.5
"""Of the weights."""
LEAST_DISK_GB = 1.0
HEALTH_TIMEOUT_S = 3.0
STORE_TIMEOUT_S = 30.0
"""Longer than the stores' own limits, which end each of their calls."""
HEADERS = "Python.h"
COMPILERS = ("cc", "gcc", "clang")


def server_checks(port: int) -> Iterator[Check]:
    """All of them. Settings with errors are read as far as they go."""
    settings, errors = inspect_settings()
    yield Check("CPU", "ok", str(cpu_share()))
    yield from _gpu(settings)
    yield from _settings(errors)
    yield from _weights(settings)
    yield _data_dir(settings)
    yield _disk(settings)
    yield _port(port)
    yield _storage(settings)
    yield _results(settings)


def _gpu(settings: Settings) -> Iterator[Check]:
    if settings.sam3_device == "cpu":
        yield Check("GPU", "ok", "the model runs on the CPU, as SAM3_DEVICE says")
        return
    try:
        count = count_gpus(named_gpus())
    except DeviceUnavailable as error:
        if settings.sam3_device == "cuda":
            yield Check("GPU", "failed", f"SAM3_DEVICE=cuda: {error}")
        else:
            slow: Status = "ok" if settings.is_demo else "warning"
            yield Check("GPU", slow, f"the model runs on the CPU: {error}")
        return
    yield Check("GPU", "ok", f"{count} that PyTorch can use: {_gpu_names()}")
    has_headers = Path(sysconfig.get_path("include"), HEADERS).exists()
    if not has_headers or not any(map(shutil.which, COMPILERS)):
        yield Check(
            "C compiler",
            "warning",
            "no compiler, or no headers of Python: kernels for the GPU cannot be compiled, which is slower",
            "apt-get install gcc libc6-dev python3-dev",
        )


def _gpu_names() -> str:
    try:
        pynvml.nvmlInit()
        try:
            handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
            names = ", ".join(sorted({pynvml.nvmlDeviceGetName(handle) for handle in handles}))
            return f"{names}; driver {pynvml.nvmlSystemGetDriverVersion()}"
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        return f"their names are unknown ({error})"


def _settings(errors: list[str]) -> Iterator[Check]:
    for sentence in errors:
        yield Check("settings", "failed", sentence)
    if not errors:
        yield Check("settings", "ok", "all valid")
    for sentence in overlooked_variables():
        yield Check("settings", "warning", sentence)


def _weights(settings: Settings) -> Iterator[Check]:
    path = settings.sam3_weights_path
    try:
        checkpoint = find_checkpoint(path, to_be_downloaded=settings.hf_token is not None)
        if checkpoint.demo:
            yield Check("weights", "ok", "the embedded demo checkpoint, which knows coloured shapes alone")
            return
        if is_missing(path):
            yield Check(
                "weights", "warning", f"{path} is missing: `sam3 weights` downloads it, or else the start"
            )
            yield from _token(settings)
            return
        check_header(checkpoint.weights_file)
        PromptTokenizer(checkpoint.tokenizer_file)
        size_gb = checkpoint.weights_file.stat().st_size / 1e9
        yield Check("weights", "ok", f"{checkpoint.weights_file}, {size_gb:.2f} GB; its header is SAM 3's")
    except (WeightsError, OSError) as error:
        yield Check("weights", "failed", str(error))
        if is_missing(path):
            yield from _token(settings)


def _token(settings: Settings) -> Iterator[Check]:
    if settings.hf_token is None:
        yield Check("HF_TOKEN", "warning", "not set", "make a read token of an account that has access")
    elif not settings.hf_token.get_secret_value().startswith("hf_"):
        yield Check("HF_TOKEN", "warning", "does not begin with hf_, as tokens do", "copy the token again")
    else:
        yield Check("HF_TOKEN", "ok", "is set (not shown, not tried)")


def _data_dir(settings: Settings) -> Check:
    folder = settings.data_dir.absolute()
    holder = data_lock.holder(folder)
    if identity.is_alive(holder):
        return Check("DATA_DIR", "ok", f"{folder}, in use by a server (pid {holder.partition(':')[0]})")
    if folder.exists():
        try:
            check_writable("DATA_DIR", folder)
        except SettingsError as error:
            return Check("DATA_DIR", "failed", str(error))
        return Check("DATA_DIR", "ok", f"{folder} can be written")
    above = _existing(folder)
    if not above.is_dir() or not os.access(above, os.W_OK):
        mend = "let this user write there, or name another folder"
        return Check("DATA_DIR", "failed", f"{folder} cannot be created in {above}", mend)
    return Check("DATA_DIR", "ok", f"{folder} is created by the start")


def _disk(settings: Settings) -> Check:
    path = settings.sam3_weights_path
    folders = {"DATA_DIR": (settings.data_dir, LEAST_DISK_GB)}
    if is_missing(path):
        folders["the weights"] = (Path(path).parent, DOWNLOAD_GB)
    free, short = [], []
    for name, (folder, needed_gb) in folders.items():
        free_gb = shutil.disk_usage(_existing(folder.absolute())).free / 1e9
        free.append(f"{free_gb:.1f} GB free for {name}")
        if free_gb < needed_gb:
            short.append(f"{needed_gb} GB for {name}")
    if short:
        return Check("disk", "warning", ", ".join(free), f"make room: {' and '.join(short)}")
    return Check("disk", "ok", ", ".join(free))


def _port(port: int) -> Check:
    try:
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(("127.0.0.1", port))
    except OSError as error:
        return _port_in_use(port, error)
    return Check("port", "ok", f"{port} of 127.0.0.1 is free")


def _port_in_use(port: int, error: OSError) -> Check:
    try:
        health = httpx.get(f"http://127.0.0.1:{port}/health", timeout=HEALTH_TIMEOUT_S).json()
        if "model_loaded" in health:
            return Check("port", "ok", f"a server of this kind answers at {port}: {health['status']}")
    except (httpx.HTTPError, ValueError, TypeError, KeyError):
        pass  # another program, or none that answers
    return Check(
        "port",
        "failed",
        f"{port} of 127.0.0.1 cannot be used ({error.strerror})",
        "stop the program that has it, or choose another: sam3 serve --port N",
    )


def _storage(settings: Settings) -> Check:
    if not settings.uses_r2:
        return Check("storage", "ok", f"embedded: the folder {storage_folder(settings).absolute()}")
    if not _is_whole(settings, R2_REQUIRED):
        return Check("storage", "failed", "R2 was not tried", "correct the settings first")

    async def check() -> list[str]:
        store = open_storage(settings)
        try:
            return await store.check()
        finally:
            await store.close()

    return _store("storage", f"R2 bucket {settings.r2_bucket} answers", check)


def _results(settings: Settings) -> Check:
    if not settings.uses_supabase:
        return Check("results", "ok", f"embedded: results.sqlite in {settings.data_dir.absolute()}")
    if not _is_whole(settings, SUPABASE_REQUIRED):
        return Check("results", "failed", "Supabase was not tried", "correct the settings first")

    async def check() -> list[str]:
        rows = open_results(settings)
        try:
            return await rows.check()
        finally:
            await rows.close()

    return _store("results", "Supabase's table answers", check)


def _store(name: str, works: str, check: Callable[[], Awaitable[list[str]]]) -> Check:
    try:
        warnings = asyncio.run(_bounded(check))
    except (SettingsError, StorageError, ResultsError) as error:
        return Check(name, "failed", str(error))
    except TimeoutError:
        return Check(name, "warning", f"no answer within {STORE_TIMEOUT_S:.0f} s", "see if it can be reached")
    return Check(name, "warning", "; ".join(warnings)) if warnings else Check(name, "ok", works)


async def _bounded(check: Callable[[], Awaitable[list[str]]]) -> list[str]:
    return await asyncio.wait_for(check(), STORE_TIMEOUT_S)


def _is_whole(settings: Settings, group: tuple[str, ...]) -> bool:
    return all(getattr(settings, name) is not None for name in group)


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(each for each in (path, *path.parents) if each.exists())
